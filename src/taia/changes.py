"""What an adapter does to one weight: the interface of every method, and exact scaling.

Each method is a small class: which module and weight it changes, the tensors that it is
stored as, the weight at any strength, and its own tensors at a strength for a sliced adapter.
Adding a method is adding such a class and the rule that recognises its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from taia.checkpoint import Tensor
from taia.errors import CheckpointError

if TYPE_CHECKING:
    from typing import Self

    from taia.arrays import Array

__all__ = ["PREFIX", "Change", "Shapes", "Sliced", "refuse_shape", "scaled", "stored"]

PREFIX = "base_model.model."
"""What PEFT writes before the name of every module."""

Shapes = Callable[[str], tuple[int, ...] | None]
"""The shape of a weight of the base by name; None for one that it does not store."""

Sliced = dict[str, tuple[Tensor, bytes]]
"""Tensors of a sliced adapter by key: how each is described, and its bytes."""


class Change(Protocol):
    """The change of one weight of the base."""

    @property
    def name(self) -> str:
        """The module that the adapter names."""

    @property
    def weight(self) -> str:
        """The name of the weight that changes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of that weight, as far as the adapter tells it."""

    @property
    def divisible(self) -> str | None:
        """None where a sliced adapter can hold any strength, else what it is: 'DoRA'."""

    def on(self, model_type: str | None, shapes: Shapes | None) -> Self | None:
        """The change on a certain base; None where that base has no such weight to change."""

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The weight with `strength` of the change, in float32 (float64 of float64)."""

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:
        """Its tensors at `strength`, with room for `rank` where the method has ranks."""


def stored(folder: Path, tensor: Tensor, key: str | None = None) -> tuple[Tensor, bytes]:
    """A tensor of an adapter as it stands in the file, under its own or another name."""
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        raw = file.read(tensor.bytes)
    if len(raw) != tensor.bytes:
        raise CheckpointError(f"{folder / tensor.file}: became shorter while it was read")
    name = tensor.name if key is None else key
    return Tensor(name, tensor.dtype, tensor.shape, tensor.file, 0, len(raw)), raw


def scaled(
    tensor: Tensor, values: Array, factor: float, key: str | None = None
) -> tuple[Tensor, bytes]:
    """`factor * values` in the dtype of `tensor` if it holds every product exactly, else float32.

    `values` are what `tensor` stores, in float32 or wider. A power of two is exact in every
    dtype; any other factor would cost bfloat16 all but 8 bits of the delta, so such a tensor
    is written as float32, where the product has a relative error of at most 2**-24.
    """
    import numpy as np

    from taia.arrays import DTYPES, encode

    product = values if factor == 1 else values * values.dtype.type(factor)
    dtype = tensor.dtype
    if dtype not in ("F32", "F64"):
        with np.errstate(over="ignore"):
            exact = np.array_equal(product.astype(DTYPES[dtype]).astype(product.dtype), product)
        dtype = dtype if exact else "F32"
    raw = encode(product, dtype, factor)
    name = tensor.name if key is None else key
    return Tensor(name, dtype, product.shape, tensor.file, 0, len(raw)), raw


def refuse_shape(weight: str, expected: tuple[int, ...], base: tuple[int, ...]) -> None:
    """Raise CheckpointError if a base weight has another shape than the adapter changes."""
    if base != expected:
        raise CheckpointError(
            f"{weight}: the adapter changes a weight of shape {list(expected)}, "
            f"the base has {list(base)}"
        )
