"""A routed mixture of LoRA experts on one module (MoLoRA), as stored: a change without a delta.

The factors of all experts lie one after the other, A as (experts * rank, in) and B as
(out, experts * rank), beside a router of a weight (experts, in) and a bias (experts,), which a
single expert lacks. What a module adds depends on its input, so no weight can hold it: a slice
keeps the mixture as a mixture or drops it whole, and a merge refuses it. The method itself is
`taia.molora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from taia.changes import Change, Shapes, Sliced, scaled, stored
from taia.checkpoint import Tensor
from taia.errors import MismatchError
from taia.lora import LORA_PARTS, is_conv1d, lora_changes
from taia.peft_config import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from taia.arrays import Array

__all__ = ["EXPERTS_PARTS", "NO_DELTA", "Experts", "expert_changes"]

FACTORS = ("lora_experts_A", "lora_experts_B")
ROUTER = ("lora_router", "lora_router.bias")

EXPERTS_PARTS = LORA_PARTS + (
    r"|lora_experts_A\.weight|lora_experts_B\.weight|lora_router\.weight|lora_router\.bias"
)
"""What the tensors of a module are called, as a pattern."""

NO_DELTA = (
    "a mixture of LoRAs depends on its input, so it has no delta to merge; keep a selection "
    "without it, such as `attention`"
)


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts and the router of one module."""

    name: str
    a: Tensor
    b: Tensor
    router: tuple[Tensor, ...]
    scale: float
    transposed: bool
    divisible: None = None

    @property
    def experts(self) -> int:
        """How many pairs of factors there are."""
        return self.router[0].shape[0] if self.router else 1

    @property
    def rank(self) -> int:
        """The rank of each expert."""
        return self.a.shape[0] // self.experts

    @property
    def weight(self) -> str:
        """The weight that the mixture stands beside; it has that weight's address."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of that weight."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    def on(self, model_type: str | None, shapes: Shapes | None) -> Experts:  # noqa: ARG002
        """With the orientation of the architecture."""
        if model_type is None:
            return self
        return replace(self, transposed=is_conv1d(self.name, model_type))

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:  # noqa: ARG002
        """Always refused: there is no such weight."""
        raise MismatchError(f"{folder}: {self.weight}: {NO_DELTA}")

    def factors(self, folder: Path) -> list[tuple[Array, Array]]:
        """A (rank x in) and B (out x rank) of each expert, float32 or wider, unscaled."""
        import numpy as np

        from taia.arrays import read_array, widen

        a, b = (widen(read_array(folder, tensor)) for tensor in (self.a, self.b))
        parts = np.split(a, self.experts), np.split(b, self.experts, axis=1)
        return list(zip(*parts, strict=True))

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:
        """Each expert padded with zeros to `rank`, scale and strength multiplied into B."""
        import numpy as np

        missing = (0, rank - self.rank)
        pairs = self.factors(folder)
        kept = {tensor.name: stored(folder, tensor) for tensor in (self.a, *self.router)}
        if rank != self.rank:
            padded = np.concatenate([np.pad(a, (missing, (0, 0))) for a, _ in pairs])
            kept[self.a.name] = scaled(self.a, padded, 1.0)
        side = np.concatenate([np.pad(b, ((0, 0), missing)) for _, b in pairs], axis=1)
        kept[self.b.name] = scaled(self.b, side, self.scale * strength)
        return kept


def expert_changes(
    name: str, parts: Mapping[str, Tensor], settings: Settings
) -> tuple[Sequence[Change], str | None]:
    """What the tensors of one module of a MoLoRA adapter change, or what is wrong with them."""
    stated = settings.experts_of(name)
    if parts.keys().isdisjoint({*FACTORS, *ROUTER}):
        if stated:
            return [], f"{name}: plain LoRA, the configuration says {stated} experts"
        return lora_changes(name, parts, settings)
    fault = _fault(name, parts)
    if fault:
        return [], fault
    a, b = (parts[part] for part in FACTORS)
    made = Experts(
        name=name,
        a=a,
        b=b,
        router=tuple(parts[part] for part in ROUTER if part in parts),
        scale=1.0,
        transposed=settings.fan_in_fan_out,
    )
    if made.experts != stated:
        return [], f"{name}: {made.experts} experts, the configuration says {stated}"
    return [replace(made, scale=settings.scale(name, made.rank))], None


def _fault(name: str, parts: Mapping[str, Tensor]) -> str | None:
    if parts.keys() not in (set(FACTORS), {*FACTORS, *ROUTER}):
        return f"{name}: has {', '.join(sorted(parts))}, which is no whole mixture of experts"
    a, b = (parts[part].shape for part in FACTORS)
    router = [parts[part].shape for part in ROUTER if part in parts]
    experts = router[0][0] if router and router[0] else 1
    fits = len(a) == len(b) == 2 and 0 < a[0] == b[1] and experts > 0 and a[0] % experts == 0
    if not fits or (router and router != [(experts, a[1]), (experts,)]):
        told = ", ".join(f"{part} {list(parts[part].shape)}" for part in sorted(parts))
        return f"{name}: no mixture of experts has these shapes: {told}"
    return None
