"""What can be wrong with data. The message of each says what was found, what was expected and what to do."""

from __future__ import annotations

from typing import ClassVar

from starcoder_trainer.contract.report import ProblemReason
from starcoder_trainer.failures import ConfigurationError


class DataError(Exception):
    """Tokenizer or data are not what the run says."""

    reason: ClassVar[ProblemReason]


class DataNotFound(DataError):
    """Nothing is there. Raised from the store's NotFound, so that in a worker, where the leader's look at the data
    found it shortly before, it counts as the store's failure."""

    reason = "DataNotFound"


class DataInvalid(DataError, ConfigurationError):
    """It is there and can't be used: broken, of another format, or too little."""

    reason = "DataInvalid"


class TokenizerMismatch(DataError, ConfigurationError):
    """Tokenizer, data and model don't belong together."""

    reason = "TokenizerMismatch"
