"""A keyed permutation of range(n), evaluated at one point: the order of an epoch without an index to build or keep.

A Feistel network over pairs (left, right) with left < a, right < b and a x b just above n; results beyond n are walked
on until one falls below (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

from hashlib import blake2b
from math import isqrt

_ROUNDS = 8


class Permutation:
    def __init__(self, size: int, key: bytes) -> None:
        """`key`: at most 64 bytes; another key is another order."""
        self.size = size
        self._key = key
        self._left = isqrt(size - 1) + 1 if size > 1 else 1
        self._right = -(-size // self._left)

    def __call__(self, i: int) -> int:
        """Where `i` goes; each of range(size) is the image of exactly one."""
        assert 0 <= i < self.size
        while True:
            i = self._once(i)
            if i < self.size:
                return i

    def _once(self, i: int) -> int:
        left, right = divmod(i, self._right)
        for round_number in range(0, _ROUNDS, 2):
            left = (left + self._mix(round_number, right)) % self._left
            right = (right + self._mix(round_number + 1, left)) % self._right
        return left * self._right + right

    def _mix(self, round_number: int, value: int) -> int:
        """64 bits: their remainder is biased by less than 2**-32 below 2**64 windows."""
        data = round_number.to_bytes(1, "little") + value.to_bytes(8, "little")
        return int.from_bytes(blake2b(data, digest_size=8, key=self._key).digest(), "little")
