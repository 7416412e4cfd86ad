"""Attention: which kernel is chosen, and that the portable one computes what it should."""

from __future__ import annotations

import math

import pytest
import torch

from starcoder_trainer.failures import ConfigurationError
from starcoder_trainer.model.attention import CoreAttention, Demands, choose, kernel

H100 = Demands(cuda_capability=(9, 0), half_precision=True, dropout=False)
CPU = Demands(cuda_capability=None, half_precision=False, dropout=True)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`[b, s, h, d]` in float64, one head at a time."""
    q, k, v = q.double(), k.double(), v.double()
    s, share = q.shape[1], q.shape[2] // k.shape[2]
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    heads = []
    for h in range(q.shape[2]):
        scores = q[:, :, h] @ k[:, :, h // share].transpose(1, 2) / math.sqrt(q.shape[3])
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, h // share])
    return torch.stack(heads, 2)


@pytest.mark.parametrize("groups", [1, 2, 6], ids=["multi-query", "grouped-query", "multi-head"])
def test_sdpa_and_its_gradients_equal_a_float64_reference(groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 37, h, 8, requires_grad=True) for h in (6, groups, groups))
    weight = torch.randn(2, 37, 6, 8)
    found, expected = kernel("sdpa")(q, k, v, 0.0), reference(q, k, v)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)
    got = torch.autograd.grad((found * weight).sum(), (q, k, v))
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=1e-4)


def test_a_position_sees_nothing_after_itself() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, h, 4) for h in (2, 1, 1))
    before = kernel("sdpa")(q, k, v, 0.0)
    k[:, 5:] += 1.0
    v[:, 5:] -= 1.0
    after = kernel("sdpa")(q, k, v, 0.0)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


class _Settings:
    attention_dropout = 0.0
    sequence_parallel = False


def test_core_attention_speaks_megatrons_layout() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(11, 2, h, 4) for h in (3, 1, 1))
    out = CoreAttention(_Settings(), backend="sdpa", layer_number=1)(q, k, v, None)
    assert out.shape == (11, 2, 12)
    expected = reference(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1).reshape(11, 2, 12)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)


def test_core_attention_refuses_a_mask_instead_of_ignoring_it() -> None:
    x = torch.zeros(2, 1, 1, 4)
    with pytest.raises(ValueError, match="expected None"):
        CoreAttention(_Settings(), backend="sdpa")(x, x, x, torch.zeros(1))


def test_auto_falls_back_to_sdpa_and_says_why_for_each() -> None:
    backend, why = choose("auto", CPU)
    assert backend == "sdpa"
    assert all(f"flash-attn-{n}: no CUDA device" in why for n in (2, 3, 4))


@pytest.mark.parametrize("asked", ["flash-attn-2", "flash-attn-3", "flash-attn-4"])
def test_what_was_asked_for_and_is_absent_is_an_error_that_says_what_to_do(asked: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{asked} was asked for and can't be used .*no CUDA device.*choose auto"
    ):
        choose(asked, CPU)


@pytest.mark.parametrize(
    ("asked", "needs", "reason"),
    [
        ("flash-attn-3", Demands((8, 0), True, False), "no kernel for compute capability 8.0"),
        ("flash-attn-2", Demands((9, 0), False, False), "needs bf16"),
        ("flash-attn-4", Demands((9, 0), True, True), "has no dropout"),
    ],
)
def test_a_kernel_that_lacks_what_is_needed_is_not_used(asked: str, needs: Demands, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        choose(asked, needs)


def test_sdpa_can_be_asked_for_where_others_could_be_used() -> None:
    assert choose("sdpa", H100) == ("sdpa", "asked for")
