"""A small but complete training configuration, for tests that need one and train nothing."""

from __future__ import annotations

from dataclasses import replace

from starcoder_trainer.contract.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunIdentity,
    ScheduleConfig,
    SourceConfig,
    StorageConfig,
    TrainingConfig,
)

CONFIG = TrainingConfig(
    run=RunIdentity("demo", "training", "uid-1"),
    model=ModelConfig("starcoder-tiny", 2, 64, 256, 4, 1, 16, 512, 0.02, 0.0),
    data=DataConfig("s3://corpus/tokenizer.json", (SourceConfig("s3://corpus/code", 1.0),), 64, 42),
    training=ScheduleConfig(20, 4, 1, "fp32", OptimizerConfig(1e-3, 1e-4, 2, 0.9, 0.95, 1e-8, 0.1, 1.0)),
    parallelism=ParallelismConfig(1, 1),
    checkpoint=CheckpointConfig("s3://checkpoints/demo", 10, 3),
    storage=StorageConfig(),
)


def training_config(
    iterations: int = 20, checkpoint_uri: str = "s3://checkpoints/demo", endpoint: str = ""
) -> TrainingConfig:
    return replace(
        CONFIG,
        training=replace(CONFIG.training, iterations=iterations),
        checkpoint=replace(CONFIG.checkpoint, uri=checkpoint_uri),
        storage=replace(CONFIG.storage, endpoint=endpoint, path_style=bool(endpoint)),
    )
