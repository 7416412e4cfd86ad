"""The demo where no cluster can be: the same spec by `starcoder-trainer local`, on the same data."""

from __future__ import annotations

import sys
import sysconfig

from starcoder_trainer import __main__ as trainer
from starcoder_trainer.local import cache_dir

from .paths import RUN_FILE


def train_embedded() -> int:
    """Exit code of the command that failed, or 0."""
    folder = cache_dir() / "demo"
    corpus, checkpoints = folder / "corpus", folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    print("starcoder-trainer prepare: the Python standard library", file=sys.stderr)
    code = trainer.main([
        "prepare", f"--input={sysconfig.get_path('stdlib')}", "--include=*.py", f"--output={corpus}",
        "--vocab-size=2048", "--reponame=python/cpython",
    ])  # fmt: skip
    if code:
        return code
    uri = corpus.as_uri()
    return trainer.main([
        "local", str(RUN_FILE), "--workers", "4",
        "--set", f"spec.data.tokenizer={uri}/tokenizer.json",
        "--set", f"spec.data.sources=[{{uri: '{uri}', weight: 1.0}}]",
        "--set", f"spec.checkpoint.uri={checkpoints.as_uri()}",
    ])  # fmt: skip
