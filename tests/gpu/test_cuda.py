"""On a CUDA device: `pytest -m gpu tests/gpu`. What the CPU's tests can't show: kernels, NCCL, forks before CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

from starcoder_trainer.contract.assignment import Layout
from starcoder_trainer.contract.worker import Exited, Ready, Start, Step
from starcoder_trainer.model.attention import Backend, choose, demands, kernel
from tests.support.forkserver import connect, fork_server
from tests.support.trainer import ONE, commit, listen, make_config, resume, run_ranks, steps, store_uri, train_and_save

pytestmark = pytest.mark.gpu

FLASH: tuple[Backend, ...] = ("flash-attn-4", "flash-attn-3", "flash-attn-2")


def usable(backend: Backend) -> bool:
    return choose(backend, demands(True, 0.0))[0] == backend


def test_each_flash_attention_that_is_installed_agrees_with_sdpa_in_fp32() -> None:
    found = []
    for backend in FLASH:
        with contextlib.suppress(ValueError):  # not installed, or not for this device
            assert usable(backend)
            found.append(backend)
    print("flash attention here:", ", ".join(found) or "none")
    for backend in (*found, "sdpa"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 512, heads, 128, device="cuda", requires_grad=True) for heads in (16, 1, 1))
        weight = torch.randn_like(q)
        expected = kernel("sdpa")(q, k, v, 0.0)
        wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
        out = kernel(backend)(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0)
        got = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
        torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).norm() < 2e-2 * b.norm(), backend


def test_bf16_trains_on_the_device_and_its_utilisation_is_known_where_its_peak_is() -> None:
    config = make_config(iterations=10, global_batch=8, precision="bf16", hidden_size=256, sequence_length=256)
    done = run_ranks(ONE, steps, config)[0]
    assert done[-1].loss < done[0].loss - 0.1
    assert all(0 < d.seconds["forward_backward"] <= d.seconds["total"] for d in done)


def test_a_resumed_run_follows_the_undisturbed_one(tmp_path: Path) -> None:
    config = make_config(iterations=8, global_batch=8, every_iterations=4, precision="bf16", dropout=0.1)
    losses = run_ranks(ONE, train_and_save, config, ONE, tmp_path)[0]
    again = run_ranks(ONE, resume, config, ONE, tmp_path, commit(tmp_path, 1, 4, 1))[0]
    assert again == pytest.approx(losses[4:], abs=1e-3, rel=0)


@pytest.mark.parametrize(
    "layout", [Layout(1, 1, 2), Layout(2, 1, 1, sequence=True), Layout(1, 2, 1)], ids=["data", "tensor", "pipeline"]
)
def test_two_devices_train_as_one(layout: Layout) -> None:
    if torch.cuda.device_count() < layout.world_size:
        pytest.fail(f"found {torch.cuda.device_count()} CUDA devices, expected {layout.world_size}; deselect this test")
    settings = {"iterations": 5, "global_batch": 8}
    alone = run_ranks(ONE, steps, make_config(**settings))[0]  # type: ignore[arg-type]
    both = run_ranks(layout, steps, make_config(layout, **settings))[0]  # type: ignore[arg-type]
    assert [d.loss for d in both] == pytest.approx([d.loss for d in alone], abs=1e-4, rel=0)


def test_a_warm_fork_uses_cuda_and_the_server_never_does(tmp_path: Path) -> None:
    path, log = tmp_path / "worker.sock", tmp_path / "log"
    config = dataclasses.replace(make_config(ONE, iterations=2, checkpoint_uri=store_uri(tmp_path)))
    with fork_server(path, log) as process, contextlib.closing(connect(path, process)) as agent:
        assert isinstance(agent.receive(), Ready)
        for attempt in (1, 2):
            with listen() as listener:
                address, port = listener.getsockname()
                start = Start(attempt, (0,), ONE, address, port, None, config.to_dict(), str(tmp_path), address)
                agent.send(start, listener)
            assert agent.until(Step).iteration == 1
            assert agent.until(Exited) == Exited(attempt, 0, 0)
    assert b"spawned, not forked" not in log.read_bytes(), "CUDA was initialised before the fork"
