"""What the operator measures about itself, for `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from .run_metrics import RunMetrics

PREFIX = "starcoder_operator"


def operator_version() -> str:
    try:
        return version("starcoder-operator")
    except PackageNotFoundError:
        return "unknown"


class Metrics:
    """One registry an operator, so that tests can have many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.reconcile_seconds = Histogram(
            f"{PREFIX}_reconcile_seconds",
            "Duration of one pass over one run: observe, plan, act.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            f"{PREFIX}_reconcile_errors",
            "Passes that ended by an error, by its kind.",
            ["kind"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(f"{PREFIX}_queue_depth", "Runs waiting for a pass.", registry=self.registry)
        self.queue_age = Gauge(
            f"{PREFIX}_queue_oldest_seconds",
            "Seconds the longest waiting or longest handled run has been so.",
            registry=self.registry,
        )
        self.runs = Gauge(f"{PREFIX}_runs", "Runs by state.", ["state"], registry=self.registry)
        self.api_calls = Counter(
            f"{PREFIX}_api_calls",
            "Kubernetes API calls by verb and HTTP code; code 0: no answer.",
            ["verb", "code"],
            registry=self.registry,
        )
        self.actions = Counter(f"{PREFIX}_actions", "Actions carried out, by kind.", ["action"], registry=self.registry)
        self.leading = Gauge(f"{PREFIX}_leading", "1 while this replica leads.", registry=self.registry)
        self.of_runs = RunMetrics(self.registry)
        build = Info(f"{PREFIX}_build", "Version of the operator.", registry=self.registry)
        build.info({"version": operator_version()})

    def watch_queue(self, depth: Callable[[], float], oldest: Callable[[], float]) -> None:
        """Read depth and age [s] at each scrape."""
        self.queue_depth.set_function(depth)
        self.queue_age.set_function(oldest)

    def watch_runs(self, states: Iterable[str], count: Callable[[str], float]) -> None:
        """Read the number of runs in each state at each scrape."""
        for state in states:
            self.runs.labels(state).set_function(partial(count, state))

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
