"""A real fork server whose workers follow a script instead of training: no torch, so it is up at once.

    python -m tests.support.scripted_workers [THREADS]

`Start.config` is the script, e.g. {"do": "exit", "code": 3}. The number of kills for want of memory is read from
the file beside the socket. With THREADS the server has so many threads more than it should.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from starcoder_trainer import witness
from starcoder_trainer.contract.names import ENV_WORKER_SOCKET
from starcoder_trainer.contract.worker import Exited, Leave, Start, Started, decode_line, encode_line
from starcoder_trainer.failures import failure_of
from starcoder_trainer.forkserver import ForkServer

OOM_FILE = "oom-kills"


def enter(start: Start, rank: int, channel: socket.socket, listen_fd: int | None) -> int:
    script = start.config

    def say_started() -> None:
        channel.sendall(encode_line(Started(start.attempt, rank, 7)))

    match script["do"]:
        case "hang":
            say_started()
            signal.pause()
        case "answer":
            witness.stand_by(lambda *_: None)
            say_started()
            while True:
                signal.pause()
        case "write":
            say_started()
            while True:
                os.write(1, b"again and again\n" * 1000)
        case "leave":
            # Trains until it is asked to leave.
            say_started()
            with channel.makefile("rb") as lines:
                assert decode_line(lines.readline()) == Leave(start.attempt)
            channel.sendall(encode_line(Exited(start.attempt, rank, 0, None, 8)))
            return 0
        case "family":
            # A child, and one that left the process group and would outlive its parent; both say who they are.
            for options in ({}, {"process_group": 0}):
                child = subprocess.Popen(["sleep", "600"], **options)  # type: ignore[call-overload]
                print(f"child {child.pid}", flush=True)
            say_started()
            if script.get("leave"):
                channel.sendall(encode_line(Exited(start.attempt, rank, 0)))
                return 0
            signal.pause()
        case "exit":
            print("last words", end="", flush=True)
            os._exit(script["code"])
        case "abort":
            print(script["said"], file=sys.stderr, flush=True)
            os.abort()
        case "raise":
            failure = failure_of(RuntimeError("as planned"), rank, 7)
            channel.sendall(encode_line(Exited(start.attempt, rank, 70, failure)))
            return 70
        case "accept":
            # What rank 0's store does with the leader's socket.
            assert listen_fd is not None, "no socket came along"
            with socket.socket(fileno=listen_fd) as listener:
                connection, _ = listener.accept()
                connection.sendall(f"rank {rank}".encode())
        case "descriptors":
            links = [p for p in Path("/proc/self/fd").iterdir() if int(p.name) > 2]
            names = {str(p.readlink()) for p in links if p.is_symlink()}  # the listing's own is closed by now
            print("open", sorted(n for n in names if n.startswith(("socket:", "pipe:"))), flush=True)
    channel.sendall(encode_line(Exited(start.attempt, rank, 0)))
    return 0


def main() -> None:
    path = Path(os.environ[ENV_WORKER_SOCKET])
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 0):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    oom = path.with_name(OOM_FILE)
    ForkServer(path, enter, lambda: 0.0, lambda: int(oom.read_text()) if oom.exists() else 0).serve()


if __name__ == "__main__":
    main()
