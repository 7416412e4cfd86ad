"""`prepare` on real source code, to a folder: what comes out, that it always comes out so, and what is refused."""

import email
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from starcoder_trainer.data import encoding, preflight
from starcoder_trainer.data import prepare as prepare_module
from starcoder_trainer.data.prepare import main
from starcoder_trainer.data.prepared import Prepared
from starcoder_trainer.data.publish import is_published
from starcoder_trainer.data.special_tokens import SPECIAL_TOKENS
from starcoder_trainer.data.tokenizer import CodeTokenizer
from starcoder_trainer.data.vocabulary import read_vocabulary
from starcoder_trainer.storage.file import FileStore
from tests.support.corpora import corpus_config, open_folder, vocabulary

EMAIL = Path(email.__file__).parent
JSON = Path(json.__file__).parent
NAMES = ("tokenizer.json", "tokens.bin", "tokens.idx", "prepared.json")


def run(output, *more, source=JSON):
    return main(["--input", str(source), "--include=*.py", "--output", str(output), "--workers=1", *more])


def content(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The standard library's json and email, as one project."""
    root = tmp_path_factory.mktemp("sources") / "stdlib"
    for package in (JSON, EMAIL):
        for path in package.glob("*.py"):
            target = root / package.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (root / "empty.py").touch()
    (root / "latin1.py").write_bytes("# größer".encode("latin-1"))
    return root


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_BYTES", 20_000)  # more batches than processes
        assert run(folder, "--vocab-size=1024", "--workers=2", source=sources) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The option that gives one, for tests that are not about training it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(vocabulary().data)
    return f"--tokenizer={path}"


def documents_of(folder):
    description = Prepared.from_json((folder / "prepared.json").read_bytes())
    tokens = np.fromfile(folder / "tokens.bin", description.dtype)
    ends = np.flatnonzero(tokens == 0) + 1
    return description, [d.tolist() for d in np.split(tokens, ends)[:-1]]


def test_every_source_file_is_a_document_whose_text_is_the_files(prepared, sources):
    tokenizer = CodeTokenizer(read_vocabulary((prepared / "tokenizer.json").read_bytes(), "t"))
    skipped = {"empty.py", "latin1.py"}
    paths = [p for p in sources.rglob("*.py") if p.name not in skipped]
    files = {p.relative_to(sources).as_posix(): p.read_bytes().decode() for p in paths}
    description, documents = documents_of(prepared)
    name_id, repo_id = tokenizer.id("<filename>"), tokenizer.id("<reponame>")
    texts, with_name, with_repo = [], 0, 0
    for document in documents:
        *head, text = tokenizer.decode(document[:-1])
        if head:
            # The last value and the code are one text; a newline parts them.
            value, newline, text = text.partition("\n")
            parts = dict(zip(head[::2], [*head[1::2], value], strict=True))
            assert newline
            assert parts.get(repo_id, "stdlib") == "stdlib"
            assert name_id not in parts or files[parts[name_id]] == text
            with_repo += repo_id in parts
            with_name += name_id in parts
        texts.append(text)
    assert sorted(texts) == sorted(files.values())
    assert with_name
    assert with_repo
    assert description.files == description.documents == len(files)
    assert description.bytes == sum(len(t.encode()) for t in files.values())
    assert description.tokens == sum(map(len, documents))
    assert description.skipped == {"empty": 1, "not UTF-8": 1}


@pytest.mark.slow
def test_megatron_finds_the_same_documents(prepared):
    from starcoder_trainer.model import cpu

    cpu.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = IndexedDataset(str(prepared / "tokens"))  # its arrays are views of a mapping that ends with it
    assert [d.tolist() for d in found[:]] == documents_of(prepared)[1]


def test_the_tokenizer_is_starcoders_kind(prepared):
    document = json.loads((prepared / "tokenizer.json").read_bytes())
    assert [t["content"] for t in sorted(document["added_tokens"], key=lambda t: t["id"])] == list(SPECIAL_TOKENS)
    vocabulary = read_vocabulary((prepared / "tokenizer.json").read_bytes(), "t")
    assert vocabulary.size == 1024
    tokenizer = CodeTokenizer(vocabulary)
    assert len(tokenizer.encode(["123"])[0]) == 3
    assert tokenizer.decode(tokenizer.encode(["  x = 1\n\tß"])[0]) == ["  x = 1\n\tß"]


def test_a_run_can_train_on_it(prepared):
    config = corpus_config(prepared, fim_rate=0.5, sequence_length=256)
    config = replace(config, model=replace(config.model, vocab_size=1024))
    preflight.check(config, open_folder)


def test_the_same_input_and_seed_make_the_same_bytes_whatever_the_workers(prepared, sources, tmp_path):
    assert run(tmp_path / "a b", "--vocab-size=1024", source=sources) == 0
    assert content(tmp_path / "a b") == content(prepared)
    given = f"--tokenizer={prepared}/tokenizer.json"
    assert run(tmp_path / "other", given, "--seed=43", source=sources) == 0
    assert content(tmp_path / "other")["tokens.bin"] != content(prepared)["tokens.bin"]


def test_a_second_run_finds_it_there_and_touches_nothing(tokenizer, tmp_path, capsys):
    assert run(tmp_path / "out", tokenizer) == 0
    before = {name: (tmp_path / "out" / name).stat().st_ino for name in NAMES}
    assert run(tmp_path / "out", tokenizer) == 0
    assert "there already, nothing to do" in capsys.readouterr().out
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in NAMES} == before


