"""LoRA and DoRA modules: the delta as a product of two factors.

A module holds A (rank x in) and B (out x rank); its delta is `scale * B @ A`, with
scale = alpha / rank, or alpha / sqrt(rank) under rsLoRA (Hu et al. 2021, arXiv 2106.09685;
Kalajdzievski 2023, arXiv 2312.03732). DoRA rescales the rows of base + delta to trained
magnitudes (Liu et al. 2024, arXiv 2402.09353), so its delta needs the base weight, and a
strength between 0 and 1 is taken of the whole delta: base + strength * (tuned - base).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from taia.changes import Shapes, Sliced, refuse_shape, scaled, stored
from taia.checkpoint import Tensor
from taia.peft_config import Settings

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = ["LORA_PARTS", "LoraBias", "LoraModule", "lora_changes"]

LORA_PARTS = r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|" \
             r"lora_magnitude_vector(?:\.weight)?"  # fmt: skip
"""What PEFT calls the tensors of a module, as a pattern."""

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Where transformers keeps a linear weight as (in, out): its Conv1D."""


def is_conv1d(module: str, model_type: str) -> bool:
    """Whether a module of an architecture is transformers' Conv1D."""
    return model_type in CONV1D_TYPES and module.rpartition(".")[2] in CONV1D_NAMES


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The factors of one module, as stored. Embeddings store theirs under other names.

    rows: what each row of B is multiplied by; nothing for 1 everywhere.
    """

    name: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float
    transposed: bool  # Conv1D stores its weight as (in, out), and the delta likewise
    embedding: bool
    rows: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.a.shape[0]

    @property
    def weight(self) -> str:
        """The name of the weight that the delta belongs to."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the delta belongs to."""
        if self.embedding:
            return self.a.shape[1], self.b.shape[0]
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    @property
    def divisible(self) -> str | None:
        """DoRA is kept whole or not at all; a product takes any strength."""
        return None if self.magnitude is None else "DoRA"

    def on(self, model_type: str | None, shapes: Shapes | None) -> LoraModule:  # noqa: ARG002
        """With the orientation of the architecture.

        PEFT stores one `fan_in_fan_out` for all modules, whatever each of them is.
        """
        if model_type is None or self.embedding:
            return self
        return replace(self, transposed=is_conv1d(self.name, model_type))

    def factors(self, folder: Path) -> tuple[Array, Array]:
        """A (rank x in) and B (out x rank), float32 (float64 if stored so), unscaled."""
        import numpy as np  # only when weights are read

        from taia.arrays import read_array, widen

        a, b = widen(read_array(folder, self.a)), widen(read_array(folder, self.b))
        return a, b * np.array(self.rows, b.dtype)[:, None] if self.rows else b

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The weight with `strength` of its delta, in the shape of `base`."""
        import numpy as np

        from taia.arrays import read_array, widen

        refuse_shape(self.weight, self.shape, base.shape)
        a, b = self.factors(folder)
        wide = widen(base)
        product = np.float32(self.scale) * (b @ a)
        flip = self.embedding or self.transposed
        if flip:
            product = product.T
        if self.magnitude is None:
            summed: Array = wide + np.float32(strength) * product
            return summed
        rows = (wide + product).T if flip else wide + product
        magnitude = widen(read_array(folder, self.magnitude)).reshape(-1, 1)
        rescaled = magnitude / np.linalg.norm(rows, axis=1, keepdims=True) * rows
        full: Array = rescaled.T if flip else rescaled
        if strength == 1:
            return full
        blended: Array = wide + np.float32(strength) * (full - wide)
        return blended

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:
        """A and B padded with zeros to `rank`, scale and strength multiplied into B."""
        import numpy as np

        a, b = self.factors(folder)
        missing = rank - self.rank
        described, raw = stored(folder, self.a)
        if missing:
            described, raw = scaled(self.a, np.pad(a, ((0, missing), (0, 0))), 1.0)
        kept = {self.a.name: (described, raw)}
        padded = np.pad(b, ((0, 0), (0, missing)))
        kept[self.b.name] = scaled(self.b, padded, self.scale * strength)
        if self.magnitude is not None:
            kept[self.magnitude.name] = stored(folder, self.magnitude)
        return kept


@dataclass(frozen=True, slots=True)
class LoraBias:
    """The bias of a B factor (`lora_bias`): the module's bias changes by scale * bias."""

    name: str
    bias: Tensor
    scale: float
    divisible: None = None

    @property
    def weight(self) -> str:
        """The bias of the module."""
        return f"{self.name}.bias"

    @property
    def shape(self) -> tuple[int, ...]:
        """One number an output."""
        return self.bias.shape

    def on(self, model_type: str | None, shapes: Shapes | None) -> LoraBias:  # noqa: ARG002
        """The same on every base."""
        return self

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The bias with `strength` of its delta."""
        import numpy as np

        from taia.arrays import read_array, widen

        refuse_shape(self.weight, self.shape, base.shape)
        delta = np.float32(self.scale) * widen(read_array(folder, self.bias))
        summed: Array = widen(base) + np.float32(strength) * delta
        return summed

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:  # noqa: ARG002
        """The bias, scale and strength multiplied into it."""
        from taia.arrays import read_array, widen

        values = widen(read_array(folder, self.bias))
        return {self.bias.name: scaled(self.bias, values, self.scale * strength)}


def lora_changes(
    name: str, parts: Mapping[str, Tensor], settings: Settings
) -> tuple[list[LoraModule | LoraBias], str | None]:
    """What the tensors of one module change, or what is wrong with them.

    `parts` are the tensors by the last parts of their names, without `.weight`.
    """
    fault = _fault(name, parts) or _contradiction(name, parts, settings)
    if fault:
        return [], fault
    embedding = "lora_embedding_A" in parts
    a = parts["lora_embedding_A" if embedding else "lora_A"]
    module = LoraModule(
        name=name,
        a=a,
        b=parts["lora_embedding_B" if embedding else "lora_B"],
        magnitude=parts.get("lora_magnitude_vector"),
        scale=settings.scale(name, a.shape[0]),
        transposed=settings.fan_in_fan_out and not embedding,
        embedding=embedding,
    )
    bias = parts.get("lora_B.bias")
    return [module, *([LoraBias(name, bias, module.scale)] if bias else [])], None


def _fault(name: str, parts: Mapping[str, Tensor]) -> str | None:
    embedding = "lora_embedding_A" in parts
    a = parts.get("lora_embedding_A" if embedding else "lora_A")
    b = parts.get("lora_embedding_B" if embedding else "lora_B")
    if a is None or b is None:
        return f"{name}: has {', '.join(sorted(parts))} but not both factors"
    if embedding and "lora_A" in parts:
        return f"{name}: has the factors of an embedding and of a linear layer"
    if len(a.shape) != 2 or len(b.shape) != 2 or not 0 < a.shape[0] == b.shape[1]:
        return f"{name}: factors of shapes {list(a.shape)} and {list(b.shape)} have no product"
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    if magnitude is not None and magnitude.parameters != b.shape[0]:
        return f"{name}: a magnitude of shape {list(magnitude.shape)} for {b.shape[0]} rows"
    if bias is not None and bias.shape != b.shape[:1]:
        return f"{name}: a bias of shape {list(bias.shape)} for {b.shape[0]} rows"
    return None


def _contradiction(name: str, parts: Mapping[str, Tensor], settings: Settings) -> str | None:
    """Where the configuration says another delta than the tensors: PEFT would drop or add one."""
    a = parts.get("lora_embedding_A") or parts["lora_A"]
    if a.shape[0] != settings.rank(name):
        return f"{name}: of rank {a.shape[0]}, the configuration says {settings.rank(name)}"
    for part, setting, stated in (
        ("lora_magnitude_vector", "use_dora", settings.use_dora),
        ("lora_B.bias", "lora_bias", settings.lora_bias),
    ):
        if part in parts and not stated:
            return f"{name}: has a {part}, the configuration does not say {setting}"
    if settings.use_dora and "lora_magnitude_vector" not in parts:
        return f"{name}: has no lora_magnitude_vector, the configuration says use_dora"
    return None
