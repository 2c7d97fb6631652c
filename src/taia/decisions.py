"""What a plan is: a decision for every output tensor, and what forbids to carry them out.

Values only; they are made in plan.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from taia.checkpoint import Checkpoint, Tensor
from taia.errors import MismatchError
from taia.fused import Cut, Parts
from taia.kinds import Address, Kind
from taia.selection import Selection

if TYPE_CHECKING:
    from taia.adapter import Adapter

__all__ = ["WHOLE", "Decision", "Origin", "Plan"]


class Origin(StrEnum):
    """Where the bytes of an output tensor come from."""

    BASE = "base"
    TUNED = "tuned"
    BLEND = "blend"


WHOLE = {0.0: Origin.BASE, 1.0: Origin.TUNED}
"""Where a tensor is from at the strengths that copy it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One output tensor: its address, its strength, and so its source. `bytes` on disk.

    Where the projections of a fused tensor have different strengths, `cut` says which rows are
    whose, `parts` the strength of each, and `strength` is the mean over the rows.
    """

    name: str
    address: Address
    source: Origin
    strength: float
    bytes: int
    parameters: int
    cut: Cut | None = None
    parts: Parts = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of one splice, in the order of the output, and what forbids it.

    `base` and `tuned` are the sources, brought to one layout: the same names and cuts in both,
    which may be views of the files' bytes. `tuned` is an Adapter when its delta is to be merged
    into the base. `notes` tell what was done beyond the selection, `config` the entries of the
    tuned model's config.json that must change.
    """

    selection: Selection
    base: Checkpoint
    tuned: Checkpoint | Adapter
    decisions: tuple[Decision, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def stored(self, decision: Decision) -> Tensor:
        """The dtype and shape of an output tensor, in the file where it belongs."""
        tensor = self.base.tensors[decision.name]
        if decision.source is not Origin.TUNED or not isinstance(self.tuned, Checkpoint):
            return tensor
        taken = self.tuned.tensors[decision.name]
        return dataclasses.replace(taken, file=tensor.file)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Per kind, and for `all`: tensors, parameters, and bytes by origin."""
        empty = {"tensors": 0, "parameters": 0} | {origin.value: 0 for origin in Origin}
        totals: dict[Kind, dict[str, int]] = {}
        for decision in self.decisions:
            row = totals.get(decision.address.kind)
            if row is None:
                row = totals[decision.address.kind] = dict(empty)
            row["tensors"] += 1
            row["parameters"] += decision.parameters
            row[decision.source] += decision.bytes
        everything = {key: sum(row[key] for row in totals.values()) for key in empty}
        return {kind.value: row for kind, row in totals.items()} | {"all": everything}

    def refuse_faults(self) -> None:
        """Raise MismatchError with every fault, if there is one."""
        if self.faults:
            raise MismatchError(
                f"{self.tuned.text} cannot be spliced into {self.base.text}", self.faults
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, as `taia plan --json` prints it."""
        return {
            "selection": str(self.selection),
            "base": self.base.text,
            "tuned": self.tuned.text,
            "tensors": [_as_json(decision) for decision in self.decisions],
            "totals": self.totals,
            "faults": list(self.faults),
            "notes": list(self.notes),
        }


def _as_json(decision: Decision) -> dict[str, Any]:
    address = decision.address
    plain: dict[str, Any] = {
        "name": decision.name,
        "kind": address.kind.value,
        "layer": address.layer,
        "projection": address.projection,
        "tower": address.tower,
        "source": decision.source.value,
        "strength": decision.strength,
        "bytes": decision.bytes,
    }
    if decision.parts:
        plain["slices"] = [{"projection": name, "strength": s} for name, s in decision.parts]
    return plain
