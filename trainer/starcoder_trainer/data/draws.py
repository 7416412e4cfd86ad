"""Random numbers as a function of names: nobody's draws depend on what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import blake2b

Uniform = Callable[[], float]
"""Draws from [0, 1)."""


def uniform(purpose: str, seed: int, what: int | str) -> Uniform:
    """Python keeps the sequence of random() across its versions, which numpy does not promise."""
    digest = blake2b(f"{purpose}/{seed}/{what}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little")).random  # noqa: S311 - no secret
