"""What an unknown checkpoint is made of: which tensors are the base's, which the tuned model's.

Every tensor is compared with both, byte for byte, on all cores. What equals neither may be a
blend, base + s * (tuned - base): s is the least-squares answer on a sample of the elements,
and it counts as a blend if a splice at that s gives the sample again, to the last place of its
dtype. Where every tensor is explained a selection is looked for that makes the same checkpoint,
and planned: it is named only if every tensor, not only every address, comes out as it is.

Limits: a blend is told by a sample of 16,384 elements, so it is evidence and no proof; the
strength of a float16 or bfloat16 tensor is known only as well as its rounding lets it be. A
fused tensor of which only one projection is kept is neither: it is not looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Any

from taia.checkpoint import FLOATS, Checkpoint, Tensor, open_checkpoint
from taia.compare import Pair, differing
from taia.decisions import WHOLE
from taia.errors import SourceError
from taia.kinds import Address, Kind, classify_all
from taia.plan import has_head, plan
from taia.selection_of import selection_of
from taia.sources import Source
from taia.workers import results

__all__ = ["Explanation", "Match", "Part", "explain"]

SPANS = 16
"""Places of a tensor that are looked at for a blend."""

SPAN = 1024
"""Elements at each place."""

NEAR = 1e-3
"""How far a plain strength may be from the least-squares one."""

CERTAIN = 2e-3
"""With more uncertainty a tensor, for instance a norm in bfloat16, does not tell its strength."""

DIGITS = (0, 1, 2, 3, 4, 6)
"""Decimals of strengths that are tried, the plain ones first."""


class Match(StrEnum):
    """What a tensor is. `BOTH`: base and tuned model have the same bytes there."""

    BASE = "base"
    TUNED = "tuned"
    BOTH = "both"
    BLEND = "blend"
    NEITHER = "neither"
    MISSING = "missing"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor and what it is. `bytes` on disk.

    `strength`: the best s of base + s * (tuned - base), where it is neither base nor tuned and
    can be computed. `residual`: the norm of what is left over that of the delta; 0 is exact.
    `uncertainty`: how far the rounding of the dtype may have moved `strength`.
    """

    name: str
    address: Address | None
    match: Match
    bytes: int
    strength: float | None = None
    residual: float | None = None
    uncertainty: float = 0.0


FIXED = {Match.BASE: 0.0, Match.TUNED: 1.0}
"""The strength of what is copied."""


