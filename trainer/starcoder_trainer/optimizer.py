"""AdamW under megatron's distributed optimizer, and the learning rate as a pure function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from starcoder_trainer.contract.config import OptimizerConfig, TrainingConfig

from .model.cpu import cuda_literals


def learning_rate(config: OptimizerConfig, iterations: int, iteration: int) -> float:
    """Of the update that makes `iteration` (1-based): linear warm-up to `lr`, then a cosine that ends at `min_lr`."""
    warmup = min(config.warmup_iterations, iterations)
    if iteration <= warmup:
        return config.lr * iteration / warmup
    progress = min(1.0, (iteration - warmup) / max(1, iterations - warmup))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * progress))


class AdamW(torch.optim.Optimizer):
    """AdamW that counts its steps in the parameter group, as FusedAdam of Transformer Engine and apex does.

    torch's own keeps a step tensor for each parameter, which megatron's distributed optimizer can't restore.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **_fused: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1.0 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(1.0 - beta2 ** group["step"]))
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1.0 - beta1 ** group["step"]))


class Optimizer:
    """The distributed optimizer of one rank: fp32 masters and moments of its share of the parameters."""

    def __init__(self, config: TrainingConfig, model: Any) -> None:
        """`model` is megatron's DistributedDataParallel around this rank's part."""
        self._schedule = config.training.optimizer
        self._iterations = config.training.iterations
        self._model = model
        with cuda_literals():
            self._megatron = _build(config, model)
            for part in self.parts:
                part.init_state_fn(part.optimizer, part.config)

    @property
    def parts(self) -> list[Any]:
        """megatron's DistributedOptimizers: one for this model, which has no experts."""
        return list(getattr(self._megatron, "chained_optimizers", [self._megatron]))

    @property
    def megatron(self) -> Any:
        return self._megatron

    def zero_grad(self) -> None:
        self._model.zero_grad_buffer()
        self._megatron.zero_grad()

    def step(self, iteration: int) -> tuple[float, float]:
        """The update that makes `iteration` (1-based). Returns learning rate and gradient norm before clipping."""
        rate = learning_rate(self._schedule, self._iterations, iteration)
        for part in self.parts:
            for group in part.optimizer.param_groups:
                # Megatron marks biases and gains of norms with a multiplier of 0, and leaves it to us to heed it.
                group["lr"], group["weight_decay"] = rate, self._schedule.weight_decay * group["wd_mult"]
        with cuda_literals():
            _, norm, _ = self._megatron.step()
        return rate, float(norm if norm is not None else math.nan)

    @property
    def steps(self) -> int:
        """Updates done, as the bias correction counts them."""
        return max((g.get("step", 0) for part in self.parts for g in part.optimizer.param_groups), default=0)

    @steps.setter
    def steps(self, value: int) -> None:
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["step"] = value

    def publish_masters(self) -> None:
        """Copy the fp32 masters to the model's parameters and gather them over data ranks."""
        with cuda_literals():
            for part in self.parts:
                part._copy_main_params_to_model_params()
            self._model.start_param_sync(force_sync=True)


def _build(config: TrainingConfig, model: Any) -> Any:
    import megatron.core.optimizer as megatron

    if megatron.USING_PYTORCH_OPTIMIZER:  # neither Transformer Engine nor apex is there
        megatron.Adam = AdamW
        megatron.USING_PYTORCH_OPTIMIZER = False
    settings = config.training.optimizer
    bf16 = config.training.precision == "bf16"
    return megatron.get_megatron_optimizer(
        megatron.OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        ),
        [model],
        use_gloo_process_groups=False,
    )
