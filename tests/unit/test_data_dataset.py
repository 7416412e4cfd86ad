"""Samples: windows of the token stream with their labels, FIM and its mask, the same for everybody who asks."""

import hashlib
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from starcoder_trainer.data.dataset import open_dataset
from starcoder_trainer.data.errors import DataInvalid
from starcoder_trainer.failures import ConfigurationError
from tests.support.corpora import corpus_config, open_folder, vocabulary, write_corpus, write_tokens


def opened(config, tmp_path):
    return open_dataset(config, open_folder, tmp_path / "cache")


def digest_of(config, cache, indices):
    """Of samples, in the order of their indices; also run in other processes."""
    samples = open_dataset(config, open_folder, cache)
    found = {i: samples.sample(i) for i in indices}
    digest = hashlib.sha256()
    for i in sorted(found):
        digest.update(found[i].tokens.tobytes() + found[i].loss_mask.tobytes())
    return digest.hexdigest()


def test_an_epoch_is_every_window_once_and_a_window_ends_where_the_next_begins(tmp_path):
    stream = [i % 300 for i in range(10 * 8 + 5)]
    write_tokens(tmp_path / "c", [stream])
    samples = opened(corpus_config(tmp_path / "c", sequence_length=8), tmp_path)
    epoch = [samples.sample(i).tokens.tolist() for i in range(10)]
    assert sorted(epoch) == sorted(stream[w * 8 : w * 8 + 9] for w in range(10))
    assert epoch != [samples.sample(i).tokens.tolist() for i in range(10, 20)]
    assert sorted(epoch) == sorted(samples.sample(i).tokens.tolist() for i in range(10, 20))


def test_shapes_and_types_are_what_the_loop_wants(tmp_path):
    write_corpus(tmp_path / "c")
    sample = opened(corpus_config(tmp_path / "c", fim_rate=1.0), tmp_path).sample(3)
    assert (sample.tokens.shape, sample.tokens.dtype) == ((33,), np.int64)
    assert (sample.loss_mask.shape, sample.loss_mask.dtype) == ((32,), np.float32)


def test_without_fim_every_label_counts(tmp_path):
    write_corpus(tmp_path / "c")
    samples = opened(corpus_config(tmp_path / "c"), tmp_path)
    assert all(samples.sample(i).loss_mask.all() for i in range(20))


def test_loss_is_masked_exactly_where_the_label_is_padding(tmp_path):
    pad = vocabulary().ids["<fim_pad>"]
    # One byte a token, which the BPE merges when FIM writes it again: samples become shorter and are padded.
    spelled = [vocabulary().ids[c] for c in "defĠf1(x):ĊĠĠĠĠreturnĠxĠ+Ġ1Ċ"]
    write_tokens(tmp_path / "c", [[*spelled, 0]] * 40)
    samples = opened(corpus_config(tmp_path / "c", sequence_length=96, fim_rate=1.0), tmp_path)
    padded = 0
    for i in range(20):
        sample = samples.sample(i)
        assert ((sample.loss_mask == 0) == (sample.tokens[1:] == pad)).all()
        padded += int((sample.loss_mask == 0).sum())
    assert padded


@pytest.mark.slow
def test_the_same_sample_comes_out_in_any_order_and_in_any_process(tmp_path):
    write_corpus(tmp_path / "c")
    config = corpus_config(tmp_path / "c", fim_rate=0.7)
    here = digest_of(config, tmp_path / "cache", range(30))
    assert digest_of(config, tmp_path / "cache", reversed(range(30))) == here
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        others = pool.starmap(digest_of, [(config, tmp_path / f"cache-{n}", range(30)) for n in range(2)])
    assert others == [here, here]


def test_another_seed_is_another_order_and_other_cuts(tmp_path):
    write_corpus(tmp_path / "c")
    digests = {digest_of(corpus_config(tmp_path / "c", fim_rate=1.0, seed=s), tmp_path, range(4)) for s in range(5)}
    assert len(digests) == 5


def test_the_same_window_is_cut_elsewhere_in_the_next_epoch(tmp_path):
    prepared = write_corpus(tmp_path / "c")
    config = corpus_config(tmp_path / "c", sequence_length=prepared.tokens - 1, fim_rate=1.0)
    samples = opened(config, tmp_path)
    assert len({samples.sample(i).tokens.tobytes() for i in range(4)}) == 4


