"""Every setting of the operator: command line (`--help`), else environment `STARCODER_OPERATOR_*`, else the default."""

from __future__ import annotations

import os
import socket
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from starcoder_trainer.contract.heartbeat import Rhythm

from .domain.hearing import Limits

Seconds = Annotated[float, Field(gt=0)]

DEVICE_FAULT_CONDITIONS = (
    "GpuMemWatch",
    "GpuNvlinkWatch",
    "GpuPcieWatch",
    "SysLogsXIDError",
    "SysLogsGPUFallenOff",
    "NVSwitchFatalError",
)
"""Of NVSentinel's monitors of DCGM and the kernel's log; True means a fault."""


class Settings(BaseSettings):
    """Operator of StarCoderRun: watches runs, places their Pods as a gang, says who trains what in which attempt."""

    model_config = SettingsConfigDict(
        env_prefix="STARCODER_OPERATOR_",
        use_attribute_docstrings=True,
        cli_prog_name="starcoder-operator",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        frozen=True,
    )

    namespaces: Annotated[tuple[str, ...], NoDecode] = ()
    """Namespaces whose runs are served, comma-separated. Empty: all."""
    trainer_image: str = ""
    """Image of the workers where a run names none. Empty: such runs are not accepted."""
    trainer_image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    """Pull policy of that image where a run names none. Empty: Kubernetes' default."""

    heartbeat_interval: Annotated[float, Field(ge=0.1)] = Rhythm.seconds
    """Seconds between two heartbeats of an agent; Pods that run keep what they were created with."""
    heartbeat_missed: Annotated[int, Field(ge=2)] = Rhythm.missed
    """Heartbeats missed in a row after which an agent is suspect, and lost unless it renews its own Lease."""
    heartbeat_stale: Seconds = 15.0
    """Seconds without any sign of life after which a member's agent is taken for lost, though nobody suspects it."""
    device_fault_conditions: Annotated[tuple[str, ...], NoDecode] = DEVICE_FAULT_CONDITIONS
    """Types of Node conditions that tell of a broken GPU or link where they are True, comma-separated: members there
    are replaced elsewhere. Default: NVSentinel's. Empty: none."""
    status_interval: Seconds = 5.0
    """Least seconds between two status writes that change only progress figures."""
    status_interval_large: Seconds = 15.0
    """As status-interval, for large gangs."""
    large_gang: Annotated[int, Field(ge=1)] = 64
    """Members from which on a gang is large."""

    workers: Annotated[int, Field(ge=1)] = 8
    """Runs handled at the same time."""
    api_concurrency: Annotated[int, Field(ge=1)] = 32
    """Kubernetes API calls under way at the same time."""
    api_timeout: Seconds = 15.0
    """Seconds after which an API call without an answer counts as failed."""

    leader_election: bool = True
    """Lead only while holding the Lease, so that a second replica may stand by."""
    lease_name: str = "starcoder-operator"
    """Lease of the election."""
    lease_namespace: str = ""
    """Its namespace. Empty: the operator's own, `default` outside a cluster."""
    lease_duration: Annotated[float, Field(ge=3)] = 15.0
    """Seconds without renewal after which another replica takes over."""
    lease_renew_deadline: Annotated[float, Field(ge=2)] = 10.0
    """Seconds after which a leader that cannot renew gives up and exits."""
    lease_retry_period: Annotated[float, Field(ge=1)] = 2.0
    """Seconds between two tries to take or renew the Lease."""
    identity: str = Field(default_factory=lambda: f"{socket.gethostname()}_{os.getpid()}")
    """Name of this replica in the Lease."""

    host: str = "0.0.0.0"  # noqa: S104 - probes and Prometheus come from other hosts
    """Address on which /metrics, /healthz and /readyz are served."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Their port; 0 takes a free one and logs it."""
    stuck_after: Seconds = 180.0
    """Seconds a run may wait for a pass, or a pass may take, before /healthz says 503."""
    watch_silence: Seconds = 420.0
    """Seconds without a watch event or reconnect before /readyz says 503; reconnects come at least every 310 s."""
    shutdown_grace: Seconds = 10.0
    """Seconds that passes under way get to end after SIGTERM."""

    kubeconfig: str = ""
    """File with the API server's address and credentials. Empty: $KUBECONFIG, else the Pod's ServiceAccount, else
    ~/.kube/config."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """auto: text in a terminal, else one JSON object a line."""

    @field_validator("namespaces", "device_fault_conditions", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        return tuple(name.strip() for part in parts for name in str(part).split(",") if name.strip())

    @model_validator(mode="after")
    def _stale_is_longest(self) -> Self:
        least = 2 * Limits.of(self.rhythm, self.heartbeat_stale).heard
        if self.heartbeat_stale < least:
            raise ValueError(
                f"heartbeat_stale: found {self.heartbeat_stale:g} s, expected at least {least:g} s, which is 4 x "
                f"heartbeat_interval {self.heartbeat_interval:g} s x heartbeat_missed {self.heartbeat_missed}"
            )
        return self

    @property
    def rhythm(self) -> Rhythm:
        """Of the agents' heartbeats."""
        return Rhythm(self.heartbeat_interval, self.heartbeat_missed)

    def status_interval_of(self, replicas: int) -> float:
        """Seconds between two writes of mere progress for a gang of that size."""
        return self.status_interval_large if replicas >= self.large_gang else self.status_interval


def parse(argv: list[str] | None = None) -> Settings:
    """Settings of this process. Prints help or what is wrong and exits where the arguments say so.

    Args:
        argv: without the program's name; None takes the process's own.
    """
    return Settings(_cli_parse_args=True if argv is None else argv)  # type: ignore[call-arg]
