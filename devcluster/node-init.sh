#!/bin/sh
# First process of a node: has network, mount, uts and pid namespaces of its own, and makes them look like a machine that
# has just been switched on. Never ends; a node dies by one SIGKILL to this process.
# From the environment: NODE, ADDRESS, GPUS, CLUSTER (state folder of the cluster), PROGRAMS (folder of binaries).
set -eu
hostname "$NODE"
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock /run/cni /run/cluster /run/programs
mount --bind "$CLUSTER" /run/cluster
mount --bind "$PROGRAMS" /run/programs
disk=/run/cluster/nodes/$NODE
etc=$disk/etc
logs=/run/cluster/log/$NODE
export PATH="/run/programs:$PATH"

# Its disk. A rebooted machine finds it as it was, but for the addresses of Pods that died.
mount --bind "$disk/lib" /var/lib
mount --bind "$disk/log" /var/log
mkdir -p /var/lib/containerd /var/lib/kubelet /var/lib/cni /var/log/pods /var/log/containers
rm -rf /var/lib/cni/*
cp "$etc/cni.conflist" /run/cni/10-pods.conflist
ip link delete cni0 2>/dev/null || :

# Names come from the cluster's DNS, which says at once that the outside doesn't exist.
resolver=$(readlink -m /etc/resolv.conf)
mkdir -p "${resolver%/*}"
[ -e "$resolver" ] || : > "$resolver"
mount --bind "$etc/resolv.conf" "$resolver"

# A kubelet sets these for the whole machine. Here it finds them as it wants them, and the machine keeps its own.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=/run/sysctl/${setting%=*}
    mkdir -p "${file%/*}"
    echo "${setting#*=}" > "$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done

containerd --config "$etc/containerd.toml" >> "$logs-containerd.log" 2>&1 &
while ! [ -S /run/containerd/containerd.sock ]; do sleep 0.05; done
kubelet --config "$etc/kubelet.yaml" --kubeconfig "/run/cluster/pki/$NODE.conf" --root-dir /var/lib/kubelet \
    --hostname-override "$NODE" --node-ip "$ADDRESS" --node-labels starcoder.dev/simulated-gpus=true \
    >> "$logs-kubelet.log" 2>&1 &
kube-proxy --config "$etc/proxy.yaml" >> "$logs-kube-proxy.log" 2>&1 &
[ "$GPUS" = 0 ] || gpuplugin -count "$GPUS" >> "$logs-gpuplugin.log" 2>&1 &
while :; do # reaps what the dead leave behind
    wait
    sleep 1
done
