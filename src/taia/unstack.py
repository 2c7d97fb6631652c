"""LoRA on a parameter, on a base that stores it in parts or under another name.

PEFT trains the live parameter, in which transformers stacks all experts and joins gate and up.
Many families keep them apart on disk, and some call a router otherwise there; `layouts.py` knows
where each stored tensor goes, and a stored tensor then changes by the rows of its expert's delta.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from taia.adapter import Adapter
from taia.changes import Change, Shapes, Sliced, refuse_shape
from taia.checkpoint import Checkpoint
from taia.errors import MismatchError
from taia.layouts import Family, Place, family_of, place_of
from taia.stacked import StackedModule

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = ["unstack"]


@dataclass(frozen=True, slots=True)
class StackedPart:
    """The rows `[first, first + rows)` of the delta of one expert: one stored tensor."""

    whole: StackedModule
    weight: str
    expert: int
    first: int
    rows: int
    divisible: None = None

    @property
    def name(self) -> str:
        """The module that the adapter names."""
        return self.whole.name

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, in)."""
        return self.rows, self.whole.a.shape[1]

    def on(self, model_type: str | None, shapes: Shapes | None) -> StackedPart:  # noqa: ARG002
        """The same: it was made for one base."""
        return self

    def tuned(self, folder: Path, base: Array, strength: float) -> Array:
        """The stored tensor with `strength` of its rows of the delta."""
        import numpy as np

        from taia.arrays import widen

        refuse_shape(self.weight, self.shape, base.shape)
        delta = self.whole.delta(folder, self.expert)[self.first : self.first + self.rows]
        tuned: Array = widen(base) + np.float32(strength) * delta
        return tuned

    def sliced(self, folder: Path, strength: float, rank: int) -> Sliced:  # noqa: ARG002
        """Always refused: what is sliced is the live parameter that was trained."""
        raise MismatchError(
            f"{folder}: {self.weight}: a part of {self.whole.weight}, which is sliced as a whole; "
            "slice the adapter as it was read"
        )


def unstack(base: Checkpoint, adapter: Adapter) -> Adapter:
    """The adapter with every parameter that `base` stores in parts told part by part.

    One that does not fit the parts stays as it is, and is then a fault of the plan.
    """
    apart = [
        change
        for weight, change in adapter.modules.items()
        if isinstance(change, StackedModule) and weight not in base.tensors
    ]
    if not apart:
        return adapter
    family = family_of(base.model_type, base.config)
    places: dict[str, list[tuple[Place, str]]] = defaultdict(list)
    for name in base.tensors:
        place = place_of(name, family)
        places[place.lives[0]].append((place, name))
    modules: dict[str, Change] = dict(adapter.modules)
    for change in apart:
        parts = _parts(change, places, family, base)
        if parts:
            del modules[change.weight]
            modules |= {part.weight: part for part in parts}
    return replace(adapter, modules=modules)


def _parts(
    change: StackedModule,
    places: dict[str, list[tuple[Place, str]]],
    family: Family,
    base: Checkpoint,
) -> list[StackedPart]:
    """A part for each stored tensor; none where they do not make up the parameter."""
    lives = family.key(change.weight), place_of(change.weight, family).lives[0]
    stored = next((places[live] for live in lives if live in places), [])
    found = sorted(stored, key=lambda p: (p[0].item, p[0].source))
    joined = {"stack 0", "concatenate 1"}
    if any(set(place.operations) - joined for place, _ in found):
        return []
    filled: dict[int, int] = defaultdict(int)
    parts = []
    for place, name in found:
        shape = base.tensors[name].shape
        parts.append(StackedPart(change, name, place.item, filled[place.item], shape[0]))
        filled[place.item] += shape[0]
    complete = dict.fromkeys(range(change.experts), change.b.shape[0])
    return parts if dict(filled) == complete else []