def test_a_second_run_mends_what_was_lost_and_replaces_what_is_of_other_sources(tokenizer, tmp_path):
    assert run(tmp_path / "out", tokenizer) == 0
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "tokens.bin").unlink()
    assert run(tmp_path / "out", tokenizer) == 0
    assert content(tmp_path / "out") == whole
    assert run(tmp_path / "out", tokenizer, "--exclude=tool.py") == 0
    assert content(tmp_path / "out") != whole


def test_data_of_another_seed_is_not_this_data_though_it_has_the_same_size(prepared):
    store = FileStore(f"file://{prepared}")
    there = documents_of(prepared)[0]
    assert is_published(store, there)
    assert not is_published(store, replace(there, seed=there.seed + 1))


def test_prepared_json_is_gone_before_anything_changes_and_back_after_all_the_rest(tokenizer, tmp_path, monkeypatch):
    assert run(tmp_path / "out", tokenizer) == 0
    seen = []

    def watched(store, *more):
        real(Watched(store), *more)

    class Watched:
        def __init__(self, store):
            self.store = store

        def __getattr__(self, name):
            def call(key, *args):
                seen.append((name, key))
                return getattr(self.store, name)(key, *args)

            return call

    real = prepare_module.publish
    monkeypatch.setattr(prepare_module, "publish", watched)
    assert run(tmp_path / "out", tokenizer, "--seed=1") == 0
    assert seen[0] == ("delete", "prepared.json")
    assert seen[-1] == ("put", "prepared.json")
    assert {key for _, key in seen[1:-1]} == {"tokenizer.json", "tokens.bin", "tokens.idx"}


def test_a_given_tokenizer_is_used_and_copied_as_it_is(prepared, tmp_path):
    given = prepared / "tokenizer.json"
    assert run(tmp_path / "out", f"--tokenizer={given}") == 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == given.read_bytes()


def test_counts_are_printed_exactly(tokenizer, tmp_path, capsys):
    assert run(tmp_path / "out", tokenizer) == 0
    said = Prepared.from_json((tmp_path / "out/prepared.json").read_bytes())
    out, err = capsys.readouterr()
    assert f"files       {said.files}" in out
    assert f"bytes       {said.bytes:,}" in out
    assert f"tokens      {said.tokens:,} (uint16)" in out
    assert "tokens/s" in out
    assert f"tokenizer: file://{tmp_path}/out/tokenizer.json" in out
    assert "encoding" in err


