"""Which samples of a global batch a data rank takes. Pure: an iteration has the same samples whatever the layout."""

from __future__ import annotations

from starcoder_trainer.failures import ConfigurationError


def micro_batches(
    iteration: int, global_batch: int, micro_batch: int, data_rank: int, data_ranks: int
) -> tuple[range, ...]:
    """Global sample indices of this rank's micro-batches in `iteration` (0-based), in order.

    The iteration's samples are [iteration x global_batch, ...); they are cut into micro-batches, and each rank gets a
    contiguous run of them: the first (number modulo ranks) ranks one more than the others, never none.

    Raises:
        ConfigurationError: the global batch is not a multiple of the micro-batch, or has fewer than one for each rank.
    """
    count, rest = divmod(global_batch, micro_batch)
    if rest or count < data_ranks:
        raise ConfigurationError(
            f"training.globalBatchSize is {global_batch}, expected a multiple of microBatchSize ({micro_batch}) and at "
            f"least microBatchSize x data-parallel ranks ({micro_batch * data_ranks})"
        )
    floor, more = divmod(count, data_ranks)
    first = data_rank * floor + min(data_rank, more)
    start = iteration * global_batch + first * micro_batch
    own = floor + (1 if data_rank < more else 0)
    return tuple(range(start + i * micro_batch, start + (i + 1) * micro_batch) for i in range(own))
