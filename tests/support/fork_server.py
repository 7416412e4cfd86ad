"""A process that speaks the fork server's side of contract/worker.py and trains nothing.

    python -m tests.support.fork_server SOCKET PLAN

PLAN is a JSON file, read at each Start: {"iterations": 4, "every": 2, "fail": {"attempt": 1, "iteration": 3}}. A
worker of the failing attempt ends there with exit code 70 and "cause" (Crash), where "when" names a file as soon as
that exists; "hang" is an iteration that never ends, "wait" one that waits for a file. Its workers are threads; what it
writes (rank files and manifests) is real. Beside PLAN it leaves `saved-<step>`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from starcoder_trainer.contract.ledger import Piece, RankManifest
from starcoder_trainer.contract.report import Failure
from starcoder_trainer.contract.worker import (
    Exited,
    Leave,
    Message,
    Quit,
    Ready,
    Saved,
    Start,
    Started,
    Step,
    Stop,
    Stopped,
    decode_line,
    encode_line,
)


class Server:
    def __init__(self, connected: socket.socket, plan: Path) -> None:
        self._connected = connected
        self._plan = plan
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._workers: list[threading.Thread] = []

    def say(self, message: Message) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._connected.sendall(encode_line(message))

    def serve(self) -> bool:
        """Whether to wait for another agent."""
        self.say(Ready(os.getpid(), 0.0))
        rest, descriptors = b"", []
        while True:
            data, ancillary, _, _ = self._connected.recvmsg(65536, socket.CMSG_SPACE(array.array("i").itemsize))
            if not data:
                self.stop()
                return True
            for _, _, content in ancillary:
                descriptors.append(array.array("i", content)[0])
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                match decode_line(line):
                    case Start() as start:
                        self.start(start, descriptors.pop() if descriptors else None)
                    case Stop(attempt):
                        self.stop()
                        self.say(Stopped(attempt))
                    case Quit():
                        self.stop()
                        return False
                    case Leave():
                        pass  # its workers come to the end of no iteration

    def stop(self) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def start(self, start: Start, descriptor: int | None) -> None:
        if 0 in start.ranks:
            # As rank 0's TCPStore would: take the socket over and be met at the address that was offered.
            assert descriptor is not None, "the leader's Start came without its socket"
            listener = socket.socket(fileno=descriptor)
            with socket.create_connection((start.master_address, start.master_port), 5):
                listener.accept()[0].close()
            listener.close()
        self._stop = threading.Event()
        plan = json.loads(self._plan.read_text())
        self._workers = [
            threading.Thread(target=self.work, args=(start, rank, plan, self._stop)) for rank in start.ranks
        ]
        for worker in self._workers:
            worker.start()

    def work(self, start: Start, rank: int, plan: dict[str, Any], stop: threading.Event) -> None:
        attempt, first = start.attempt, start.checkpoint.step if start.checkpoint else 0
        self.say(Started(attempt, rank, first))
        for iteration in range(first + 1, plan["iterations"] + 1):
            if stop.is_set():
                return
            fail = plan.get("fail", {})
            if (fail.get("attempt"), fail.get("iteration")) == (attempt, iteration):
                while fail.get("when") and not Path(fail["when"]).exists() and not stop.wait(0.02):
                    pass
                cause = fail.get("cause", "Crash")
                self.say(Exited(attempt, rank, 70, Failure(cause, "as planned", 70, rank, iteration)))
                return
            wait = plan.get("wait", {})
            while wait.get("iteration") == iteration and not Path(wait["for"]).exists() and not stop.wait(0.02):
                pass
            if plan.get("hang") == iteration:
                stop.wait()
                return
            if rank == min(start.ranks):
                seconds = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0, "total": 0.01}
                self.say(Step(attempt, rank, iteration, iteration, iteration * 64, 5.0, 1e-3, 1.0, 640.0, seconds))
            last = iteration == plan["iterations"]
            if last or iteration % plan["every"] == 0:
                self.save(start, rank, iteration, last=last)
                (self._plan.parent / f"saved-{iteration}").touch()
        self.say(Exited(attempt, rank, 0))

    def save(self, start: Start, rank: int, step: int, *, last: bool) -> None:
        folder = Path(start.scratch) / "checkpoints" / f"a{start.attempt}" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank-{rank:05d}.safetensors"
        file.write_bytes(f"{rank}@{step}".encode() * 100)
        piece = Piece(f"param/w{rank}@0x4", "float32", 4, 0, 4, file.name, 0)
        manifest = RankManifest(start.attempt, step, rank, (file.name,), (piece,), {"step": str(step)})
        (folder / f"rank-{rank:05d}.json").write_text(manifest.to_json())
        self.say(Saved(start.attempt, rank, step, str(folder), 0.01, file.stat().st_size, last))


def main() -> None:
    path, plan = Path(sys.argv[1]), Path(sys.argv[2])
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        again = True
        while again:
            connected, _ = listener.accept()
            with connected:
                again = Server(connected, plan).serve()


if __name__ == "__main__":
    main()
