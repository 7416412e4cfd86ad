// A device plugin that advertises GPUs which are not there: the scheduler counts them, the kubelet hands them out and
// containers find their indices in NVIDIA_VISIBLE_DEVICES, as with NVIDIA's plugin. Nothing is mounted.
//
// The file <root>/gpu-unhealthy lists, separated by blanks, the indices of GPUs to report as Unhealthy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

type plugin struct {
	api.UnimplementedDevicePluginServer
	count         int
	unhealthyFile string
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p *plugin) devices(unhealthy []string) []*api.Device {
	devices := make([]*api.Device, p.count)
	for i := range devices {
		devices[i] = &api.Device{ID: strconv.Itoa(i), Health: api.Healthy}
		if slices.Contains(unhealthy, devices[i].ID) {
			devices[i].Health = api.Unhealthy
		}
	}
	return devices
}

func (p *plugin) unhealthy() []string {
	content, _ := os.ReadFile(p.unhealthyFile) // no file: all are well
	return strings.Fields(string(content))
}

// ListAndWatch sends the devices at first, and again whenever the health of one changes.
func (p *plugin) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	unhealthy := p.unhealthy()
	for {
		if err := stream.Send(&api.ListAndWatchResponse{Devices: p.devices(unhealthy)}); err != nil {
			return err
		}
		for said := unhealthy; slices.Equal(said, unhealthy); unhealthy = p.unhealthy() {
			select {
			case <-stream.Context().Done():
				return nil
			case <-time.After(time.Second):
			}
		}
	}
}

func (p *plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	answer := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		answer.ContainerResponses = append(answer.ContainerResponses, &api.ContainerAllocateResponse{
			Envs: map[string]string{
				"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ","),
				"CUDA_VISIBLE_DEVICES":   "-1", // there is no GPU behind them: containers are to compute on the CPU
			},
		})
	}
	return answer, nil
}

// serve registers with the kubelet and returns when it has to be done again: the kubelet, when it restarts, forgets its
// plugins and removes their sockets.
func serve(p *plugin, folder, resource string) error {
	own := filepath.Join(folder, "gpuplugin.sock")
	kubelet := filepath.Join(folder, "kubelet.sock")
	registeredWith, err := os.Stat(kubelet)
	if err != nil {
		return err
	}
	if err := os.Remove(own); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", own)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	go func() {
		if err := server.Serve(listener); err != nil {
			log.Print(err)
		}
	}()
	defer server.Stop()
	if err := register(kubelet, filepath.Base(own), resource); err != nil {
		return err
	}
	log.Printf("registered %d x %s", p.count, resource)
	for {
		time.Sleep(time.Second)
		now, err := os.Stat(kubelet)
		if err != nil || !os.SameFile(registeredWith, now) {
			return errors.New("the kubelet has another socket: registering again")
		}
		if _, err := os.Stat(own); err != nil {
			return err
		}
	}
}

func register(kubelet, endpoint, resource string) error {
	connection, err := grpc.NewClient("unix://"+kubelet, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err = api.NewRegistrationClient(connection).Register(ctx, &api.RegisterRequest{
		Version: api.Version, Endpoint: endpoint, ResourceName: resource,
	})
	return err
}

func main() {
	count := flag.Int("count", 8, "GPUs to advertise")
	root := flag.String("root", "/var/lib/kubelet", "the kubelet's root folder")
	resource := flag.String("resource", "nvidia.com/gpu", "name of the resource")
	flag.Parse()
	if *count < 0 {
		fmt.Fprintf(os.Stderr, "-count is %d; expected 0 or more\n", *count)
		os.Exit(2)
	}
	p := &plugin{count: *count, unhealthyFile: filepath.Join(*root, "gpu-unhealthy")}
	for {
		log.Print(serve(p, filepath.Join(*root, "device-plugins"), *resource))
		time.Sleep(200 * time.Millisecond)
	}
}
