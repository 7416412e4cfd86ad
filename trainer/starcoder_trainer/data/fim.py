"""Fill-in-the-middle (Bavarian et al., 2022) as StarCoder was trained: online, on each document of a packed sample.

A document, or the part of it that a window holds, is cut at two uniform places into prefix, middle and suffix:
PSM `<fim_prefix>prefix<fim_suffix>suffix<fim_middle>middle`, SPM `<fim_prefix><fim_suffix>suffix<fim_middle>prefix
middle`. Cuts are between characters, so that a model learns to go on within what would be one token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from starcoder_trainer.contract.config import FimConfig

from .draws import Uniform
from .special_tokens import END_OF_TEXT, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from .tokenizer import CodeTokenizer, Fragment

Tokens = np.ndarray[Any, np.dtype[np.int64]]


def fill_in_the_middle(tokens: Tokens, fim: FimConfig, tokenizer: CodeTokenizer, uniform: Uniform) -> Tokens:
    """`tokens` `[n]` with `fim.rate` of its documents rearranged; `[m]`, usually a little longer."""
    end = tokenizer.id(END_OF_TEXT)
    written: list[str | int | Tokens] = []
    changed = False
    for document in np.split(tokens, np.flatnonzero(tokens == end) + 1):
        closed = document.size > 0 and document[-1] == end
        body = document[:-1] if closed else document
        if body.size and uniform() < fim.rate:
            written += _rearranged(tokenizer.decode(body.tolist()), fim.spm_rate, tokenizer, uniform)
            changed = True
        else:
            written.append(body)
        if closed:
            written.append(end)
    return _tokenized(written, tokenizer) if changed else tokens


def _rearranged(fragment: Fragment, spm_rate: float, tokenizer: CodeTokenizer, uniform: Uniform) -> Fragment:
    length = sum(_length(atom) for atom in fragment)
    first, second = sorted(int(uniform() * (length + 1)) for _ in range(2))
    start, middle, end = (_cut(fragment, *bounds) for bounds in ((0, first), (first, second), (second, length)))
    prefix_id, middle_id, suffix_id = (tokenizer.id(t) for t in (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX))
    if uniform() < spm_rate:
        return [prefix_id, suffix_id, *end, middle_id, *start, *middle]
    return [prefix_id, *start, suffix_id, *end, middle_id, *middle]


def _length(atom: str | int) -> int:
    return len(atom) if isinstance(atom, str) else 1


def _cut(fragment: Fragment, start: int, stop: int) -> Fragment:
    """Characters [start, stop)."""
    piece: Fragment = []
    for atom in fragment:
        length = _length(atom)
        if start < length and stop > 0 and start < stop:
            piece.append(atom[max(start, 0) : stop] if isinstance(atom, str) else atom)
        start, stop = start - length, stop - length
    return piece


def _tokenized(written: list[str | int | Tokens], tokenizer: CodeTokenizer) -> Tokens:
    """All texts at once: a call of the tokenizer costs more than a short text."""
    encoded = iter(tokenizer.encode([part for part in written if isinstance(part, str)]))
    parts = [np.asarray(next(encoded) if isinstance(p, str) else p, dtype=np.int64).reshape(-1) for p in written]
    return np.concatenate(parts)
