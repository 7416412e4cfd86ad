"""Fill-in-the-middle loses no character of any text, wherever it is cut, and is a function of its draws."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from starcoder_trainer.contract.config import FimConfig
from starcoder_trainer.data.fim import fill_in_the_middle
from starcoder_trainer.data.tokenizer import CodeTokenizer
from tests.support.corpora import vocabulary

TOKENIZER = CodeTokenizer(vocabulary())
END, PREFIX, MIDDLE, SUFFIX, NAME = (
    TOKENIZER.id(t) for t in ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<filename>")
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
code = st.sampled_from(["def f(x):\n    return x", "größer 漢字 🙂", "<fim_middle>", "x = 1234567890"]) | texts


def document(parts):
    """Tokens of a document: texts with a special token between."""
    tokens = []
    for n, part in enumerate(parts):
        tokens += [*([NAME] if n else []), *TOKENIZER.encode([part])[0]]
    return tokens


def restored(tokens):
    """The document that FIM was given, from what it wrote."""
    if not tokens or tokens[0] != PREFIX:
        return TOKENIZER.decode(tokens)
    middle, suffix = tokens.index(MIDDLE), tokens.index(SUFFIX)
    if suffix == 1:  # SPM, or PSM with nothing before: the same text either way
        parts = tokens[middle + 1 :], tokens[2:middle]
        return [TOKENIZER.decode([*parts[0], *parts[1]]), TOKENIZER.decode([*parts[1], *parts[0]])]
    return TOKENIZER.decode([*tokens[1:suffix], *tokens[middle + 1 :], *tokens[suffix + 1 : middle]])


@given(
    documents=st.lists(st.lists(code, min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_put_back_in_order_the_text_is_what_it_was(documents, seed, rate, spm_rate):
    originals = [document(parts) for parts in documents]
    tokens = np.array([t for d in originals for t in [*d, END]], np.int64)
    found = fill_in_the_middle(tokens, FimConfig(rate, spm_rate), TOKENIZER, random.Random(seed).random)
    again = fill_in_the_middle(tokens, FimConfig(rate, spm_rate), TOKENIZER, random.Random(seed).random)
    assert found.tolist() == again.tolist()
    ends = np.flatnonzero(found == END)
    assert len(ends) == len(originals)
    for original, written in zip(originals, np.split(found, ends + 1), strict=False):
        text, back = TOKENIZER.decode(original), restored(written[:-1].tolist())
        assert text == back or text in back


@given(text=texts)
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode([text])[0]) == [text]


@given(text=texts, start=st.integers(0, 200), stop=st.integers(0, 200))
def test_a_window_into_a_text_decodes_to_a_part_of_it(text, start, stop):
    window = TOKENIZER.encode([text])[0][start:stop]
    assert "".join(map(str, TOKENIZER.decode(window))) in text
