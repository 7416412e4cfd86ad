"""Processes: they outlive their starter unless tied to it, and a pid that others got since is never taken for ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devcluster import waiting
from devcluster.process import Daemon, Identity, ProcessFailed, alive, environment, parse_stat


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon("sleeper", tmp_path)
    yield daemon
    daemon.kill()


def until(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def start_elsewhere(daemon: Daemon, *, tied: bool) -> Identity:
    """Started by a process that ends at once."""
    script = (
        "from pathlib import Path; from devcluster.process import Daemon; "
        f"Daemon('sleeper', Path({str(daemon.folder)!r})).start(['sleep', '600'], tied={tied})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    return parse_stat(daemon.pid_file.read_text())


def test_it_outlives_its_starter_in_a_session_of_its_own(daemon):
    identity = start_elsewhere(daemon, tied=False)
    assert daemon.identity() == identity
    assert os.getsid(identity.pid) == identity.pid
    assert Path(f"/proc/{identity.pid}/cmdline").read_bytes() == b"sleep\x00600\x00"


def test_tied_it_dies_with_its_starter(daemon):
    identity = start_elsewhere(daemon, tied=True)
    until(lambda: not alive(identity), "it dies")


@pytest.mark.parametrize("tied", [False, True])
def test_killed_it_is_gone_when_kill_returns(daemon, tied):
    identity = daemon.start(["sleep", "600"], tied=tied)
    assert daemon.kill() is True
    assert not alive(identity)
    assert daemon.identity() is None
    assert daemon.kill() is False


def test_a_second_start_is_refused(daemon):
    identity = daemon.start(["sleep", "600"])
    with pytest.raises(ProcessFailed, match=f"sleeper already runs as pid {identity.pid}"):
        daemon.start(["sleep", "600"])


def test_waiting_for_one_that_died_ends_with_its_last_words(daemon):
    identity = daemon.start(["sh", "-c", "echo no such thing >&2; exec sleep 600"])
    until(lambda: "no such thing" in daemon.last_words(), "it has said so")
    os.kill(identity.pid, signal.SIGKILL)
    with pytest.raises(ProcessFailed, match=r"sleeper died while we waited until pigs fly; (?s:.*)no such thing"):
        waiting.until(lambda: False, "pigs fly", [daemon])


def test_waiting_ends_with_the_last_words_of_all_when_the_limit_has_passed(daemon):
    daemon.start(["sh", "-c", "echo busy >&2; exec sleep 600"])
    until(lambda: "busy" in daemon.last_words(), "it has said so")
    with pytest.raises(ProcessFailed, match=r"not within 0 s: pigs fly\n(?s:.*)busy"):
        waiting.until(lambda: False, "pigs fly", [daemon], seconds=0)


def test_a_pid_that_another_process_got_since_is_left_alone(daemon):
    other = daemon.start(["sleep", "600"])
    words = daemon.pid_file.read_text().split()
    words[21] = str(other.started - 1)
    daemon.pid_file.write_text(" ".join(words))
    assert daemon.identity() is None
    assert daemon.kill() is False
    assert alive(other)
    os.kill(other.pid, signal.SIGKILL)


def test_a_pid_file_that_was_cut_is_no_process(daemon):
    daemon.pid_file.parent.mkdir()
    daemon.pid_file.write_text("12")
    assert daemon.identity() is None


def test_a_name_with_blanks_and_parentheses_does_not_confuse():
    rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"
    assert parse_stat(f"42 (a (b) c) {rest}") == Identity(42, 4711)


def test_it_gets_no_proxy_and_no_credentials_of_ours(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("KUBECONFIG", "/elsewhere")
    assert not {"HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY", "KUBECONFIG"} & environment().keys()
