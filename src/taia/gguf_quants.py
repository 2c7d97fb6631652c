"""Tensors of a GGUF file as numbers, and back, a bounded piece at a time.

A quantised type stores blocks of 32 or 256 elements with their scales. The gguf library
unpacks nearly all of them and packs some (Q4_0 to Q8_0, MXFP4, ternary ones; not the K and
IQ types, which only llama.cpp itself makes). Blocks do not see each other, so that pieces
give the bytes of the whole.

Packing rounds: a tensor that is unpacked, changed and packed again has the error of its type
twice. So this happens only where `--requantize` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from taia.arrays import CHUNK, DTYPES, Array, beyond, blend, blended_chunks, encode, widen
from taia.checkpoint import Tensor
from taia.errors import CheckpointError
from taia.gguf_kinds import quantisation_types

__all__ = ["can_pack", "can_unpack", "mixed_chunks", "scaled_chunks"]


def mixed_chunks(
    base_folder: Path, base: Tensor, tuned_folder: Path, tuned: Tensor, strength: float
) -> Iterator[bytes]:
    """The bytes of base + strength * (tuned - base), in the type of the base.

    The two may have different types; at strength 1 the tuned tensor is converted.
    Raises MismatchError where a result is no finite number.
    """
    if base.dtype == tuned.dtype and base.dtype in DTYPES:
        yield from blended_chunks(
            base_folder / base.file, base, tuned_folder / tuned.file, tuned, strength,
            0, base.parameters,
        )  # fmt: skip
        return
    for first in range(0, base.parameters, CHUNK):
        count = min(CHUNK, base.parameters - first)
        wanted = _unpacked(tuned_folder, tuned, first, count)
        if strength != 1:
            wanted = blend(_unpacked(base_folder, base, first, count), wanted, strength)
        yield _packed(wanted, base.dtype, strength)


def scaled_chunks(folder: Path, tensor: Tensor, strength: float) -> Iterator[bytes]:
    """The bytes of strength * tensor, in its own type."""
    for first in range(0, tensor.parameters, CHUNK):
        count = min(CHUNK, tensor.parameters - first)
        values = _unpacked(folder, tensor, first, count)
        yield _packed(values * values.dtype.type(strength), tensor.dtype, strength)


@cache
def can_unpack(dtype: str) -> bool:
    """Whether the gguf library turns blocks of this type into numbers."""
    if dtype in DTYPES:
        return True
    _, width = _block(dtype)
    try:
        _quants().dequantize(np.zeros((1, width), np.uint8), _type(dtype))
    except (NotImplementedError, AttributeError, TypeError):
        return False
    return not dtype.startswith("I8") and dtype not in ("I16", "I32", "I64")


@cache
def can_pack(dtype: str) -> bool:
    """Whether the gguf library turns numbers into blocks of this type."""
    if dtype in DTYPES:
        return True
    elements, _ = _block(dtype)
    try:
        _quants().quantize(np.zeros((1, elements), np.float32), _type(dtype))
    except (NotImplementedError, AttributeError, TypeError):
        return False
    return True


def _unpacked(folder: Path, tensor: Tensor, first: int, count: int) -> Array:
    """Elements `[first, first + count)`, flat, float32 (float64 of F64)."""
    elements, width = _block(tensor.dtype)
    path, length = folder / tensor.file, count // elements * width
    try:
        start = tensor.start + first // elements * width
        stored = np.fromfile(path, np.uint8, length, offset=start)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if stored.size != length:
        raise CheckpointError(f"{path}: ends inside {tensor.name}; it changed while it was read")
    return _numbers(stored, tensor.dtype)


def _packed(values: Array, dtype: str, strength: float) -> bytes:
    """The bytes of numbers in a type. Raises MismatchError where they do not fit it."""
    if dtype in DTYPES:
        return encode(values, dtype, strength)
    elements, _ = _block(dtype)
    with np.errstate(all="ignore"):
        blocks = values.astype(np.float32, copy=False).reshape(-1, elements)
        packed: Array = _quants().quantize(blocks, _type(dtype))
    if not np.isfinite(_numbers(packed.reshape(-1), dtype)).all():
        raise beyond(strength, dtype)
    return packed.tobytes()


def _numbers(stored: Array, dtype: str) -> Array:
    """Bytes as float32, or float64 of F64."""
    if dtype in DTYPES:
        return widen(stored.view(DTYPES[dtype]))
    _, width = _block(dtype)
    with np.errstate(all="ignore"):
        numbers: Array = _quants().dequantize(stored.reshape(-1, width), _type(dtype))
    return numbers.reshape(-1)


@cache
def _blocks() -> dict[str, tuple[int, int]]:
    return {name: (block, width) for name, block, width in quantisation_types().values()}


def _block(dtype: str) -> tuple[int, int]:
    """Elements and bytes of one block."""
    return _blocks()[dtype]


def _quants() -> Any:
    from gguf import quants  # an extra; only a conversion needs it

    return quants


def _type(dtype: str) -> Any:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType[dtype]
