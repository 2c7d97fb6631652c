"""Stored tensors as numpy arrays, a bounded piece at a time, and the arithmetic on them.

numpy has no bfloat16; ml_dtypes gives it one, with rounding to nearest even, so that no blend
needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from taia.checkpoint import Tensor
from taia.cold import Reader
from taia.errors import CheckpointError, MismatchError
from taia.holes import refuse_hole

__all__ = [
    "CHUNK",
    "DTYPES",
    "Array",
    "blend",
    "blended_chunks",
    "encode",
    "read_array",
    "widen",
]

Array = NDArray[Any]

DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""numpy's own of each dtype that deltas are computed on, by the names of safetensors."""

EXPONENTS = {
    DTYPES["F64"]: 0x7FF0000000000000,
    DTYPES["F32"]: 0x7F800000,
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
}
"""The bits of the exponent of each."""

CHUNK = 1 << 18
"""Elements in memory at a time for each operand of a blend."""


def read_array(folder: Path, tensor: Tensor, first: int = 0, count: int = -1) -> Array:
    """Elements `[first, first + count)` of a stored tensor, flat, in its own dtype.

    The whole tensor has its own shape. Raises CheckpointError if the file has become shorter.
    """
    dtype = DTYPES[tensor.dtype]
    whole = first == 0 and count == -1
    wanted = tensor.parameters if count == -1 else count
    path = folder / tensor.file
    refuse_hole(path, tensor.start, tensor.stop)
    try:
        values = np.fromfile(path, dtype, wanted, offset=tensor.start + first * dtype.itemsize)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if values.size != wanted:
        raise CheckpointError(f"{path}: ends inside {tensor.name}; it changed while it was read")
    return values.reshape(tensor.shape) if whole else values


def widen(values: Array) -> Array:
    """float32 for every dtype up to 32 bits; float64 stays."""
    return values if values.dtype == np.float64 else values.astype(np.float32)


def blend(base: Array, tuned: Array, strength: float, scratch: Scratch | None = None) -> Array:
    """Interpolate: base + strength * (tuned - base), in float32 (float64 for float64).

    The result has the dtype of `base`; with `scratch` it lies there, until the next call.

    WiSE-FT, arXiv 2109.01903, equation 1, for any strength. `tuned` may have another dtype;
    at strength 1 it is converted and nothing else, free of the rounding of the difference.
    An infinite weight that both have stays.
    Raises MismatchError where finite weights give one that the dtype cannot hold.
    """
    work = scratch or Scratch(base.size, base.dtype, tuned.dtype)
    wide, other, mixed, rounded = (part[: base.size] for part in work.parts)
    base, tuned = base.reshape(-1), tuned.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(wide, base, casting="unsafe")
        np.copyto(other, tuned, casting="unsafe")
        np.subtract(other, wide, out=mixed)
        np.multiply(mixed, mixed.dtype.type(strength), out=mixed)
        np.add(wide, mixed, out=mixed)
        np.copyto(rounded, other if strength == 1 else mixed, casting="unsafe")
        if not all_finite(rounded) and strength != 1:
            overflown = ~np.isfinite(rounded) & np.isfinite(wide) & np.isfinite(other)
            if overflown.any():
                raise beyond(strength, rounded.dtype)
            alike = (wide == other) & ~np.isfinite(rounded)  # inf - inf is no number
            np.copyto(rounded, base, where=alike)
    return rounded


class Scratch:
    """Memory that the blends of one tensor use again and again.

    Fresh memory would cost more than the arithmetic: the system clears it first.
    """

    def __init__(self, size: int, base: Any, tuned: Any) -> None:
        wide = np.float64 if np.float64 in (base, tuned) else np.float32
        self.parts = (*(np.empty(size, wide) for _ in range(3)), np.empty(size, base))


def all_finite(values: Array) -> bool:
    """Whether no value is infinite or NaN: those have every bit of the exponent set."""
    bits = values.view(np.dtype(f"u{values.itemsize}"))
    mask = bits.dtype.type(EXPONENTS[values.dtype])
    return not values.size or bool((bits & mask).max() != mask)


def blended_chunks(
    base_path: Path,
    base: Tensor,
    tuned_path: Path,
    tuned: Tensor,
    strength: float,
    first: int,
    count: int,
    *,
    cold: bool = False,
) -> Iterator[bytes]:
    """The bytes of elements `[first, first + count)` of a blend, CHUNK elements at a time."""
    refuse_hole(base_path, base.start, base.stop)
    refuse_hole(tuned_path, tuned.start, tuned.stop)
    size = min(CHUNK, count)
    old, new = np.empty(size, DTYPES[base.dtype]), np.empty(size, DTYPES[tuned.dtype])
    scratch = Scratch(size, old.dtype, new.dtype)
    with Reader(base_path, cold=cold) as olds, Reader(tuned_path, cold=cold) as news:
        for done in range(0, count, CHUNK):
            part, left = slice(0, min(CHUNK, count - done)), count - done
            _fill(old[part], olds, base.start + (first + done) * old.itemsize, left)
            _fill(new[part], news, tuned.start + (first + done) * new.itemsize, left)
            yield blend(old[part], new[part], strength, scratch).tobytes()


def _fill(values: Array, source: Reader, start: int, soon: int) -> None:
    """Read the elements that begin at byte `start`; `soon` elements from there are read in turn.

    Raises CheckpointError if the file ends before.
    """
    view, ahead = values.view(np.uint8).data, soon * values.itemsize
    while view:
        read = source.read_into(view, start, ahead)
        if not read:
            raise CheckpointError(f"{source.file.name!s}: became shorter while it was read")
        view, start, ahead = view[read:], start + read, ahead - read


def encode(values: Array, dtype: str, strength: float = 1) -> bytes:
    """The little-endian bytes of `values`, rounded to a stored dtype.

    Raises MismatchError where a value does not fit the dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ascontiguousarray(values).astype(DTYPES[dtype])
    if not all_finite(rounded.reshape(-1)):
        raise beyond(strength, DTYPES[dtype])
    return rounded.tobytes()


def beyond(strength: float, dtype: Any) -> MismatchError:
    """The error of a delta whose result is no number."""
    return MismatchError(
        f"at strength {strength:g} a weight is no longer a finite {dtype}; "
        "choose a smaller strength, or look at the fine-tune for NaN"
    )
