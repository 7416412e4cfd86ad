"""The spec with every preset and default resolved, as agents and workers get it."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import PRESETS, StarCoderRunSpec
from starcoder_operator.api.v1alpha1.training import WARMUP_ITERATIONS
from starcoder_trainer.contract import config as contract


def sequence_length(spec: StarCoderRunSpec) -> int:
    """Tokens a sample: as said, else the longest the model allows."""
    return spec.data.sequence_length or spec.model.shape().max_sequence_length


def learning_rates(spec: StarCoderRunSpec) -> tuple[float, float]:
    """(peak, last): as said, else the preset's and a tenth of the peak."""
    optimizer = spec.training.optimizer
    peak = PRESETS[spec.model.preset].learning_rate if optimizer.lr is None else optimizer.lr
    return peak, peak / 10 if optimizer.min_lr is None else optimizer.min_lr


def warmup_iterations(spec: StarCoderRunSpec) -> int:
    """As said, else StarCoder's, else a tenth of a run that is shorter than ten times that."""
    said = spec.training.optimizer.warmup_iterations
    return min(WARMUP_ITERATIONS, spec.training.iterations // 10) if said is None else said


def training_config(name: str, namespace: str, uid: str, spec: StarCoderRunSpec) -> contract.TrainingConfig:
    """Configuration of run `namespace/name`; `uid` is what tells it from an earlier run of that name."""
    shape, training, optimizer = spec.model.shape(), spec.training, spec.training.optimizer
    lr, min_lr = learning_rates(spec)
    return contract.TrainingConfig(
        run=contract.RunIdentity(name=name, namespace=namespace, uid=uid),
        model=contract.ModelConfig(
            preset=spec.model.preset,
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            attention_heads=shape.attention_heads,
            query_groups=shape.query_groups,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            init_std=shape.init_std,
            dropout=shape.dropout,
            max_sequence_length=shape.max_sequence_length,
        ),
        data=contract.DataConfig(
            tokenizer=spec.data.tokenizer,
            sources=tuple(contract.SourceConfig(uri=s.uri, weight=s.weight) for s in spec.data.sources),
            sequence_length=sequence_length(spec),
            seed=spec.data.seed,
            fim=contract.FimConfig(rate=spec.data.fim.rate, spm_rate=spec.data.fim.spm_rate),
        ),
        training=contract.ScheduleConfig(
            iterations=training.iterations,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            precision=training.precision,
            optimizer=contract.OptimizerConfig(
                lr=lr,
                min_lr=min_lr,
                warmup_iterations=warmup_iterations(spec),
                beta1=optimizer.beta1,
                beta2=optimizer.beta2,
                epsilon=optimizer.epsilon,
                weight_decay=optimizer.weight_decay,
                clip_grad=optimizer.clip_grad,
            ),
            attention_backend=training.attention_backend,
            log_every_iterations=training.log_every_iterations,
        ),
        parallelism=contract.ParallelismConfig(
            tensor=spec.parallelism.tensor, pipeline=spec.parallelism.pipeline, sequence=spec.parallelism.sequence
        ),
        checkpoint=contract.CheckpointConfig(
            uri=spec.checkpoint.uri,
            every_iterations=spec.checkpoint.every_iterations,
            keep_last=spec.checkpoint.keep_last,
            resume=spec.checkpoint.resume,
        ),
        storage=contract.StorageConfig(
            endpoint=spec.storage.endpoint,
            region=spec.storage.region,
            path_style=spec.storage.path_style,
            ca_bundle=spec.storage.ca_bundle,
        ),
        hang=contract.HangConfig(
            iteration=float(spec.failure_policy.hang.iteration.seconds),
            first_iteration=float(spec.failure_policy.hang.first_iteration.seconds),
            checkpoint=float(spec.failure_policy.hang.checkpoint.seconds),
        ),
    )
