"""Which window of which source is sample i. Pure, without state: a position in the data is one number.

Samples are dealt to the sources by their weights, one after another: with p the first source's share, floor(n x p) of
the first n samples are its own, exactly, in whole numbers; the others are dealt to the remaining sources in the same
way. So after n samples each source has had n x weight of them, but for fewer than there are sources, for every n.
Within a source its k-th sample is window k mod windows of epoch k div windows, through that epoch's permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

from .permutation import Permutation


@dataclass(frozen=True)
class Place:
    source: int
    epoch: int
    window: int


class Order:
    def __init__(self, weights: Sequence[float], windows: Sequence[int], seed: int) -> None:
        """`weights` and `windows` of each source; weights need not add up to anything."""
        # repr: 0.1 is a tenth, as the user wrote it, not the nearest binary fraction.
        exact = [Fraction(repr(w)) for w in weights]
        self._shares = [w / sum(exact[n:]) for n, w in enumerate(exact)]
        self._windows = tuple(windows)
        self._seed = seed
        self._permutation = lru_cache(maxsize=2 * len(exact))(self._new_permutation)

    def place(self, i: int) -> Place:
        source, k = self.deal(i)
        epoch, position = divmod(k, self._windows[source])
        return Place(source, epoch, self._permutation(source, epoch)(position))

    def deal(self, i: int) -> tuple[int, int]:
        """(source of sample i, how many samples before i were that source's)."""
        for source, share in enumerate(self._shares):
            before, after = (n * share.numerator // share.denominator for n in (i, i + 1))
            if after > before:
                return source, before
            i -= before
        raise AssertionError("the last share is 1")

    def _new_permutation(self, source: int, epoch: int) -> Permutation:
        key = blake2b(f"order/{self._seed}/{source}/{epoch}".encode(), digest_size=32).digest()
        return Permutation(self._windows[source], key)
