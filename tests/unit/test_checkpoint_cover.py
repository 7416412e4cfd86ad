"""Pieces of a checkpoint: whole tensors out of bytes that are there, or a refusal that names the tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starcoder_trainer.checkpoint.cover import BadPieces, check_pieces
from starcoder_trainer.checkpoint.index import index_pieces
from starcoder_trainer.checkpoint.names import TensorName, parse
from starcoder_trainer.contract.ledger import Piece
from starcoder_trainer.failures import ConfigurationError

NAME = TensorName("param", "decoder.layers.0.mlp.linear_fc1.weight", (4, 0), (4, 3))
FIRST = Piece(str(NAME), "float32", 12, 0, 5, "rank-00000.safetensors", 100)
SECOND = Piece(str(NAME), "float32", 12, 5, 7, "rank-00001.safetensors", 64)
SIZES = {"rank-00000.safetensors": 120, "rank-00001.safetensors": 92}


def test_pieces_that_cover_their_tensors_are_taken_in_any_order_and_empty_ones_do_not_count() -> None:
    check_pieces([SECOND, replace(FIRST, start=5, count=0), FIRST], SIZES)


@pytest.mark.parametrize(
    ("pieces", "sizes", "message"),
    [
        ([FIRST], SIZES, r"linear_fc1.weight@4_0x4_3: elements \[5, 12\) are missing"),
        ([SECOND], SIZES, r"elements \[0, 5\) are missing"),
        ([FIRST, replace(SECOND, start=4, count=8)], {**SIZES, SECOND.file: 96}, r"\[4, 5\) are present twice"),
        ([FIRST, SECOND, FIRST], SIZES, r"\[0, 5\) are present twice"),
        ([FIRST, replace(SECOND, count=8)], {**SIZES, SECOND.file: 96}, r"\[12, 13\) are beyond its end"),
        ([FIRST, replace(SECOND, total=13)], SIZES, "rank-00000.* says it has 12 elements, rank-00001.* 13"),
        ([FIRST, replace(SECOND, dtype="bfloat16")], SIZES, "found bfloat16 in rank-00001.*, expected float32"),
        ([FIRST, SECOND], {FIRST.file: 120}, "is in rank-00001.*, which the checkpoint does not list"),
        (
            [FIRST, SECOND],
            {**SIZES, SECOND.file: 91},
            r"expected 7 elements in bytes \[64, 92\) of rank-00001.*, found a file of 91 bytes; it was cut short",
        ),
    ],
)
def test_pieces_that_do_not_make_whole_tensors_are_refused(
    pieces: list[Piece], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(BadPieces, match=message):
        check_pieces(pieces, sizes)


def whole(name: TensorName) -> Piece:
    return Piece(str(name), "float32", name.elements, 0, name.elements, "f", 0)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "param of w is missing"),
        ([((0, 0), (4, 3))], r"found 12 of 24 elements, in param/w@0_0x4_3"),
        ([((0, 0), (4, 3)), ((3, 0), (4, 3))], "w@0_0x4_3 and param/w@3_0x4_3 overlap"),
        ([((0, 0), (4, 3)), ((5, 0), (4, 3))], r"found param/w@5_0x4_3, expected parts of shape \(8, 3\)"),
        ([((0,), (24,))], r"found param/w@0x24, expected parts of shape \(8, 3\)"),
    ],
)
def test_model_parallel_parts_that_do_not_make_the_parameter_are_refused(
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str
) -> None:
    index = index_pieces([whole(TensorName("param", "w", *box)) for box in boxes], {})
    with pytest.raises(ConfigurationError, match=message):
        index.boxes_of("param", "w", (8, 3))


def test_a_tensor_whose_name_and_size_disagree_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="found 13 elements in f, expected 12"):
        index_pieces([replace(whole(NAME), total=13)], {})


def test_a_name_survives_being_written_and_read() -> None:
    assert parse(str(NAME)) == NAME


@pytest.mark.parametrize("text", ["param/w", "param/w@0x", "param/w@0_0x3", "w@0x3", "param/w@-1x3"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"checkpoint tensor '"):
        parse(text)
