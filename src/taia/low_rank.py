"""LoHa and LoKr modules: deltas that are elementwise and Kronecker products of small factors.

LoHa (Hyeon-Woo et al. 2022, arXiv 2108.06098): (A1 @ B1) * (A2 @ B2), element by element.
LoKr (Yeh et al. 2024, arXiv 2309.14859): the Kronecker product of two matrices, each stored
whole or as a product. Both are linear in one of their factors, which takes the strength.
Convolutions are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taia.changes import Shapes, Sliced, refuse_shape, scaled, stored
from taia.checkpoint import Tensor
from taia.peft_config import Settings

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = ["LOHA_PARTS", "LOKR_PARTS", "LowRankModule", "low_rank_changes"]

LOHA_PARTS = r"hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|hada_t1|hada_t2"
LOKR_PARTS = r"lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b|lokr_t2"
"""What PEFT calls the tensors of a module, as patterns."""


@dataclass(frozen=True, slots=True)
class LowRankModule:
    """Two matrices, each one stored tensor or the product of two, and how they are joined."""

    name: str
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    kronecker: bool
    scale: float
    divisible: None = None

    @property
    def weight(self) -> str:
        """The name of the weight that the delta belongs to."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        one, two = _shape(self.first), _shape(self.second)
        return (one[0] * two[0], one[1] * two[1]) if self.kronecker else one

    def on(self, model_type: str | None, shapes: Shapes | None) -> LowRankModule:  # noqa: ARG002
        """The same on every base: PEFT takes neither method to transposed layers."""
        return self

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The weight with `strength` of its delta."""
        import numpy as np

        from taia.arrays import widen

        refuse_shape(self.weight, self.shape, base.shape)
        one, two = _matrix(folder, self.first), _matrix(folder, self.second)
        joined = np.kron(one, two) if self.kronecker else one * two
        summed: Array = widen(base) + np.float32(strength) * (joined * np.float32(self.scale))
        return summed

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:  # noqa: ARG002
        """Its tensors, the strength multiplied into the last one of the first matrix."""
        from taia.arrays import read_array, widen

        kept = {tensor.name: stored(folder, tensor) for tensor in (*self.first, *self.second)}
        last = self.first[-1]
        if strength != 1:
            kept[last.name] = scaled(last, widen(read_array(folder, last)), strength)
        return kept


def _shape(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tensors[0].shape[0], tensors[-1].shape[1]


def _matrix(folder: Path, tensors: tuple[Tensor, ...]) -> Array:
    from taia.arrays import read_array, widen

    matrices = [widen(read_array(folder, tensor)) for tensor in tensors]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def low_rank_changes(
    name: str, parts: Mapping[str, Tensor], settings: Settings
) -> tuple[list[LowRankModule], str | None]:
    """What the tensors of one module change, or what is wrong with them."""
    shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(parts.items()))
    if any(part in parts for part in ("hada_t1", "hada_t2", "lokr_t2")) or any(
        len(tensor.shape) != 2 for tensor in parts.values()
    ):
        return [], f"{name}: {shapes}: factors of a convolution, which are not read here"
    kronecker = settings.peft_type == "LOKR"
    first, second = (
        _operand(parts, f"{'lokr' if kronecker else 'hada'}_w{number}") for number in (1, 2)
    )
    if first is None or second is None or len(first) + len(second) != len(parts):
        return [], f"{name}: {shapes} are not the factors of one delta"
    if not kronecker and _shape(first) != _shape(second):
        return [], f"{name}: {shapes}: products of two different shapes"
    rank = settings.rank(name)
    ranks = {operand[0].shape[1] for operand in (first, second) if len(operand) == 2}
    if not ranks <= {rank}:
        return [], f"{name}: {shapes}: not of rank {rank}, which its settings say"
    if math.prod(first[0].shape) == 0:
        return [], f"{name}: {shapes}: nothing in them"
    return [LowRankModule(name, first, second, kronecker, settings.scale(name, rank))], None


def _operand(parts: Mapping[str, Tensor], stem: str) -> tuple[Tensor, ...] | None:
    """A matrix that is stored whole, or as two tensors with a product."""
    if stem in parts:
        return (parts[stem],)
    a, b = parts.get(f"{stem}_a"), parts.get(f"{stem}_b")
    if a is None or b is None or a.shape[1] != b.shape[0]:
        return None
    return a, b
