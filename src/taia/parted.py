"""A fused tensor whose projections have different strengths, a bounded piece at a time.

The tensor is read as rows: what lies behind one index of the axis that is cut. A row at strength
0 or 1 is copied from base or tuned bit by bit, any other is blended. What no row of a piece
needs is not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from taia.arrays import CHUNK, DTYPES, Array, blend
from taia.checkpoint import BITS, Tensor
from taia.errors import CheckpointError
from taia.fused import Cut

__all__ = ["parted_chunks", "row_strengths"]


def row_strengths(cut: Cut, parts: Mapping[str, float]) -> Array:
    """The strength of every row along the axis of `cut`, as float64 [rows]."""
    one = np.concatenate([np.full(rows, parts[name]) for name, rows in cut.parts])
    return np.tile(one, cut.groups)


def parted_chunks(
    base_folder: Path,
    base: Tensor,
    tuned_folder: Path,
    tuned: Tensor,
    cut: Cut,
    parts: Mapping[str, float],
) -> Iterator[bytes]:
    """The bytes of the output, in the dtype of the base, about CHUNK elements at a time."""
    strengths = row_strengths(cut, parts)
    width = math.prod(base.shape[cut.axis + 1 :])
    if not width:  # rows of no elements
        return
    rows = base.parameters // width
    at_once = max(1, CHUNK // width)
    for first in range(0, rows, at_once):
        indices = np.arange(first, min(first + at_once, rows)) % len(strengths)
        yield _mixed(
            (base_folder / base.file, base), (tuned_folder / tuned.file, tuned),
            first, width, strengths[indices],
        ).tobytes()  # fmt: skip


def _mixed(
    base: tuple[Path, Tensor], tuned: tuple[Path, Tensor], first: int, width: int, wanted: Array
) -> Array:
    """Rows from `first` on, of `width` elements, each at its strength; as bytes."""
    count = len(wanted)
    alike = base[1].dtype == tuned[1].dtype
    copied = alike & (wanted == 1)
    out = np.empty((count, width * BITS[base[1].dtype] // 8), np.uint8)
    old = None if copied.all() else _rows(*base, first, count, width)
    new = None if not wanted.any() else _rows(*tuned, first, count, width)
    for strength in np.unique(wanted):
        here = wanted == strength
        if strength == 0:
            assert old is not None
            out[here] = old[here]
        elif strength == 1 and alike:
            assert new is not None
            out[here] = new[here]
        else:
            assert old is not None
            assert new is not None
            values = [rows[here].reshape(-1).view(DTYPES[tensor.dtype])
                      for rows, (_, tensor) in ((old, base), (new, tuned))]  # fmt: skip
            mixed = blend(values[0], values[1], float(strength))
            out[here] = mixed.view(np.uint8).reshape(-1, out.shape[1])
    return out


def _rows(path: Path, tensor: Tensor, first: int, count: int, width: int) -> Array:
    """Bytes of `count` rows, one a line. Raises CheckpointError if the file became shorter."""
    size = width * BITS[tensor.dtype] // 8
    with path.open("rb", buffering=0) as file:
        file.seek(tensor.start + first * size)
        raw = bytearray(count * size)
        view = memoryview(raw)
        while view:
            taken = file.readinto(view)
            if not taken:
                raise CheckpointError(f"{path}: became shorter while it was read")
            view = view[taken:]
    return np.frombuffer(raw, np.uint8).reshape(count, size)