def test_a_file_too_small_for_the_vocabulary_asked_for_makes_a_smaller_one(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.py").write_text("x = 1\n")
    assert run(tmp_path / "out", source=tmp_path / "in") == 0
    assert Prepared.from_json((tmp_path / "out/prepared.json").read_bytes()).vocab_size < 300


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--input=/nowhere"], "--input /nowhere: found no folder"),
        (["--include=*.cobol"], "found no file to take, expected UTF-8 text that matches --include=*.cobol"),
        (["--vocab-size=100"], "--vocab-size 100: expected at least 275"),
        (["--workers=0"], "--workers 0: expected at least 1"),
        (["--tokenizer=/nowhere/t.json"], "/nowhere/t.json: no such file"),
        (["--tokenizer=/t.json", "--vocab-size=300"], "leave one out"),
        (["--ca-bundle=/nowhere/ca.pem"], "expected certificates in PEM"),
        (["--output=ftp://x/y"], "found scheme 'ftp'"),
        (["--output=s3://"], "found no bucket"),
    ],
)
def test_bad_input_is_told_with_what_was_found_and_expected(tmp_path, capsys, args, said):
    source, *patterns = args if "--include" in args[0] else [None, *args]
    base = ["--input", str(JSON), "--output", str(tmp_path / "out"), *([] if source else ["--include=*.py"])]
    assert main([*base, *([source] if source else []), *patterns]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_nothing_but_binaries_says_what_was_skipped(tokenizer, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.py").write_bytes(b"\0\1\2")
    (tmp_path / "in/b.py").write_bytes(b"\xff\xfe")
    (tmp_path / "in/c.py").touch()
    assert run(tmp_path / "out", tokenizer, source=tmp_path / "in") == 1
    assert "skipped: 1 binary (a zero byte), 1 empty, 1 not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_the_formats_tokens_is_refused(prepared, tmp_path, capsys):
    document = json.loads((prepared / "tokenizer.json").read_bytes())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<reponame>"]
    del document["model"]["vocab"]["<reponame>"]
    (tmp_path / "t.json").write_text(json.dumps(document))
    assert run(tmp_path / "out", f"--tokenizer={tmp_path}/t.json") == 1
    assert "found no <reponame>" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"), [("training", signal.SIGINT), ("encoding", signal.SIGINT), ("encoding", signal.SIGTERM)]
)
def test_ctrl_c_leaves_nothing_that_could_be_taken_for_data_and_no_mess(tokenizer, tmp_path, stage, number):
    """Ctrl-C goes to the whole process group, as from a terminal; SIGTERM to the one process a container has."""
    (tmp_path / "in").mkdir()
    for i in range(300):
        (tmp_path / f"in/{i}.py").write_bytes((EMAIL / "_header_value_parser.py").read_bytes() + b"# %d\n" % i)
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen(
        [
            sys.executable, "-m", "starcoder_trainer", "prepare", "--input", tmp_path / "in", "--workers=2",
            "--output", tmp_path / "out", "--vocab-size=300" if stage == "training" else tokenizer,
        ],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(stage):
                until_busy(process, 2 if stage == "encoding" else 1)
                os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.returncode == 128 + number
    assert "interrupted; nothing at the output is taken for data" in said[-1]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    until_gone(process)


def test_ctrl_c_is_kept_from_the_first_process_as_well():
    """Which has another one started, that keeps track of resources."""
    code = """if True:
        import multiprocessing, signal
        from starcoder_trainer.data.children import deaf_to_interrupts
        with deaf_to_interrupts():
            multiprocessing.get_context("spawn").Process(target=print).start()
            print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SIGINT" in done.stdout


def until_busy(process, children):
    """So many of its children have loaded the tokenizers library."""
    end = time.monotonic() + 60
    while sum("tokenizers" in mapped(child) for child in psutil.Process(process.pid).children()) < children:
        assert time.monotonic() < end, f"{process.args} has no {children} processes that encode"
        time.sleep(0.01)


def mapped(process):
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""


def until_gone(process):
    """Of its session nothing runs any more. A zombie waits for whoever adopts orphans here."""
    end = time.monotonic() + 60
    while left := [p for p in psutil.process_iter(["status", "cmdline"]) if session(p) == process.pid and alive(p)]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.01)


def session(process):
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def alive(process):
    return process.info["status"] != psutil.STATUS_ZOMBIE
