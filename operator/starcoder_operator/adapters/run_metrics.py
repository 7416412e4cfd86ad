"""Time and recoveries of each run, for `/metrics`; what `status.goodput` and `status.recoveries` say, as series."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from starcoder_operator.api.v1alpha1 import StarCoderRunStatus
from starcoder_operator.api.v1alpha1.goodput import Recovery

from .nodes import RunKey

LABELS = ("namespace", "name")
STAGE_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 300, 600, 1800)
"""Seconds."""


@dataclass
class _Account:
    uid: str
    seconds: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None


class RunMetrics(Collector):
    """Series of a run end with it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._accounts: dict[RunKey, _Account] = {}
        self._recoveries = Counter(
            "starcoder_run_recoveries",
            "Failures after which the run came to an iteration again, by cause; since this operator leads.",
            [*LABELS, "cause"],
            registry=registry,
        )
        self._recovery_seconds = Histogram(
            "starcoder_run_recovery_seconds",
            "Seconds of a recovery by stage: detecting, placing, forming, loading, firstStep, and total.",
            [*LABELS, "stage"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self._iterations_lost = Counter(
            "starcoder_run_iterations_lost",
            "Iterations that were done and are done again, by the cause of the failure; since this operator leads.",
            [*LABELS, "cause"],
            registry=registry,
        )
        registry.register(self)

    def accounted(self, key: RunKey, uid: str, status: StarCoderRunStatus) -> None:
        """Takes over the account of a run."""
        if status.goodput is None:
            return
        account = self._accounts.get(key)
        if account is None or account.uid != uid:
            self.forget(key)
            account = self._accounts[key] = _Account(uid)
        # What is planned and not yet written may be judged anew by the next pass; a counter that went back would be
        # taken for one that began again.
        for bucket, seconds in status.goodput.buckets.to_dict().items():
            account.seconds[bucket] = max(seconds, account.seconds.get(bucket, 0.0))
        account.ratio = status.goodput.ratio

    def recovered(self, key: RunKey, recoveries: Iterable[Recovery]) -> None:
        for recovery in recoveries:
            self._recoveries.labels(*key, recovery.cause).inc()
            self._iterations_lost.labels(*key, recovery.cause).inc(recovery.iterations_lost or 0)
            stages = recovery.seconds.to_dict() | {"total": recovery.total}
            for stage, seconds in stages.items():
                self._recovery_seconds.labels(*key, stage).observe(seconds)

    def forget(self, key: RunKey) -> None:
        """The run is gone."""
        self._accounts.pop(key, None)
        of_run = dict(zip(LABELS, key, strict=True))
        self._recoveries.remove_by_labels(of_run)
        self._recovery_seconds.remove_by_labels(of_run)
        self._iterations_lost.remove_by_labels(of_run)

    def collect(self) -> Iterator[Metric]:
        seconds = CounterMetricFamily(
            "starcoder_run_seconds",
            "Seconds of the run's life by what they went into, up to status.goodput.asOf.",
            labels=[*LABELS, "bucket"],
        )
        ratio = GaugeMetricFamily(
            "starcoder_run_goodput_ratio",
            "Share of the run's life, but for suspended time, in which iterations were done for the first time.",
            labels=LABELS,
        )
        for key, account in list(self._accounts.items()):
            for bucket, value in account.seconds.items():
                seconds.add_metric([*key, bucket], value)
            if account.ratio is not None:
                ratio.add_metric(key, account.ratio)
        yield seconds
        yield ratio
