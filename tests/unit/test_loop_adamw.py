"""Our AdamW against torch's."""

from __future__ import annotations

import pytest
import torch

from starcoder_trainer.optimizer import AdamW


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_its_updates_are_those_of_torch(decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.full((n,), 0.5)) for n in (5, 7)] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    mine, reference = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)  # type: ignore[arg-type]
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_steps_are_counted_in_the_group_and_can_be_set() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer.param_groups[0]["step"] = 41
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 42
    assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq"}
