"""`starcoder-trainer prepare`: source files to a tokenizer and token files that a run trains on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.storage.file import FileStore
from starcoder_trainer.storage.open import open_store, split_uri
from starcoder_trainer.storage.store import ObjectStore, StorageError

from .code_format import Repository
from .encoding import Encoding, encode_files
from .errors import DataError
from .index import dtype_for
from .prepare_progress import View, view
from .prepared import FORMAT, PREPARED, TOKENIZER, Prepared
from .publish import is_published, publish
from .source_files import MAX_FILE_BYTES, Selection, Skipped, SourceFile, find_files
from .special_tokens import END_OF_TEXT, FILENAME, GH_STARS, REPONAME
from .token_file import TokenFileWriter
from .tokenizer_training import LEAST_VOCABULARY, TrainingDied, train_on_files
from .vocabulary import Vocabulary, fetch_vocabulary, read_vocabulary, require_tokens

VOCABULARY = 49152
"""StarCoder's."""
TRAINING_BYTES = 1 << 30
"""Of source files for the tokenizer: more of them hardly change it."""


class BadInput(Exception):
    """The command line or the source files give nothing to prepare."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; its argument is the signal's number."""


@dataclass(frozen=True)
class Recipe:
    """All that the result depends on, beside the files themselves."""

    root: Path
    selection: Selection
    repository: Repository
    seed: int
    vocab_size: int
    training_bytes: int
    """Of source files, at most, for the tokenizer."""


@dataclass
class Counts:
    """Gathered on the way."""

    files: int = 0
    """Taken; each is one document."""
    bytes: int = 0
    tokens: int = 0
    skipped: Counter[Skipped] = field(default_factory=Counter)
    training_seconds: float = 0.0
    encoding_seconds: float = 0.0


def prepare(
    recipe: Recipe,
    store: ObjectStore,
    workers: int,
    shown: View,
    *,
    given: Vocabulary | None = None,
    left_out: Path | None = None,
) -> tuple[Prepared, Counts, bool]:
    """What was made, what was counted, and whether the store had it already.

    Args:
        given: Tokenizer to use; None: one is trained on the files.
        left_out: Folder below the input that is not looked into.

    Raises:
        BadInput, DataError
        StorageError: nothing at the output is taken for data then.
        OSError: the temporary folder is full.
    """
    counts = Counts()
    files, counts.skipped = find_files(recipe.root, recipe.selection, recipe.seed, left_out)
    if not files:
        _nothing_found(recipe, counts.skipped)
    began = time.monotonic()
    vocabulary = given or _train(recipe, files, workers, shown)
    counts.training_seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory(prefix="starcoder-prepare-") as name:
        folder = Path(name)
        (folder / TOKENIZER).write_bytes(vocabulary.data)
        prepared = _write_tokens(recipe, files, vocabulary, workers, shown, folder, counts)
        if is_published(store, prepared):
            return prepared, counts, True
        shown.stage("uploading", sum(p.stat().st_size for p in folder.iterdir()))
        publish(store, folder, prepared, shown.advance)
    return prepared, counts, False


def _train(recipe: Recipe, files: Sequence[SourceFile], workers: int, shown: View) -> Vocabulary:
    sample: list[SourceFile] = []
    size = 0
    for file in files:  # shuffled, so any first part is a fair sample
        if size >= recipe.training_bytes:
            break
        sample.append(file)
        size += file.size
    shown.stage("training tokenizer", size)
    made = train_on_files(recipe.root, sample, recipe.vocab_size, workers, shown.advance)
    return read_vocabulary(made, TOKENIZER)


