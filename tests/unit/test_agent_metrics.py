"""What a Pod's `/metrics` says, scraped as Prometheus scrapes it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from starcoder_trainer.agent.metrics import Metrics
from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.report import Report, Verified
from starcoder_trainer.contract.worker import Saved, Started, Step
from tests.support.trainer import listen

SECONDS = {"data": 0.01, "forward_backward": 0.5, "optimizer": 0.1, "total": 0.7}
STEP = Step(3, 0, 40, 320, 81920, 2.5, 1e-3, 0.75, 4000.0, SECONDS, 0.41)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("demo", "1.2.3")


@pytest.fixture
def port(metrics: Metrics) -> Iterator[int]:
    with listen() as probe:
        port: int = probe.getsockname()[1]
    stop = metrics.serve(port, "127.0.0.1")
    yield port
    stop()


def scrape(port: int) -> dict[str, float]:
    """`name` or `name{label}`, of metrics with one label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [s for family in families for s in family.samples]
    return {s.name + "".join(f"{{{v}}}" for v in s.labels.values()): s.value for s in samples}


def test_a_step_is_told_with_rates_loss_and_seconds_by_phase(metrics: Metrics, port: int) -> None:
    metrics.started(Started(3, 0, 0, "flash-attn-3"))
    metrics.stepped(STEP, world_size=4)
    found = scrape(port)
    assert found["starcoder_tokens_per_second"] == 4000
    assert found["starcoder_tokens_per_second_per_gpu"] == 1000
    assert found["starcoder_iteration"] == 40
    assert found["starcoder_loss"] == 2.5
    assert found["starcoder_learning_rate"] == 1e-3
    assert found["starcoder_gradient_norm"] == 0.75
    assert found["starcoder_consumed_tokens"] == 81920
    assert found["starcoder_model_flops_utilisation_ratio"] == 0.41
    assert {k: v for k, v in found.items() if k.startswith("starcoder_step_seconds")} == {
        f"starcoder_step_seconds{{{phase}}}": seconds for phase, seconds in SECONDS.items()
    }
    assert found["starcoder_attention_backend{flash-attn-3}"] == 1


def test_a_checkpoints_seconds_are_of_the_slowest_local_rank_and_its_bytes_of_all(metrics: Metrics, port: int) -> None:
    for step in (20, 40):
        metrics.saved(Saved(3, 0, step, "/x", 1.5, 100))
        metrics.saved(Saved(3, 1, step, "/x", 0.5, 120))
        metrics.uploaded(4.0, 220)
    metrics.reported(
        Report("boot", "pod", 0, "node", 3, "training", verified=Verified(CheckpointRef(3, 40, "d"), "s3://c", "now"))
    )
    found = scrape(port)
    assert found["starcoder_checkpoint_save_seconds"] == 1.5
    assert found["starcoder_checkpoint_save_bytes"] == 220
    assert found["starcoder_checkpoint_upload_seconds"] == 4.0
    assert found["starcoder_checkpoint_uploaded_bytes_total"] == 440
    assert found["starcoder_checkpoint_verified_iteration"] == 40
    assert found["starcoder_attempt"] == 3
    assert {k for k, v in found.items() if k.startswith("starcoder_state") and v} == {"starcoder_state{training}"}


def test_a_new_attempt_with_another_attention_kernel_leaves_no_trace_of_the_old(metrics: Metrics, port: int) -> None:
    metrics.started(Started(3, 0, 0, "flash-attn-3"))
    metrics.started(Started(4, 0, 0, "sdpa"))
    found = scrape(port)
    assert [k for k in found if "attention" in k] == ["starcoder_attention_backend{sdpa}"]


def test_where_the_device_is_not_known_no_utilisation_is_claimed(metrics: Metrics, port: int) -> None:
    metrics.stepped(Step(3, 0, 40, 320, 81920, 2.5, 1e-3, 0.75, 4000.0, SECONDS), world_size=4)
    assert "starcoder_model_flops_utilisation_ratio" not in scrape(port)
