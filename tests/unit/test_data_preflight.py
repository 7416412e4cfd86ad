"""What is wrong with tokenizer or data is said before training, with what was found, expected, and what to do."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from starcoder_trainer.contract.config import SourceConfig
from starcoder_trainer.data import preflight
from starcoder_trainer.data.errors import DataInvalid, DataNotFound, TokenizerMismatch
from starcoder_trainer.failures import classify
from starcoder_trainer.storage.store import BucketNotFound
from tests.support.corpora import corpus_config, open_folder, vocabulary, write_corpus


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"


def check(config):
    preflight.check(config, open_folder)


def test_data_that_fits_its_run_passes(corpus):
    check(corpus_config(corpus, fim_rate=0.5))


def test_it_loads_neither_torch_nor_numpy_nor_the_tokenizers_library(corpus):
    code = "import sys, starcoder_trainer.data.preflight; print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "prepared.json", "tokens.bin", "tokens.idx"])
def test_a_missing_object_is_data_not_found(corpus, name):
    (corpus / name).unlink()
    with pytest.raises(DataNotFound, match="prepare") as e:
        check(corpus_config(corpus))
    assert name in str(e.value)
    assert e.value.reason == "DataNotFound"


def test_in_a_worker_missing_data_is_the_stores_failure_and_broken_data_the_users(corpus):
    (corpus / "tokens.idx").write_bytes(b"")
    with pytest.raises(DataInvalid) as e:
        check(corpus_config(corpus))
    assert classify(e.value) == "UserError"
    (corpus / "prepared.json").unlink()
    with pytest.raises(DataNotFound) as e:
        check(corpus_config(corpus))
    assert classify(e.value) == "Storage"


def test_a_missing_bucket_stays_a_missing_bucket(corpus):
    class NoBucket:
        uri = "s3://nowhere"

        def get(self, key):
            raise BucketNotFound("read s3://nowhere: NoSuchBucket; create the bucket")

    config = corpus_config(corpus)
    config = replace(config, data=replace(config.data, sources=(SourceConfig("s3://nowhere", 1.0),)))
    with pytest.raises(BucketNotFound):
        preflight.check(config, lambda uri: NoBucket() if uri.startswith("s3") else open_folder(uri))


def test_another_tokenizer_than_the_datas_is_a_mismatch_that_names_both(corpus, tmp_path):
    other = vocabulary(300)
    write_corpus(tmp_path / "other", made_with=other)
    config = corpus_config(corpus)
    config = replace(config, data=replace(config.data, tokenizer=f"file://{tmp_path}/other/tokenizer.json"))
    with pytest.raises(TokenizerMismatch) as e:
        check(config)
    for text in (vocabulary().sha256[:16], other.sha256[:16], f"{corpus}/tokenizer.json", "other/tokenizer.json"):
        assert text in str(e.value)


def test_a_second_source_of_another_tokenizer_is_a_mismatch_too(corpus, tmp_path):
    write_corpus(tmp_path / "other", made_with=vocabulary(300))
    with pytest.raises(TokenizerMismatch, match=r"/other: its data was made with"):
        check(corpus_config(corpus, tmp_path / "other"))


def test_a_vocabulary_larger_than_the_models_is_a_mismatch(corpus):
    config = corpus_config(corpus)
    with pytest.raises(TokenizerMismatch, match=f"found {vocabulary().size} entries, model.vocabSize is 300"):
        check(replace(config, model=replace(config.model, vocab_size=300)))


def test_a_tokenizer_without_fim_tokens_is_a_mismatch_only_where_fim_is_asked_for(corpus):
    document = json.loads((corpus / "tokenizer.json").read_bytes())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<fim_pad>"]
    del document["model"]["vocab"]["<fim_pad>"]
    (corpus / "tokenizer.json").write_text(json.dumps(document))
    prepared = json.loads((corpus / "prepared.json").read_bytes())
    prepared["tokenizerSha256"] = hashlib.sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
    (corpus / "prepared.json").write_text(json.dumps(prepared))
    check(corpus_config(corpus, fim_rate=0.0))
    with pytest.raises(TokenizerMismatch, match="found no <fim_pad>"):
        check(corpus_config(corpus, fim_rate=0.5))


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"model": {"vocab": {}}, "added_tokens": []}', '{"model": 1, "added_tokens": [2]}']
)
def test_a_file_that_is_no_tokenizer_is_invalid(corpus, text):
    (corpus / "tokenizer.json").write_text(text)
    with pytest.raises(DataInvalid, match="of a byte-level BPE"):
        check(corpus_config(corpus))


def test_fewer_tokens_than_one_sample_is_invalid_and_says_how_many_are_needed(corpus):
    tokens = json.loads((corpus / "prepared.json").read_bytes())["tokens"]
    check(corpus_config(corpus, sequence_length=tokens - 1))
    with pytest.raises(DataInvalid, match=f"found {tokens} tokens, expected at least {tokens + 1}"):
        check(corpus_config(corpus, sequence_length=tokens))


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx"])
def test_a_file_cut_short_is_invalid(corpus, name):
    data = (corpus / name).read_bytes()
    (corpus / name).write_bytes(data[:-1])
    with pytest.raises(DataInvalid, match=f"{name}: found {len(data) - 1} bytes, expected {len(data)}"):
        check(corpus_config(corpus))


def test_an_index_that_contradicts_the_preparation_is_invalid(corpus):
    prepared = json.loads((corpus / "prepared.json").read_bytes())
    (corpus / "prepared.json").write_text(json.dumps(prepared | {"dtype": "int32"}))
    with pytest.raises(DataInvalid, match=r"documents of uint16, prepared.json says .* of int32"):
        check(corpus_config(corpus))


def test_a_preparation_of_another_format_is_invalid(corpus):
    prepared = json.loads((corpus / "prepared.json").read_bytes())
    (corpus / "prepared.json").write_text(json.dumps(prepared | {"format": 2}))
    with pytest.raises(DataInvalid, match="found format 2, expected 1"):
        check(corpus_config(corpus))