def _write_tokens(  # noqa: PLR0917
    recipe: Recipe,
    files: Sequence[SourceFile],
    vocabulary: Vocabulary,
    workers: int,
    shown: View,
    folder: Path,
    counts: Counts,
) -> Prepared:
    dtype = dtype_for(vocabulary.size)
    encoding = Encoding(recipe.root, vocabulary, recipe.repository, recipe.seed, dtype)
    shown.stage("encoding", sum(file.size for file in files))
    began = time.monotonic()
    with TokenFileWriter(folder, dtype) as writer:
        for encoded in encode_files(encoding, files, workers):
            writer.add(encoded.tokens, encoded.lengths)
            counts.bytes += encoded.bytes_taken
            counts.skipped += encoded.skipped
            shown.advance(encoded.bytes_seen)
        made = writer.finish()
    counts.encoding_seconds = time.monotonic() - began
    counts.files = made.documents
    counts.tokens = made.tokens
    if not made.documents:
        _nothing_found(recipe, counts.skipped)
    return Prepared(
        format=FORMAT,
        tokens=made.tokens,
        documents=made.documents,
        dtype=dtype,
        vocab_size=vocabulary.size,
        tokenizer_sha256=vocabulary.sha256,
        tokens_sha256=made.tokens_sha256,
        index_sha256=made.index_sha256,
        files=counts.files,
        bytes=counts.bytes,
        skipped={str(reason): n for reason, n in counts.skipped.items()},
        reponame=recipe.repository.name,
        seed=recipe.seed,
        tool_version=_version(),
    )


def _nothing_found(recipe: Recipe, skipped: Counter[Skipped]) -> NoReturn:
    raise BadInput(
        f"--input {recipe.root}: found no file to take{_reasons(skipped)}, expected UTF-8 text that matches "
        f"{' or '.join(f'--include={p}' for p in recipe.selection.include)}; correct the folder or the patterns"
    )


def _reasons(skipped: Counter[Skipped]) -> str:
    return f" (skipped: {', '.join(f'{n} {reason}' for reason, n in sorted(skipped.items()))})" if skipped else ""


def _version() -> str:
    try:
        return version("starcoder-operator")
    except PackageNotFoundError:
        return "unknown"


# The command


def main(argv: Sequence[str]) -> int:
    """Exit code; 128 + the signal's number where one ended it."""
    args = _parser().parse_args(argv)
    shown: View | None = None
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        began = time.monotonic()
        recipe, store, given, left_out = _read(args)
        if not isinstance(store, FileStore):
            next(store.list(PREPARED), None)  # what is wrong with bucket or credentials is told before the work
        shown = view()
        prepared, counts, was_there = prepare(recipe, store, args.workers, shown, given=given, left_out=left_out)
        shown.close()
        print(summary(prepared, counts, store.uri, was_there, time.monotonic() - began))
    except (BadInput, DataError, StorageError) as e:
        return _failed(str(e))
    except (BrokenProcessPool, TrainingDied) as e:
        return _failed(f"{e}; probably for want of memory: use fewer --workers, less --tokenizer-bytes or more memory")
    except OSError as e:
        return _failed(f"{e}; files are written to {tempfile.gettempdir()} first: free space there or set TMPDIR")
    except Interrupted as e:
        _failed("interrupted; nothing at the output is taken for data unless it was there before")
        return 128 + int(e.args[0])
    finally:
        if shown:
            shown.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def summary(prepared: Prepared, counts: Counts, uri: str, was_there: bool, seconds: float) -> str:
    """The exact counts, and what to write into a run."""
    rate = counts.tokens / counts.encoding_seconds if counts.encoding_seconds else 0.0
    return "\n".join(
        (
            f"{'there already, nothing to do' if was_there else 'prepared'}: {uri}",
            f"  files       {counts.files:,}{_reasons(counts.skipped)}",
            f"  bytes       {counts.bytes:,}",
            f"  tokens      {counts.tokens:,} ({prepared.dtype}), {counts.bytes / counts.tokens:.2f} bytes each",
            f"  vocabulary  {prepared.vocab_size:,}, SHA-256 {prepared.tokenizer_sha256}",
            f"  speed       {rate:,.0f} tokens/s",
            f"  wall time   {seconds:.1f} s (tokenizer {counts.training_seconds:.1f} s, "
            f"encoding {counts.encoding_seconds:.1f} s)",
            "in a StarCoderRun:",
            f"  data: {{tokenizer: {uri}/{TOKENIZER}, sources: [{{uri: {uri}}}]}}",
        )
    )


def _interrupt(number: int, _: object) -> NoReturn:
    raise Interrupted(number)


def _failed(message: str) -> int:
    print(f"starcoder-trainer prepare: {message}", file=sys.stderr)
    return 1


