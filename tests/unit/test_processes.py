"""When a process may fork workers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from starcoder_trainer import processes


def test_a_process_that_has_initialised_cuda_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert processes.fork_obstacle() == "CUDA is initialised in this process"


@pytest.mark.parametrize(
    "text",
    ["low 0\nhigh 3\nmax 9\noom 2\noom_kill 4\noom_group_kill 0\n", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"],
    ids=["cgroup v2", "cgroup v1"],
)
def test_kills_for_want_of_memory_are_read_from_the_containers_cgroup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    events = tmp_path / "memory.events"
    events.write_text(text)
    monkeypatch.setattr(processes, "_OOM_FILES", (str(tmp_path / "absent"), str(events)))
    assert processes.oom_kills() == 4
    events.unlink()
    assert processes.oom_kills() == 0
