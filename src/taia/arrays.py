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
from taia.errors import CheckpointError, MismatchError

__all__ = ["CHUNK", "DTYPES", "Array", "blend", "blended_chunks", "encode", "read_array", "widen"]

Array = NDArray[Any]

DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""numpy's own of each dtype that deltas are computed on, by the names of safetensors."""

CHUNK = 1 << 19
"""Elements in memory at a time for each operand of a blend."""


def read_array(folder: Path, tensor: Tensor, first: int = 0, count: int = -1) -> Array:
    """Elements `[first, first + count)` of a stored tensor, flat, in its own dtype.

    The whole tensor has its own shape. Raises CheckpointError if the file has become shorter.
    """
    dtype = DTYPES[tensor.dtype]
    whole = first == 0 and count == -1
    wanted = tensor.parameters if count == -1 else count
    path = folder / tensor.file
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


def blend(base: Array, tuned: Array, strength: float) -> Array:
    """Interpolate: base + strength * (tuned - base), in float32 (float64 for float64).

    The result has the dtype of `base`.

    WiSE-FT, arXiv 2109.01903, equation 1, for any strength. `tuned` may have another dtype;
    at strength 1 it is converted and nothing else, free of the rounding of the difference.
    """
    if strength == 1:
        return tuned.astype(base.dtype)
    wide = widen(base)
    with np.errstate(over="ignore", invalid="ignore"):
        mixed: Array = wide + wide.dtype.type(strength) * (widen(tuned) - wide)
        rounded: Array = mixed.astype(base.dtype)
    overflown = ~np.isfinite(rounded) & np.isfinite(wide) & np.isfinite(widen(tuned))
    if overflown.any():
        raise beyond(strength, rounded.dtype)
    return rounded


def blended_chunks(
    base_folder: Path, base: Tensor, tuned_folder: Path, tuned: Tensor, strength: float
) -> Iterator[bytes]:
    """The bytes of a blend, in pieces of at most CHUNK elements."""
    for first in range(0, base.parameters, CHUNK):
        count = min(CHUNK, base.parameters - first)
        yield blend(
            read_array(base_folder, base, first, count),
            read_array(tuned_folder, tuned, first, count),
            strength,
        ).tobytes()


def encode(values: Array, dtype: str, strength: float = 1) -> bytes:
    """The little-endian bytes of `values`, rounded to a stored dtype.

    Raises MismatchError where a value does not fit the dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ascontiguousarray(values).astype(DTYPES[dtype])
    if not np.isfinite(rounded).all():
        raise beyond(strength, DTYPES[dtype])
    return rounded.tobytes()


def beyond(strength: float, dtype: Any) -> MismatchError:
    """The error of a delta whose result is no number."""
    return MismatchError(
        f"at strength {strength:g} a weight is no longer a finite {dtype}; "
        "choose a smaller strength, or look at the fine-tune for NaN"
    )
