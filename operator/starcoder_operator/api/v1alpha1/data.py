"""What the model is trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import ApiModel, Uri


class Source(ApiModel):
    """A tokenized corpus."""

    uri: Uri
    """Folder with the `.bin` and `.idx` files that `starcoder-trainer prepare` writes: s3://bucket/key."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, relative to the other sources' weights."""


class Fim(ApiModel):
    """Fill-in-the-middle."""

    rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of documents that are transformed."""
    spm_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of those, share written suffix first (SPM) instead of prefix first (PSM)."""


class Data(ApiModel):
    """Samples and their order. Immutable: the position in the data is a number of samples of exactly this."""

    tokenizer: Uri
    """tokenizer.json that the sources were tokenized with: s3://bucket/key."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1, max_length=64)]
    """Corpora and the mixture of them."""
    fim: Fim = Fim()
    sequence_length: Annotated[int, Field(ge=1, le=4194304)] | None = None
    """Length of a sample, tokens. Default: the model's maxSequenceLength."""
    seed: Annotated[int, Field(ge=0, le=2**53)] = 42
    """Of the order of samples, fill-in-the-middle, dropout and initial weights."""
