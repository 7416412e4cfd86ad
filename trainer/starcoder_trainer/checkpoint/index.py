"""What a committed checkpoint holds: pieces by tensor, complete and without overlap, or an error that says where."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from starcoder_trainer.contract.assignment import CheckpointRef
from starcoder_trainer.contract.ledger import (
    MANIFEST,
    FileRecord,
    Manifest,
    Piece,
    checkpoint_prefix,
    digest_of,
)
from starcoder_trainer.failures import ConfigurationError, DamagedCheckpointError
from starcoder_trainer.storage.store import ObjectStore

from .cover import BadPieces, check_pieces
from .names import TensorName, parse


@dataclass(frozen=True)
class Index:
    tensors: dict[TensorName, tuple[Piece, ...]]
    """Pieces by start."""
    boxes: dict[tuple[str, str], tuple[TensorName, ...]]
    """Tensors of each (state, parameter)."""
    common: dict[str, str]
    files: dict[str, FileRecord] = field(default_factory=dict)
    """By name, as the manifest lists them."""

    def boxes_of(self, state: str, parameter: str, global_shape: tuple[int, ...]) -> tuple[TensorName, ...]:
        """Tensors that make up one state of one parameter.

        Raises:
            ConfigurationError: they don't cover `global_shape` exactly once.
        """
        boxes = self.boxes.get((state, parameter), ())
        what = f"checkpoint: {state} of {parameter}"
        if not boxes:
            raise ConfigurationError(f"{what} is missing")
        for box in boxes:
            outside = len(box.shape) != len(global_shape) or any(
                o + n > g for o, n, g in zip(box.offset, box.shape, global_shape, strict=True)
            )
            if outside:
                raise ConfigurationError(f"{what}: found {box}, expected parts of shape {global_shape}")
        for a, b in itertools.combinations(boxes, 2):
            if _overlap(a, b):
                raise ConfigurationError(f"{what}: {a} and {b} overlap")
        found, expected = sum(b.elements for b in boxes), math.prod(global_shape)
        if found != expected:
            raise ConfigurationError(f"{what}: found {found} of {expected} elements, in {', '.join(map(str, boxes))}")
        return boxes


def index_pieces(pieces: Iterable[Piece], common: dict[str, str]) -> Index:
    """Of pieces that `check_pieces` found whole.

    Raises:
        ConfigurationError: a tensor's name is none, or disagrees with the number of its elements.
    """
    tensors: dict[TensorName, list[Piece]] = defaultdict(list)
    names: dict[str, TensorName] = {}
    for piece in pieces:
        if piece.count > 0:
            name = names.get(piece.tensor) or names.setdefault(piece.tensor, parse(piece.tensor))
            if piece.total != name.elements:
                raise ConfigurationError(
                    f"checkpoint tensor {name}: found {piece.total} elements in {piece.file}, expected {name.elements}"
                )
            tensors[name].append(piece)
    boxes: dict[tuple[str, str], list[TensorName]] = defaultdict(list)
    for name in tensors:
        boxes[name.state, name.parameter].append(name)
    return Index(
        {name: tuple(sorted(found, key=lambda p: p.start)) for name, found in tensors.items()},
        {key: tuple(found) for key, found in boxes.items()},
        common,
    )


def read_index(store: ObjectStore, checkpoint: CheckpointRef) -> Index:
    """Of the manifest that HEAD lists, checked against its digest.

    Raises:
        StorageError: it can't be read.
        DamagedCheckpointError: it is not what HEAD says.
        ConfigurationError: the pieces don't make whole tensors, as this trainer knows them.
    """
    prefix = checkpoint_prefix(checkpoint.attempt, checkpoint.step)
    data = store.get(f"{prefix}/{MANIFEST}").data
    if digest_of(data) != checkpoint.digest:
        raise DamagedCheckpointError(
            f"{store.uri}/{prefix}/{MANIFEST}: found {digest_of(data)}, HEAD says {checkpoint.digest}; "
            "it was overwritten"
        )
    manifest = Manifest.from_json(data)
    try:
        check_pieces(manifest.pieces, {file.name: file.size for file in manifest.files})
    except BadPieces as e:
        raise ConfigurationError(f"{store.uri}/{prefix}: {e}") from e
    return replace(index_pieces(manifest.pieces, manifest.common), files={file.name: file for file in manifest.files})


def _overlap(a: TensorName, b: TensorName) -> bool:
    return all(
        oa < ob + nb and ob < oa + na for oa, na, ob, nb in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )
