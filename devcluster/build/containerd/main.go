// containerd, and ctr when it is called by that name.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"
	"github.com/containerd/containerd/v2/cmd/containerd/command"
	"github.com/containerd/containerd/v2/cmd/ctr/app"
)

func main() {
	ctx := context.Background()
	name := filepath.Base(os.Args[0])
	var err error
	if name == "ctr" {
		err = app.New().Run(ctx, os.Args)
	} else {
		err = command.App().Run(ctx, os.Args)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}
