"""Fill-in-the-middle writes what StarCoder was trained on, and loses nothing."""

import itertools
import random

import numpy as np
import pytest

from starcoder_trainer.contract.config import FimConfig
from starcoder_trainer.data.fim import fill_in_the_middle
from starcoder_trainer.data.tokenizer import CodeTokenizer
from tests.support.corpora import vocabulary

TOKENIZER = CodeTokenizer(vocabulary())
END, PREFIX, MIDDLE, SUFFIX = (
    TOKENIZER.id(t) for t in ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
)


def encode(text):
    return TOKENIZER.encode([text])[0]


def draws(*values):
    return iter(values).__next__


def fim(tokens, uniform, rate=1.0, spm_rate=0.5):
    return fill_in_the_middle(np.array(tokens, np.int64), FimConfig(rate, spm_rate), TOKENIZER, uniform).tolist()


# Draws of a document: whether at all, two cuts, whether SPM.
def test_psm_is_prefix_suffix_middle():
    found = fim([*encode("0123456789"), END], draws(0.0, 0.28, 0.64, 0.9))
    assert found == [PREFIX, *encode("012"), SUFFIX, *encode("789"), MIDDLE, *encode("3456"), END]


def test_spm_is_suffix_then_prefix_and_middle_with_each_tokenized_alone():
    found = fim([*encode("0123456789"), END], draws(0.0, 0.64, 0.28, 0.1))
    assert found == [PREFIX, SUFFIX, *encode("789"), MIDDLE, *encode("012"), *encode("3456"), END]


def test_cuts_reach_both_ends():
    text = encode("0123456789")
    assert fim(text, draws(0.0, 0.0, 0.0, 0.9)) == [PREFIX, SUFFIX, *text, MIDDLE]
    assert fim(text, draws(0.0, 0.999, 0.999, 0.9)) == [PREFIX, *text, SUFFIX, MIDDLE]
    assert fim(text, draws(0.0, 0.0, 0.999, 0.9)) == [PREFIX, SUFFIX, MIDDLE, *text]


def test_cuts_fall_within_what_was_one_token():
    one = [t for t in encode("    return") if len(TOKENIZER.decode([t])[0]) > 4]
    assert one, "the tokenizer of these tests merges no word"
    text = TOKENIZER.decode(one[:1])[0]
    found = fim(one[:1], draws(0.0, 0.4, 0.4, 0.9))
    assert len(found) > 4
    assert TOKENIZER.decode(found[1 : found.index(SUFFIX)])[0] == text[: int(0.4 * (len(text) + 1))]


def test_each_document_is_drawn_for_alone_and_fragments_at_the_edges_are_documents_too():
    a, b, c = encode("aaaa"), encode("bbbb"), encode("cccc")
    tokens = [*a, END, *b, END, *c]
    found = fim(tokens, draws(0.7, 0.2, 0.0, 0.999, 0.9, 0.7), rate=0.5)
    assert found == [*a, END, PREFIX, SUFFIX, MIDDLE, *b, END, *c]


def test_empty_documents_draw_nothing():
    assert fim([END, END], draws()) == [END, END]


def test_at_rate_zero_tokens_stay_as_they_are():
    tokens = [*encode("x = 1"), END, *encode("y")]
    assert fim(tokens, draws(0.0, 0.0), rate=0.0) == tokens


def test_a_special_token_in_a_document_is_never_cut_and_never_lost():
    name = TOKENIZER.id("<filename>")
    tokens = [name, *encode("a.py\nx = 1")]
    for n in range(11):
        found = fim(tokens, draws(0.0, 0.0, n / 11, 0.9))
        assert found.count(name) == 1
        assert PREFIX in found


def test_text_that_looks_like_a_special_token_stays_text():
    tokens = encode("a <fim_middle> b <|endoftext|>")
    assert END not in tokens
    found = fim(tokens, draws(0.0, 0.3, 0.9, 0.9))
    assert found.count(MIDDLE) == 1
    assert END not in found


def test_half_a_character_at_the_edge_of_a_window_is_dropped_not_replaced():
    umlaut = TOKENIZER.vocabulary.ids
    first, second = umlaut["Ã"], umlaut["¶"]  # the two bytes of ö
    assert TOKENIZER.decode([second, *encode("abc"), first]) == ["abc"]
    assert TOKENIZER.decode([first, second]) == ["ö"]


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.2)])
def test_in_the_long_run_rates_are_as_asked(rate, spm_rate):
    tokens = [*encode("def f(x): return x"), END] * 4000
    found = fim(tokens, random.Random(1).random, rate, spm_rate)
    transformed = found.count(PREFIX)
    spm = sum(a == PREFIX and b == SUFFIX for a, b in itertools.pairwise(found))
    assert abs(transformed / 4000 - rate) < 0.03
    # An empty prefix looks like SPM: one cut in 19 places, twice.
    assert abs(spm / transformed - spm_rate) < 0.03 + 0.11 * (1 - spm_rate)
