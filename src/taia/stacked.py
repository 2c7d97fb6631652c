"""LoRA on a parameter rather than a module (`target_parameters`): stacked experts, mostly.

PEFT wraps the module once for each of its parameters that is trained, and the wrappers nest,
so the keys say `experts.lora_A` and `experts.base_layer.lora_A` and name no parameter. The
outermost wrapper belongs to the parameter that the module registers last. All experts of a
parameter share one pair of tensors: A is (experts * rank, in), expert after expert, and B is
(out, rank * experts), where the expert changes fastest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from taia.changes import PREFIX, Shapes, Sliced, refuse_shape, scaled
from taia.checkpoint import Tensor
from taia.peft_config import Settings

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = ["NESTED", "StackedModule", "stacked_changes", "targeted"]

NESTED = ".base_layer"

ORDER = (
    "weight", "gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj",
    "down_proj_bias",
)  # fmt: skip
"""The order in which the expert modules of transformers register their parameters."""

IN_OUT_TYPES = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
"""Architectures whose stacked experts are (experts, in, out); elsewhere (experts, out, in)."""


@dataclass(frozen=True, slots=True)
class StackedModule:
    """The factors of one parameter of a module, for all its experts."""

    name: str
    parameter: str
    a: Tensor
    b: Tensor
    experts: int
    scale: float
    in_out: bool = False
    flat: bool = False  # a matrix, of no experts
    divisible: None = None

    @property
    def rank(self) -> int:
        """The inner dimension of the product of each expert."""
        return self.a.shape[0] // self.experts

    @property
    def weight(self) -> str:
        """The name of the parameter."""
        return f"{self.name}.{self.parameter}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in), or (experts, in, out); (out, in) without experts."""
        out, into = self.b.shape[0], self.a.shape[1]
        if self.flat:
            return (out, into)
        return (self.experts, into, out) if self.in_out else (self.experts, out, into)

    def on(self, model_type: str | None, shapes: Shapes | None) -> StackedModule:
        """With the orientation of the base: by its shape, and by its architecture if square."""
        known = None if shapes is None else shapes(self.weight)
        out, into = self.b.shape[0], self.a.shape[1]
        if known is None or out == into:
            in_out = model_type in IN_OUT_TYPES
        else:
            in_out = known[-2:] == (into, out)
        flat = self.experts == 1 and known is not None and len(known) == 2
        return replace(self, in_out=in_out and not flat, flat=flat)

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The parameter with `strength` of its delta, one expert at a time."""
        import numpy as np

        from taia.arrays import widen

        refuse_shape(self.weight, self.shape, base.shape)
        tuned: Array = widen(base).copy()
        stack = tuned[None] if self.flat else tuned
        for expert in range(self.experts):
            delta = self.delta(folder, expert)
            stack[expert] += np.float32(strength) * (delta.T if self.in_out else delta)
        return tuned

    def delta(self, folder: Path, expert: int) -> Array:
        """The delta of one expert, (out, in)."""
        import numpy as np

        from taia.arrays import read_array, widen

        size = self.rank * self.a.shape[1]
        a = read_array(folder, self.a, expert * size, size).reshape(self.rank, -1)
        b = read_array(folder, self.b).reshape(self.b.shape[0], -1, self.experts)[:, :, expert]
        delta: Array = np.float32(self.scale) * (widen(b) @ widen(a))
        return delta

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:
        """A and B with every expert padded to `rank`, scale and strength multiplied into B."""
        return self.nested(folder, strength, rank, depth=0)

    def nested(self, folder: Path, strength: float, rank: int, depth: int) -> Sliced:
        """The same under the key of the wrapper `depth` below the outermost."""
        import numpy as np

        a, b = self._factors(folder)
        missing = rank - self.rank
        a = np.pad(a, ((0, 0), (0, missing), (0, 0))).reshape(-1, self.a.shape[1])
        b = np.pad(b, ((0, 0), (0, missing), (0, 0))).reshape(self.b.shape[0], -1)
        stem = f"{PREFIX}{self.name}{NESTED * depth}.lora_"
        first, second = f"{stem}A.weight", f"{stem}B.weight"
        return {
            first: scaled(self.a, a, 1.0, first),
            second: scaled(self.b, b, self.scale * strength, second),
        }

    def _factors(self, folder: Path) -> tuple[Array, Array]:
        """A as (experts, rank, in) and B as (out, rank, experts), unscaled."""
        from taia.arrays import read_array, widen

        a = widen(read_array(folder, self.a)).reshape(self.experts, -1, self.a.shape[1])
        return a, widen(read_array(folder, self.b)).reshape(self.b.shape[0], -1, self.experts)


def targeted(module: str, settings: Settings) -> list[str]:
    """The parameters of a module that `target_parameters` names, matched as PEFT matches."""
    found = []
    for target in settings.target_parameters or ():
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    return sorted(set(found), key=lambda p: (ORDER.index(p) if p in ORDER else -1, p))


def stacked_changes(
    module: str, wrappers: Mapping[int, Mapping[str, Tensor]], settings: Settings
) -> tuple[list[StackedModule], str | None]:
    """What the nested wrappers of one module change, by depth, or what is wrong with them."""
    parameters = targeted(module, settings)
    if sorted(wrappers) != list(range(len(parameters))):
        return [], (
            f"{module}: holds factors of {len(wrappers)} parameters, target_parameters names "
            f"{len(parameters)} of it ({', '.join(parameters)})"
        )
    if len(parameters) > 1 and not set(parameters) <= set(ORDER):
        return [], f"{module}: the order of its parameters {', '.join(parameters)} is not known"
    changes = []
    for depth, parameter in enumerate(reversed(parameters)):
        parts = wrappers[depth]
        a, b, full = parts.get("lora_A"), parts.get("lora_B"), f"{module}.{parameter}"
        rank = settings.rank(full)
        if (
            a is None or b is None or len(parts) != 2 or len(a.shape) != 2 or len(b.shape) != 2
            or not 0 < a.shape[0] == b.shape[1] or a.shape[0] % rank
        ):  # fmt: skip
            shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in parts.items())
            return [], f"{full}: {shapes} are no factors of rank {rank}"
        scale = settings.scale(full, rank)
        changes.append(StackedModule(module, parameter, a, b, a.shape[0] // rank, scale))
    return changes, None
