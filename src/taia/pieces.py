"""The bytes of each output tensor, as an ordered stream: copied, blended, or merged.

A splice writes these streams; a verification compares them with what stands on the disk.
Both use the same pieces, so that what is proven is what was done. Memory is bounded: a
copy moves inside the kernel, a blend holds CHUNK elements of each operand, a merge holds
one weight matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taia.checkpoint import Checkpoint, Tensor
from taia.downloads import refuse_holes
from taia.errors import CheckpointError
from taia.fused import Cut, Parts
from taia.holes import refuse_hole
from taia.plan import Decision, Origin, Plan
from taia.stored_names import StoredNames

if TYPE_CHECKING:
    from taia.adapter import Adapter
    from taia.arrays import Array
    from taia.changes import Change

__all__ = ["Blend", "Copy", "Merge", "Parted", "Piece", "pieces"]

BUFFER = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of one stored tensor as they are."""

    folder: Path
    tensor: Tensor

    @property
    def reads(self) -> list[tuple[Path, Tensor]]:
        """The stored tensors that are read, each with its folder."""
        return [(self.folder, self.tensor)]

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most BUFFER."""
        left = self.tensor.bytes
        refuse_hole(self.folder / self.tensor.file, self.tensor.start, self.tensor.stop)
        with (self.folder / self.tensor.file).open("rb", buffering=0) as file:
            file.seek(self.tensor.start)
            while left:
                chunk = file.read(min(BUFFER, left))
                if not chunk:
                    raise _shrunk(self.folder / self.tensor.file)
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, slots=True)
class Blend:
    """base + strength * (tuned - base), element by element."""

    base_folder: Path
    base: Tensor
    tuned_folder: Path
    tuned: Tensor
    strength: float

    @property
    def reads(self) -> list[tuple[Path, Tensor]]:
        """The stored tensors that are read, each with its folder."""
        return [(self.base_folder, self.base), (self.tuned_folder, self.tuned)]

    def chunks(self, first: int = 0, count: int = -1, *, cold: bool = False) -> Iterator[bytes]:
        """The bytes in the dtype of the base; all, or those of `count` elements from `first`.

        `cold`: what the page cache does not hold is read past it.
        """
        from taia.arrays import blended_chunks  # numpy only where something is computed

        return blended_chunks(
            self.base_folder / self.base.file,
            self.base,
            self.tuned_folder / self.tuned.file,
            self.tuned,
            self.strength,
            first,
            self.base.parameters - first if count == -1 else count,
            cold=cold,
        )


@dataclass(frozen=True, slots=True)
class Parted:
    """A fused tensor whose rows are copied or blended, each part at its own strength."""

    base_folder: Path
    base: Tensor
    tuned_folder: Path
    tuned: Tensor
    cut: Cut
    parts: Parts

    @property
    def reads(self) -> list[tuple[Path, Tensor]]:
        """The stored tensors that are read, each with its folder."""
        return [(self.base_folder, self.base), (self.tuned_folder, self.tuned)]

    def chunks(self) -> Iterator[bytes]:
        """The bytes in the dtype of the base."""
        from taia.parted import parted_chunks

        return parted_chunks(
            self.base_folder, self.base, self.tuned_folder, self.tuned, self.cut, dict(self.parts)
        )


@dataclass(frozen=True, slots=True)
class Merge:
    """base + strength * the delta of one change of an adapter; by parts of a fused weight."""

    folder: Path
    base: Tensor
    adapter: Adapter
    module: Change
    strength: float
    cut: Cut | None = None
    parts: Parts = ()

    @property
    def reads(self) -> list[tuple[Path, Tensor]]:
        """The stored tensors that are read, each with its folder; of the base, as an adapter
        is always here as a whole.
        """
        return [(self.folder, self.base)]

    def chunks(self) -> Iterator[bytes]:
        """The bytes in the dtype of the base; one matrix at a time."""
        from taia.arrays import CHUNK, encode, read_array, widen

        weight = widen(read_array(self.folder, self.base))
        tuned = self._tuned(weight).reshape(-1)
        for first in range(0, tuned.size, CHUNK):
            yield encode(tuned[first : first + CHUNK], self.base.dtype, self.strength)

    def _tuned(self, weight: Array) -> Array:
        """The weight with its delta; each part of a fused one at its own strength."""
        if self.cut is None:
            return self.adapter.tuned_weight(self.module, weight, self.strength)
        from taia.parted import row_strengths

        wanted = row_strengths(self.cut, dict(self.parts))
        merged = weight.copy()
        for strength in {strength for _, strength in self.parts} - {0.0}:
            rows = (*[slice(None)] * self.cut.axis, wanted == strength)
            merged[rows] = self.adapter.tuned_weight(self.module, weight, strength)[rows]
        return merged


Piece = Copy | Blend | Parted | Merge


def pieces(plan: Plan, *, fetched: bool = True) -> dict[str, Piece]:
    """The piece of every output tensor, by name. The plan has no faults.

    `fetched` False is for what will download the bytes of remote models that the pieces read;
    for all others a hole in a source is a SourceError.
    """
    lora, whole = {}, {}
    if not isinstance(plan.tuned, Checkpoint):
        named = StoredNames(plan.base)
        lora = {named(m.weight): m for m in plan.tuned.modules.values()}
        whole = {named(name): t for name, t in plan.tuned.whole.items()}
    else:
        whole = dict(plan.tuned.tensors)
    parts = {
        decision.name: _piece(plan, decision, lora.get(decision.name), whole.get(decision.name))
        for decision in plan.decisions
    }
    if fetched:
        refuse_holes({name: part.reads for name, part in parts.items()})
    return parts


def _piece(plan: Plan, decision: Decision, module: Change | None, tuned: Tensor | None) -> Piece:
    base = plan.base.tensors[decision.name]
    if decision.source is Origin.BASE:
        return Copy(plan.base.path, base)
    if decision.source is Origin.TUNED:
        assert tuned is not None
        return Copy(plan.tuned.path, tuned)
    if tuned is not None and decision.cut is not None:
        return Parted(plan.base.path, base, plan.tuned.path, tuned, decision.cut, decision.parts)
    if tuned is not None:
        return Blend(plan.base.path, base, plan.tuned.path, tuned, decision.strength)
    assert module is not None
    assert not isinstance(plan.tuned, Checkpoint)
    return Merge(
        plan.base.path, base, plan.tuned, module, decision.strength, decision.cut, decision.parts
    )


def _shrunk(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: became shorter while it was read")
