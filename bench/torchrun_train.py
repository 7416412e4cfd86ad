"""The trainer's model, data, loop and checkpoint format under plain torchrun: no agent, no operator.

Runs in the trainer image or beside it as `python -m torch.distributed.run … torchrun_train.py CONFIG [UNTIL BESIDE]`,
where CONFIG is a file with the run's `TrainingConfig` as JSON. UNTIL is the iteration after which it saves for the last
time, for less than the configuration's, and BESIDE the number of those that it trains after that. Every start claims
the ledger for the second it starts in, and resumes from the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from starcoder_trainer import preload

    assert preload
    import torch.distributed as dist

    from starcoder_trainer.agent.ledger import Claimed, Ledger, reference
    from starcoder_trainer.assemble import assemble
    from starcoder_trainer.checkpoint.index import read_index
    from starcoder_trainer.checkpoint.load import load
    from starcoder_trainer.contract import names
    from starcoder_trainer.contract.assignment import CheckpointRef, Layout
    from starcoder_trainer.contract.config import TrainingConfig
    from starcoder_trainer.data.dataset import open_dataset
    from starcoder_trainer.loop import StepDone, Training, train
    from starcoder_trainer.model import cpu
    from starcoder_trainer.process_group import form_model_parallel
    from starcoder_trainer.storage.open import open_store
    from starcoder_trainer.worker import ENV_CREDENTIALS_DIR

    config = TrainingConfig.from_json(Path(sys.argv[1]).read_text())
    until, beside = map(int, sys.argv[2:]) if len(sys.argv) > 2 else (config.training.iterations, 0)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    scratch = Path(os.environ["TMPDIR"])
    cpu.prepare()
    dist.init_process_group("gloo")
    tensor, pipeline = config.parallelism.tensor, config.parallelism.pipeline
    layout = Layout(tensor, pipeline, world // (tensor * pipeline), config.parallelism.sequence)
    form_model_parallel(layout)

    def open_uri(uri: str) -> Any:
        return open_store(uri, config.storage, Path(os.environ.get(ENV_CREDENTIALS_DIR, names.CREDENTIALS_DIR)))

    store = open_uri(config.checkpoint.uri)
    ledger, attempt, checkpoint = None, int(time.time()), None
    if rank == 0:
        ledger = Ledger(store, config.run, f"torchrun-{attempt}", config.checkpoint.keep_last)
        claimed = ledger.claim(attempt, "Own")
        assert isinstance(claimed, Claimed), claimed
        entry = ledger.choose(claimed.head).entry
        checkpoint = reference(entry) if entry else None
    told: list[Any] = [attempt, checkpoint]
    dist.broadcast_object_list(told, src=0)
    attempt, checkpoint = told[0], told[1]
    assert checkpoint is None or isinstance(checkpoint, CheckpointRef)

    model, optimizer = assemble(config, fresh=checkpoint is None)
    position = None
    if checkpoint is not None:
        index = read_index(store, checkpoint)
        position = load(config, model, optimizer, store, checkpoint, index=index, scratch=scratch)
    training = Training(
        config,
        model,
        optimizer,
        open_dataset(config, open_uri, scratch / "data"),
        position.iteration if position else 0,
    )
    logging.info("iteration %d of %d; torchrun", training.iteration, config.training.iterations)

    def on_step(done: StepDone) -> None:
        if int(os.environ["LOCAL_RANK"]) == 0:
            logging.info("iteration %d/%d | loss %r |", done.iteration, config.training.iterations, done.loss)

    def save(_last: bool) -> None:
        """Blocking, as a script of one's own does it: write, upload, wait for each other, list it."""
        _upload(_write(training, layout, attempt, rank, scratch), store, rank, world)
        dist.barrier()
        if ledger is not None:
            ledger.commit(attempt, training.iteration)
        dist.barrier()

    train(training, on_step, save, lambda: training.iteration >= until)
    if beside:
        train(training, on_step, lambda _last: None, lambda: training.iteration >= until + beside)
    dist.barrier()


def _write(training: Any, layout: Any, attempt: int, rank: int, scratch: Path) -> Any:
    from starcoder_trainer.checkpoint.write import write
    from starcoder_trainer.contract.worker import Saved

    directory, size = write(training, layout, attempt=attempt, rank=rank, scratch=scratch)
    return Saved(attempt, rank, training.iteration, str(directory), 0.0, size)


def _upload(saved: Any, store: Any, rank: int, world: int) -> None:
    from starcoder_trainer.agent.messages import Upload
    from starcoder_trainer.agent.upload import delete_local, upload_shard

    job = Upload(saved.attempt, saved.step, world, (saved,))
    upload_shard(store, rank, job)
    delete_local(job)


if __name__ == "__main__":
    main()