@dataclass(frozen=True, slots=True)
class Models:
    """What is compared, in one layout, and what the user named as base and tuned."""

    base: Checkpoint
    tuned: Checkpoint
    unknown: Checkpoint
    sources: tuple[str | Path | Source, str | Path | Source]

    def samples(self, name: str) -> list[Any]:
        """The sample of one tensor in each of the three."""
        return [_sample(source, name) for source in (self.base, self.tuned, self.unknown)]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every tensor of the unknown checkpoint and of the base, in the base's order.

    `selection` makes the same checkpoint out of base and tuned; None where none was found, and
    `reason` says why.
    """

    base: str
    tuned: str
    out: str
    parts: tuple[Part, ...]
    selection: str | None
    reason: str = ""

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Per kind, and for `all`: how many tensors are what."""
        totals: dict[str, dict[str, int]] = {}
        for part in self.parts:
            kind = "unknown" if part.address is None else part.address.kind.value
            row = totals.setdefault(kind, {match.value: 0 for match in Match})
            row[part.match.value] += 1
        everything = {match.value: sum(row[match.value] for row in totals.values())
                      for match in Match}  # fmt: skip
        return totals | {"all": everything}

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain values, as `taia plan --against --json` prints it."""
        return {
            "base": self.base,
            "tuned": self.tuned,
            "against": self.out,
            "selection": self.selection,
            "reason": self.reason,
            "totals": self.totals,
            "tensors": [_as_json(part) for part in self.parts],
        }


def explain(
    base: str | Path | Source, tuned: str | Path | Source, out: str | Path | Source
) -> Explanation:
    """Say which tensors of the checkpoint `out` are from `base`, from `tuned`, or from neither.

    `base` and `tuned` are checkpoints of one architecture. Raises a TaiaError for what cannot
    be read, and SourceError if `tuned` is an adapter (merge it first).
    """
    planned = plan(base, tuned, "none")
    first, second = planned.base, planned.tuned
    if not isinstance(second, Checkpoint):
        raise SourceError(
            f"{second.text}: an adapter; merge it with 'all' and name that checkpoint"
        )
    unknown = open_checkpoint(out)
    addresses = classify_all(first.tensors, first.model_type, first.config)
    parts = _compared(first, second, unknown, addresses)
    parts += [
        Part(name, None, Match.ADDED, tensor.bytes)
        for name, tensor in unknown.tensors.items()
        if name not in first.tensors
    ]
    selection, reason = None, "some tensors are of neither model, missing or added"
    if all(part.match not in (Match.NEITHER, Match.MISSING, Match.ADDED) for part in parts):
        models = Models(first, second, unknown, (base, tuned))
        selection, reason = _named(parts, models)
    return Explanation(first.text, second.text, unknown.text, tuple(parts), selection, reason)


def _named(parts: Sequence[Part], models: Models) -> tuple[str | None, str]:
    """The selection that makes every part, or None and the reason; `models` are asked again.

    Small tensors do not propose at first: their rounding hides their strength.
    """
    listed = [p for p in parts if p.address is not None and p.name in models.tuned.tensors]
    certain = [replace(p, strength=None) if p.uncertainty > CERTAIN else p for p in listed]
    reason = ""
    for proposing in (certain, listed):
        text = selection_of(_strengths(proposing))
        if text is None:
            reason = reason or "no selection of moderate length gives these strengths"
            continue
        wrong = _not_made(text, listed, models)
        if not wrong:
            return text, ""
        reason = f"'{text}' comes near and would not make it: {wrong}"
    return None, _conflict(certain) or reason


def _not_made(text: str, parts: Iterable[Part], models: Models) -> str:
    """The first tensor that a splice by a selection would make otherwise; empty if none."""
    planned = plan(*models.sources, text)
    if planned.faults:
        return planned.faults[0]
    decisions = {decision.name: decision for decision in planned.decisions}
    for part in parts:
        decision = decisions[part.name]
        if decision.parts or not _is_made(part, decision.strength, models):
            return part.name
    return ""


def _is_made(part: Part, strength: float, models: Models) -> bool:
    """Whether a splice at `strength` gives a part, as far as its sample tells."""
    if part.match is Match.BOTH or strength == FIXED.get(part.match):
        return True
    if strength in WHOLE:
        return False
    return _gives(models.samples(part.name), strength, exactly=part.match is not Match.BLEND)


def _conflict(parts: Iterable[Part]) -> str:
    """Two tensors that every selection gives one strength, and that are of different ones."""
    seen: dict[Address, Part] = {}
    for part in parts:
        if part.address is None or FIXED.get(part.match, part.strength) is None:
            continue
        other = seen.setdefault(part.address, part)
        ones, others = (FIXED.get(p.match, p.strength) for p in (part, other))
        if ones is not None and others is not None and abs(ones - others) > CERTAIN:
            return (
                f"{other.name} is of strength {others:g} and {part.name} of {ones:g}, and every "
                "selection gives the two one strength"
            )
    return ""


def _compared(
    base: Checkpoint, tuned: Checkpoint, unknown: Checkpoint, addresses: Mapping[str, Address]
) -> list[Part]:
    """Every tensor of the base; bytes are read only where dtype and shape are the same."""
    found = unknown.tensors
    like = {
        id(source): [n for n, t in source.tensors.items() if n in addresses and _alike(t, found, n)]
        for source in (base, tuned)
    }
    not_base = differing(_pairs(unknown, base, like[id(base)]))
    not_tuned = differing(_pairs(unknown, tuned, like[id(tuned)]))
    from_base = set(like[id(base)]) - not_base
    from_tuned = set(like[id(tuned)]) - not_tuned
    parts = []
    for name, address in addresses.items():
        if name not in found:
            match = Match.MISSING
        elif name in from_base:
            match = Match.BOTH if name in from_tuned else Match.BASE
        else:
            match = Match.TUNED if name in from_tuned else Match.NEITHER
        size = (found if name in found else base.tensors)[name].bytes
        parts.append(Part(name, address, match, size))
    comparable = set(like[id(base)]) & set(like[id(tuned)])
    return results(parts, lambda part: _blended(part, base, tuned, unknown, comparable))


def _alike(tensor: Tensor, found: Mapping[str, Tensor], name: str) -> bool:
    other = found.get(name)
    return other is not None and (other.dtype, other.shape) == (tensor.dtype, tensor.shape)


def _pairs(unknown: Checkpoint, source: Checkpoint, names: Iterable[str]) -> list[Pair]:
    return [
        Pair(
            name,
            unknown.path / unknown.tensors[name].file,
            unknown.tensors[name].start,
            source.path / source.tensors[name].file,
            source.tensors[name].start,
            source.tensors[name].bytes,
        )
        for name in names
    ]


def _blended(
    part: Part, base: Checkpoint, tuned: Checkpoint, unknown: Checkpoint, comparable: set[str]
) -> Part:
    """A part that equals neither, with its strength if it is a blend."""
    if part.match is not Match.NEITHER or part.name not in comparable:
        return part
    if base.tensors[part.name].dtype not in FLOATS:
        return part
    import numpy as np

    from taia.arrays import widen

    samples = [_sample(source, part.name) for source in (base, tuned, unknown)]
    old, new, ours = (widen(sample).astype(np.float64) for sample in samples)
    delta, change = new - old, ours - old
    square = float(delta @ delta)
    if not np.isfinite(square) or square == 0:
        return part
    strength = float(change @ delta) / square
    residual = float(np.linalg.norm(change - strength * delta)) / square**0.5
    if not np.isfinite(residual):
        return part
    step = np.abs(ours) * 2.0 ** (1 - _places(samples[2].dtype))
    uncertainty = float(np.linalg.norm(step * delta)) / square
    found = replace(part, strength=strength, residual=residual, uncertainty=uncertainty)
    for value in dict.fromkeys([*(round(strength, digits) for digits in DIGITS), strength]):
        if abs(value - strength) <= max(NEAR, uncertainty) and _gives(samples, value):
            return replace(found, match=Match.BLEND, strength=value)
    return found


def _sample(source: Checkpoint, name: str) -> Any:
    """Up to SPANS * SPAN elements of a tensor, spread evenly, in its own dtype."""
    import numpy as np

    from taia.arrays import read_array

    tensor = source.tensors[name]
    if tensor.parameters <= SPANS * SPAN:
        return read_array(source.path, tensor).reshape(-1)
    starts = [(tensor.parameters - SPAN) * place // (SPANS - 1) for place in range(SPANS)]
    return np.concatenate([read_array(source.path, tensor, start, SPAN) for start in starts])


def _gives(samples: list[Any], strength: float, *, exactly: bool = False) -> bool:
    """Whether a splice at `strength` gives the third sample, to the last place of its dtype.

    exactly: to the last bit, for a third sample that is a copy of one of the others.
    """
    import numpy as np

    from taia.arrays import blend, widen
    from taia.errors import MismatchError

    old, new, ours = samples
    try:
        wide = widen(blend(old, new, strength))
    except MismatchError:
        return False
    actual = widen(ours)
    if exactly:
        return bool((actual == wide).all())
    # the operands' own rounding counts where the result is smaller than they are
    largest = np.maximum(np.abs(wide), np.maximum(np.abs(widen(old)), np.abs(widen(new))))
    step = np.abs(wide) * 2.0 ** (1 - _places(ours.dtype)) + largest * 2.0**-22
    return bool((np.abs(actual - wide) <= step).all())


def _places(dtype: Any) -> int:
    """Binary places of a float's significand, the hidden one too."""
    return {2: 8 if dtype.name == "bfloat16" else 11, 4: 24, 8: 53}[dtype.itemsize]


def _strengths(parts: Iterable[Part]) -> dict[Address, float | None]:
    """The strength of each address; None where base and tuned model are the same.

    Of several tensors the surest blend speaks: a copy may be a blend that rounding undid. A head
    that is not stored is the embedding.
    """
    found: dict[Address, float | None] = {}
    doubts: dict[Address, float] = {}
    for part in parts:
        if part.address is None:
            continue
        value = FIXED.get(part.match, part.strength)
        doubt = inf if value is None or part.match in FIXED else part.uncertainty
        if found.get(part.address) is None or doubt < doubts[part.address]:
            found[part.address], doubts[part.address] = value, doubt
    words = next((a for a in found if a.kind is Kind.EMBEDDING and a.tower == "language"), None)
    if words is not None and not has_head(found):
        found[replace(words, kind=Kind.HEAD)] = found[words]
    return found


def _as_json(part: Part) -> dict[str, Any]:
    address = part.address
    return {
        "name": part.name,
        "kind": None if address is None else address.kind.value,
        "layer": None if address is None else address.layer,
        "projection": None if address is None else address.projection,
        "tower": None if address is None else address.tower,
        "match": part.match.value,
        "bytes": part.bytes,
        "strength": part.strength,
        "residual": part.residual,
    }
