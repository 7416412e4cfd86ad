"""Settings come from the command line, else the environment, else defaults, and explain themselves."""

from __future__ import annotations

import pytest

from starcoder_operator.settings import Settings, parse
from starcoder_trainer.contract.heartbeat import Rhythm


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"STARCODER_OPERATOR_{name.upper()}", raising=False)


def test_defaults_serve_all_namespaces_and_elect_a_leader() -> None:
    settings = parse([])
    assert settings.namespaces == ()
    assert settings.leader_election
    assert settings.port == 8080


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARCODER_OPERATOR_PORT", "1")
    monkeypatch.setenv("STARCODER_OPERATOR_HEARTBEAT_STALE", "20")
    settings = parse(["--port", "2"])
    assert settings.port == 2
    assert settings.heartbeat_stale == 20


@pytest.mark.parametrize("arguments", [["--namespaces", "a,b"], ["--namespaces=a", "--namespaces=b"]])
def test_namespaces_are_separated_by_commas_or_named_one_by_one(arguments: list[str]) -> None:
    assert parse(arguments).namespaces == ("a", "b")


def test_namespaces_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARCODER_OPERATOR_NAMESPACES", "team-a, team-b")
    assert parse([]).namespaces == ("team-a", "team-b")


def test_device_faults_are_those_of_nvsentinel_unless_others_or_none_are_named() -> None:
    assert "SysLogsXIDError" in parse([]).device_fault_conditions
    assert parse(["--device-fault-conditions", "GpuGone,LinkDown"]).device_fault_conditions == ("GpuGone", "LinkDown")
    assert parse(["--device-fault-conditions="]).device_fault_conditions == ()


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description, f"{name} has no description"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--port", "70000"), ("--heartbeat-stale", "0"), ("--workers", "0"), ("--log-format", "xml"), ("--nonsense", "1")],
)
def test_a_wrong_value_is_refused_and_named(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        parse([argument, value])
    assert argument.strip("-").replace("-", "_") in (str(refused.value) + capsys.readouterr().err).replace("-", "_")


def test_the_rhythm_of_heartbeats_is_tunable_and_goes_with_the_time_after_which_agents_are_stale() -> None:
    assert parse(["--heartbeat-interval", "0.5", "--heartbeat-missed", "4"]).rhythm == Rhythm(0.5, 4)
    with pytest.raises((SystemExit, ValueError), match="heartbeat_stale: found 15 s, expected at least 24 s"):
        parse(["--heartbeat-interval", "2"])


def test_progress_of_large_gangs_is_written_less_often() -> None:
    settings = parse([])
    assert settings.status_interval_of(2) == settings.status_interval
    assert settings.status_interval_of(settings.large_gang) == settings.status_interval_large
    assert settings.status_interval_large > settings.status_interval
