"""How StarCoder writes a source file: `<reponame>R<filename>P<gh_stars>B`, newline, code.

Each of the three is there independently with probability 0.2, so that a model can use them and do without; the newline
only where one is.
"""

from __future__ import annotations

from dataclasses import dataclass

from .draws import uniform
from .special_tokens import FILENAME, GH_STARS, REPONAME
from .tokenizer import CodeTokenizer, Fragment

RATE = 0.2
_BUCKETS = ((0, "0"), (10, "1-10"), (100, "10-100"), (1000, "100-1000"))


@dataclass(frozen=True)
class Repository:
    name: str
    stars: int | None = None
    """On GitHub; None: not known, never written."""


def as_document(text: str, path: str, repository: Repository, seed: int, tokenizer: CodeTokenizer) -> Fragment:
    """`path`: below the repository, with slashes. The same file, path and seed make the same document."""
    draw = uniform("format", seed, path)
    stars = None if repository.stars is None else star_bucket(repository.stars)
    fragment: Fragment = []
    for token, value in ((REPONAME, repository.name), (FILENAME, path), (GH_STARS, stars)):
        if draw() < RATE and value is not None:
            fragment += [tokenizer.id(token), value]
    return [*fragment, "\n" + text] if fragment else [text]


def star_bucket(stars: int) -> str:
    return next((name for most, name in _BUCKETS if stars <= most), "1000+")
