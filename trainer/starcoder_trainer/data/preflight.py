"""Whether a run's tokenizer, data and model belong together: asked by the leader's agent before an attempt is spent.

Neither numpy nor the tokenizers library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable

from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.storage.open import split_uri
from starcoder_trainer.storage.store import ObjectStore

from .source import Corpus, inspect
from .special_tokens import FOR_FIM
from .vocabulary import Vocabulary, fetch_vocabulary, require_fits, require_tokens


def check(config: TrainingConfig, open_store: Callable[[str], ObjectStore]) -> None:
    """Raises:
    DataError: what is wrong first, in the order of model, tokenizer, then the sources as listed.
    StorageError: the store can't be asked, credentials or bucket are missing.
    """
    examine(config, open_store)


def examine(config: TrainingConfig, open_store: Callable[[str], ObjectStore]) -> tuple[Vocabulary, tuple[Corpus, ...]]:
    """As `check`; what was found, the corpora in the order of `data.sources`."""
    data = config.data
    folder, _ = split_uri(data.tokenizer)
    vocabulary = fetch_vocabulary(data.tokenizer, open_store(folder))
    require_fits(vocabulary, config.model.vocab_size)
    if data.fim.rate > 0:
        require_tokens(
            vocabulary, FOR_FIM, "fill-in-the-middle needs; set data.fim.rate to 0 or use a tokenizer that has them"
        )
    corpora = tuple(inspect(open_store(source.uri), vocabulary, data.sequence_length) for source in data.sources)
    return vocabulary, corpora
