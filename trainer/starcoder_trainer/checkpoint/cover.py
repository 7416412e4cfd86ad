"""Do the pieces of a checkpoint make whole tensors, out of bytes that are there? Asked at commit and at load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from starcoder_trainer.contract.ledger import Piece

ITEM_BYTES = {"float32": 4}
"""Element types that checkpoints are made of."""


class BadPieces(ValueError):
    """The pieces contradict their files or each other; the message names the tensor."""


def check_pieces(pieces: Iterable[Piece], file_sizes: Mapping[str, int]) -> None:
    """That each piece lies inside its file, and that each tensor's pieces cover it exactly once.

    Args:
        file_sizes: Bytes of each file that the checkpoint lists.

    Raises:
        BadPieces: the first that does not.
    """
    tensors: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        _check_bytes(piece, file_sizes)
        if piece.count:
            tensors[piece.tensor].append(piece)
    for name, found in tensors.items():
        _check_cover(name, sorted(found, key=lambda p: p.start))


def _check_bytes(piece: Piece, file_sizes: Mapping[str, int]) -> None:
    what = f"checkpoint tensor {piece.tensor}"
    if piece.dtype not in ITEM_BYTES:
        raise BadPieces(f"{what}: found {piece.dtype} in {piece.file}, expected {' or '.join(ITEM_BYTES)}")
    if piece.file not in file_sizes:
        raise BadPieces(f"{what}: is in {piece.file}, which the checkpoint does not list")
    end, size = piece.offset + piece.count * ITEM_BYTES[piece.dtype], file_sizes[piece.file]
    if piece.count < 0 or piece.offset < 0 or end > size:
        raise BadPieces(
            f"{what}: expected {piece.count} elements in bytes [{piece.offset}, {end}) of {piece.file}, found a file "
            f"of {size} bytes; it was cut short"
        )


def _check_cover(name: str, pieces: list[Piece]) -> None:
    """`pieces` by start."""
    total, end = pieces[0].total, 0
    for piece in pieces:
        if piece.total != total:
            raise BadPieces(
                f"checkpoint tensor {name}: {pieces[0].file} says it has {total} elements, {piece.file} {piece.total}"
            )
        if piece.start != end:
            kind = "missing" if piece.start > end else "present twice"
            low, high = sorted((end, piece.start))
            raise BadPieces(f"checkpoint tensor {name}: elements [{low}, {high}) are {kind}")
        end = piece.start + piece.count
    if end != total:
        kind = "missing" if end < total else "beyond its end"
        raise BadPieces(f"checkpoint tensor {name}: elements [{min(end, total)}, {max(end, total)}) are {kind}")
