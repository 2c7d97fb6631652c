"""Changes that are no matrix products: IA3's factors, and rows of single tokens.

IA3 (Liu et al. 2022, arXiv 2205.05638) multiplies the outputs of a layer, or the inputs of a
feed-forward one, by a vector l. On the weight that is one factor a row or a column, on the
bias of the layer one a number, so its full delta is (l - 1) * base, and at a strength s the
factor is 1 + s * (l - 1): exact, in a merge as in an adapter.

`trainable_token_indices` trains the embedding rows of a few tokens and stores them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from taia.changes import Shapes, Sliced, refuse_shape, scaled, stored
from taia.checkpoint import Tensor
from taia.lora import is_conv1d
from taia.peft_config import Settings

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = ["IA3_PARTS", "ROWS", "Ia3Vector", "TokenRows", "ia3_changes", "token_rows"]

IA3_PARTS = r"ia3_l"
ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class Ia3Vector:
    """One factor an output, (out, 1), or one an input, (1, in), of a linear layer."""

    name: str
    vector: Tensor
    part: str = "weight"
    transposed: bool = False
    other: int = 0  # the size of the weight's other side, once the base is known
    divisible: None = None

    @property
    def inputs(self) -> bool:
        """Whether the inputs are multiplied: PEFT's feed-forward modules."""
        return self.vector.shape[0] == 1 and self.vector.shape != (1, 1)

    @property
    def weight(self) -> str:
        """The name of the weight, or the bias."""
        return f"{self.name}.{self.part}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is multiplied; of an unknown base, with 0 for what is not told."""
        size = self.vector.parameters
        if self.part == "bias":
            return (size,)
        shape = (self.other, size) if self.inputs else (size, self.other)
        return shape[::-1] if self.transposed else shape

    def on(self, model_type: str | None, shapes: Shapes | None) -> Ia3Vector | None:
        """With the orientation and the size of the base; a bias counts where the base has it."""
        known = None if shapes is None else shapes(self.weight)
        if self.part == "bias":
            return None if known is None else self
        flip = self.transposed if model_type is None else is_conv1d(self.name, model_type)
        other = 0
        if known is not None and len(known) == 2:
            other = known[0 if self.inputs != flip else 1]
        return replace(self, transposed=flip, other=other)

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The weight or bias, multiplied by 1 + strength * (l - 1)."""
        from taia.arrays import widen

        factor = self._factor(folder, strength)
        if self.part == "bias":
            refuse_shape(self.weight, self.shape, base.shape)
            multiplied: Array = widen(base) * factor.reshape(-1)
            return multiplied
        multiplied = widen(base) * (factor.T if self.transposed else factor)
        refuse_shape(self.weight, multiplied.shape, base.shape)
        return multiplied

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:  # noqa: ARG002
        """The vector at a strength; the bias has none of its own."""
        if self.part == "bias":
            return {}
        if strength == 1:
            return {self.vector.name: stored(folder, self.vector)}
        return {self.vector.name: scaled(self.vector, self._factor(folder, strength), 1.0)}

    def _factor(self, folder: Path, strength: float) -> Array:
        from taia.arrays import read_array, widen

        vector = widen(read_array(folder, self.vector))
        if strength == 1:
            return vector
        one = vector.dtype.type(1)
        factor: Array = one + vector.dtype.type(strength) * (vector - one)
        return factor


def ia3_changes(
    name: str,
    parts: Mapping[str, Tensor],
    settings: Settings,
) -> tuple[list[Ia3Vector], str | None]:
    """What the vector of one module changes, or what is wrong with it."""
    vector = parts["ia3_l"]
    if len(vector.shape) != 2 or 1 not in vector.shape or not vector.parameters:
        return [], f"{name}: ia3_l {list(vector.shape)} is no vector of a linear layer"
    weight = Ia3Vector(name, vector, transposed=settings.fan_in_fan_out)
    return [weight, *([] if weight.inputs else [replace(weight, part="bias")])], None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The embedding rows of some tokens, as they were after training."""

    name: str
    rows: Tensor
    tokens: tuple[int, ...]
    words: int = 0  # the size of the vocabulary, once the base is known
    divisible: str = "rows of tokens"

    @property
    def weight(self) -> str:
        """The name of the embedding."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """(vocabulary, width); of an unknown base, the least that the tokens need."""
        return max(self.words, max(self.tokens) + 1), self.rows.shape[1]

    def on(self, model_type: str | None, shapes: Shapes | None) -> TokenRows:  # noqa: ARG002
        """With the vocabulary of the base."""
        known = None if shapes is None else shapes(self.weight)
        return replace(self, words=known[0] if known else 0)

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The embedding with `strength` of the change of its rows."""
        import numpy as np

        from taia.arrays import read_array, widen

        refuse_shape(self.weight, self.shape, base.shape)
        tuned: Array = widen(base).copy()
        index, rows = list(self.tokens), widen(read_array(folder, self.rows))
        if strength != 1:
            rows = tuned[index] + np.float32(strength) * (rows - tuned[index])
        tuned[index] = rows
        return tuned

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:  # noqa: ARG002
        """The rows as they are: an adapter has no base to blend them with."""
        assert strength == 1
        return {self.rows.name: stored(folder, self.rows)}


def token_rows(
    name: str, rows: Tensor, settings: Settings
) -> tuple[list[TokenRows], str | None]:  # fmt: skip
    """The rows of one embedding, or what is wrong with them."""
    indices = settings.trainable_token_indices
    if isinstance(indices, dict):
        matching = [
            tokens for target, tokens in indices.items()
            if name == target or name.endswith(f".{target}")
        ]  # fmt: skip
        indices = matching[0] if len(matching) == 1 else None
    if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
        return [], f"{name}: trainable_token_indices does not say which rows its tensor holds"
    if len(rows.shape) != 2 or rows.shape[0] != len(indices):
        return [], f"{name}: {list(rows.shape)} for the rows of {len(indices)} tokens"
    return [TokenRows(name, rows, tuple(indices))], None