def _read(args: argparse.Namespace) -> tuple[Recipe, ObjectStore, Vocabulary | None, Path | None]:
    root = args.input.absolute()
    if not root.is_dir():
        raise BadInput(f"--input {args.input}: found no folder, expected one with source files")
    if args.workers < 1:
        raise BadInput(f"--workers {args.workers}: expected at least 1")
    if args.vocab_size is not None and args.tokenizer:
        raise BadInput("found both --tokenizer and --vocab-size; a tokenizer has a size already: leave one out")
    vocab_size = args.vocab_size or VOCABULARY
    if vocab_size < LEAST_VOCABULARY:
        raise BadInput(
            f"--vocab-size {vocab_size}: expected at least {LEAST_VOCABULARY}, the special tokens and one a byte"
        )
    try:
        bundle = args.ca_bundle.read_text() if args.ca_bundle else ""
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"--ca-bundle {args.ca_bundle}: {e}; expected certificates in PEM") from e
    storage = StorageConfig(args.endpoint, args.region, args.path_style, bundle)

    def opened(uri: str) -> ObjectStore:
        return open_store(uri, storage, args.credentials_dir, allow_file=True)

    repository = Repository(args.reponame or root.name, args.stars)
    given = None
    if args.tokenizer:
        uri = _uri(args.tokenizer)
        given = fetch_vocabulary(uri, opened(split_uri(uri)[0]))
        needed = [END_OF_TEXT, REPONAME, FILENAME, *([GH_STARS] if args.stars is not None else [])]
        require_tokens(given, needed, "StarCoder's code format needs; give a tokenizer that has them, or none")
    recipe = Recipe(
        root=root,
        selection=Selection(tuple(args.include or ["*"]), tuple(args.exclude), args.max_file_bytes),
        repository=repository,
        seed=args.seed,
        vocab_size=vocab_size,
        training_bytes=args.tokenizer_bytes,
    )
    return recipe, opened(_uri(args.output)), given, None if "://" in args.output else Path(args.output).absolute()


def _uri(place: str) -> str:
    return place if "://" in place else f"file://{quote(str(Path(place).absolute()))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="starcoder-trainer prepare",
        description="Source files below a folder to a tokenizer and token files (Megatron's .bin and .idx).",
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="folder with source files")
    add("--output", required=True, metavar="DIR|s3://BUCKET/PREFIX", help="where the data goes")
    add("--include", action="append", metavar="PATTERN", help="path or name, e.g. '*.py'; may be repeated (default: *)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="stronger than --include; may be repeated")
    add(
        "--max-file-bytes", type=int, default=MAX_FILE_BYTES, metavar="N",
        help="larger files are skipped (default: %(default)s)",
    )  # fmt: skip
    add("--tokenizer", metavar="FILE|URI", help="tokenizer.json to use (default: train one)")
    add("--vocab-size", type=int, metavar="N", help=f"of the tokenizer to train (default: {VOCABULARY})")
    add(
        "--tokenizer-bytes", type=int, default=TRAINING_BYTES, metavar="N",
        help="train the tokenizer on about so many bytes of the files (default: %(default)s)",
    )  # fmt: skip
    add("--reponame", metavar="NAME", help="what <reponame> says (default: the folder's name)")
    add("--stars", type=int, metavar="N", help="what <gh_stars> says (default: not written)")
    add("--seed", type=int, default=42, metavar="N", help="of the documents' order and format (default: %(default)s)")
    add(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes (default: one a core; the result is the same)",
    )  # fmt: skip
    s3 = parser.add_argument_group("S3")
    s3.add_argument("--endpoint", default="", metavar="URL", help="default: AWS")
    s3.add_argument("--region", default=StorageConfig.region, help="default: %(default)s")
    s3.add_argument("--path-style", action="store_true", help="bucket in the path, not in the host's name")
    s3.add_argument("--ca-bundle", type=Path, metavar="FILE", help="CA of the endpoint, PEM")
    s3.add_argument(
        "--credentials-dir", type=Path, metavar="DIR",
        help="files AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (default: the SDK's ways to find them)",
    )  # fmt: skip
    return parser