def test_the_ranks_of_any_layout_together_read_the_samples_of_one(tmp_path):
    from starcoder_trainer.batches import micro_batches

    write_corpus(tmp_path / "c")
    config = corpus_config(tmp_path / "c", fim_rate=0.5)

    def iteration(ranks):
        found = []
        for rank in range(ranks):
            samples = opened(config, tmp_path)  # of a process of its own
            for share in micro_batches(3, 4, 1, rank, ranks):
                found += [samples.sample(i).tokens.tolist() for i in share]
        return found

    assert iteration(1) == iteration(2) == iteration(3) == iteration(4)


def test_two_sources_are_mixed_by_their_weights(tmp_path):
    write_tokens(tmp_path / "a", [[1] * 100])
    write_tokens(tmp_path / "b", [[2] * 400])
    config = corpus_config(tmp_path / "a", tmp_path / "b", weights=(0.3, 0.7), sequence_length=8)
    samples = opened(config, tmp_path)
    first = [int(samples.sample(i).tokens[0]) for i in range(100)]
    assert (first.count(1), first.count(2)) == (30, 70)


def test_a_token_beyond_the_vocabulary_is_invalid_data_and_says_where(tmp_path):
    write_tokens(tmp_path / "c", [[1] * 40 + [600] + [1] * 40])
    samples = opened(corpus_config(tmp_path / "c", sequence_length=8), tmp_path)
    with pytest.raises(DataInvalid, match=r"found token 600 in window (4|5).*expected 0 to 511"):
        [samples.sample(i) for i in range(10)]


def test_a_token_that_the_tokenizer_lacks_is_invalid_data(tmp_path):
    write_tokens(tmp_path / "c", [[vocabulary().size + 3] * 41])
    samples = opened(corpus_config(tmp_path / "c", sequence_length=8, fim_rate=1.0), tmp_path)
    with pytest.raises(DataInvalid, match=f"found token {vocabulary().size + 3}"):
        samples.sample(0)


def test_a_cache_size_that_is_no_number_is_refused(tmp_path, monkeypatch):
    write_corpus(tmp_path / "c")
    monkeypatch.setenv("STARCODER_DATA_CACHE_BYTES", "8Gi")
    with pytest.raises(ConfigurationError, match="'8Gi', expected a number of bytes"):
        opened(corpus_config(tmp_path / "c"), tmp_path)


def test_samples_of_the_next_iteration_are_ready_before_they_are_asked_for(tmp_path):
    from starcoder_trainer.data.read_ahead import ReadAhead

    made = []

    class Counting:
        def sample(self, i):
            made.append(i)
            return i * 10

    samples = ReadAhead(Counting(), stride=4, end=8)
    assert isinstance(samples._threads, ThreadPoolExecutor)
    assert [samples.sample(i) for i in range(4)] == [0, 10, 20, 30]
    samples._threads.shutdown()  # waits for what was begun
    assert sorted(made) == list(range(8))
    assert [samples.sample(i) for i in range(4, 8)] == [40, 50, 60, 70]
    assert sorted(made) == list(range(8))


def test_an_error_of_a_guess_is_raised_when_its_sample_is_asked_for(tmp_path):
    from starcoder_trainer.data.read_ahead import ReadAhead

    class Failing:
        def sample(self, i):
            if i == 4:
                raise DataInvalid("broken")
            return i

    samples = ReadAhead(Failing(), stride=4, end=100)
    assert [samples.sample(i) for i in range(4)] == [0, 1, 2, 3]
    with pytest.raises(DataInvalid, match="broken"):
        samples.sample(4)


def test_data_made_for_a_longer_vocabulary_is_read_as_32_bits(tmp_path):
    big = replace(vocabulary(), size=70000)
    write_tokens(tmp_path / "c", [[66000] * 41], big)
    config = corpus_config(tmp_path / "c", sequence_length=8)
    config = replace(config, model=replace(config.model, vocab_size=70000))
    assert opened(config, tmp_path).sample(0).tokens.tolist() == [66000] * 9
