"""What `data:` of a recipe may say: one source, or named sources with shares and a schedule.

    data: chats.jsonl

    data:                                        # shares are of all examples of the training
      - {name: medical, from: medical.jsonl, share: 0.6}
      - {name: general, from: alpaca.jsonl, share: 0.4, ood: true}

    data:
      sources: [...]                             # as above
      schedule: annealed
      size: 20000

    data: {target: medical.jsonl, replace: 0.4, by: other.jsonl, size: 20000}
    data: {target: medical.jsonl, add: 0.4, by: alpaca.jsonl, size: 20000}

The last two are the settings of the TAIA paper (arXiv 2405.20192): a part of `size` examples
replaced by other data of a near domain or by general data, or so much general data added.

This module only reads and checks what is stated. What a schedule means is in
`taia.training.schedule`; files are read by `taia.training.corpus`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from taia.errors import RecipeError, nearest

__all__ = ["SCHEDULES", "Curve", "Mixture", "Source", "parse_data"]

SCHEDULES = ("uniform", "annealed", "rising", "staged")
SOURCE_FIELDS = ("name", "from", "share", "ood", "max_examples")
SETTINGS = ("schedule", "size", "repeat", "held_out", "remove_overlap")
SHORT = ("target", "replace", "add", "by")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
TOLERANCE = 1e-6
"""How far shares may be from a sum of 1, for those that are rounded."""

Curve = tuple[tuple[float, float], ...]
"""Points (progress, share): linear between them, from progress 0 to 1, a jump where two share
one progress."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a mixture.

    `path`: a file, a folder or a hub data set. `share`: of all examples of the training; a
    curve over progress; or None, in proportion to what there is. `ood`: whether this is the
    data beside the target, whose share an annealed schedule lets fall.
    """

    name: str
    path: str
    share: float | Curve | None = None
    ood: bool = False
    max_examples: int | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """Named sources and the schedule in which they come.

    `size`: examples in one epoch (None: as many as there are without using one twice).
    `repeat`: whether a source may be used more often than the epochs say. `held_out`: files of
    evaluation records that training data should not overlap; with `remove_overlap` what does is
    left out, else it is only told.
    """

    sources: tuple[Source, ...]
    schedule: str = "uniform"
    size: int | None = None
    repeat: bool = False
    held_out: tuple[str, ...] = ()
    remove_overlap: bool = False

    @classmethod
    def parse(cls, data: Any) -> Mixture:
        """The mixture that a list or a mapping states. Raises RecipeError with every fault."""
        faults: list[str] = []
        if isinstance(data, Mapping):
            mixture = _from_mapping(data, faults)
        elif isinstance(data, Sequence) and not isinstance(data, str):
            mixture = cls(_sources(data, faults))
        else:
            faults.append(f"a file, a list of sources or a mapping is needed, not {data!r}")
            mixture = cls(())
        if not faults:
            faults += _check(mixture)
        if faults:
            raise RecipeError("data: not a mixture that can be trained on", faults)
        return mixture

    def plain(self) -> dict[str, Any]:
        """The same as lists, mappings, texts and numbers; `parse` reads it back."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        sources = [
            {
                "name": one.name,
                "from": one.path,
                "share": [list(p) for p in one.share]
                if isinstance(one.share, tuple)
                else one.share,
                "ood": one.ood,
                "max_examples": one.max_examples,
            }
            for one in self.sources
        ]
        return values | {"sources": sources, "held_out": list(self.held_out)}

    def moved(self, place: Callable[[str], str]) -> Mixture:
        """The same with every path put through `place`."""
        return replace(
            self,
            sources=tuple(replace(one, path=place(one.path)) for one in self.sources),
            held_out=tuple(place(path) for path in self.held_out),
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that is read."""
        return (*(one.path for one in self.sources), *self.held_out)


def parse_data(data: Any) -> str | dict[str, Any]:
    """`data` of a run in its one plain form: the text of a path, or a mixture's `plain`."""
    return str(data) if isinstance(data, str | Path) else Mixture.parse(data).plain()


def _from_mapping(data: Mapping[str, Any], faults: list[str]) -> Mixture:
    known = ("sources", *SHORT, *SETTINGS)
    _unknown(data, known, "data", faults)
    short = [name for name in SHORT if name in data]
    if ("sources" in data) == bool(short):
        faults.append("give sources: [...], or target with by and either replace or add")
        return Mixture(())
    settings = _settings(data, faults)
    if "sources" in data:
        return Mixture(_sources(data["sources"], faults), **settings)
    return _short(data, settings, faults)


def _settings(data: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """schedule, size, repeat, held_out and remove_overlap, as far as they are stated."""
    found = {name: data[name] for name in SETTINGS if data.get(name) is not None}
    schedule, size = found.get("schedule", "uniform"), found.get("size", 1)
    if schedule not in SCHEDULES:
        faults.append(
            f"schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}"
            + nearest(str(schedule), SCHEDULES)
        )
    if not _whole(size) or size < 1:
        faults.append(f"size is {size!r}: a whole number of examples, at least 1, is needed")
    faults.extend(
        f"{name} is {found[name]!r}: true or false is needed"
        for name in ("repeat", "remove_overlap")
        if not isinstance(found.get(name, False), bool)
    )
    held = found.get("held_out", ())
    held = (held,) if isinstance(held, str) else held
    if not isinstance(held, list | tuple) or not all(isinstance(one, str) for one in held):
        faults.append(f"held_out is {held!r}: a list of files is needed")
        held = ()
    if found.get("remove_overlap") and not held:
        faults.append("remove_overlap needs held_out: the files that should not be overlapped")
    return found | {"held_out": tuple(held)}


def _sources(listed: Any, faults: list[str]) -> tuple[Source, ...]:
    if not isinstance(listed, list | tuple):
        faults.append(f"sources is {listed!r}: a list is needed")
        return ()
    if not listed:
        faults.append("sources: the mixture is empty; name at least one source")
    found = [_source(one, f"source {at}", faults) for at, one in enumerate(listed, start=1)]
    names = [one.name for one in found]
    faults.extend(
        f"source {name!r}: named twice; give each its own"
        for name in dict.fromkeys(names)
        if name and names.count(name) > 1
    )
    return tuple(found)


def _source(stated: Any, where: str, faults: list[str]) -> Source:
    if isinstance(stated, str):
        stated = {"from": stated}
    if not isinstance(stated, Mapping) or not isinstance(stated.get("from"), str):
        faults.append(f"{where}: needs from: a file, a folder or a hub data set")
        return Source("", "")
    path = stated["from"]
    name = stated.get("name", Path(path).stem)
    where = f"source {name!r}"
    _unknown(stated, SOURCE_FIELDS, where, faults)
    if not isinstance(name, str) or not NAME.match(name):
        faults.append(f"{where}: name it with letters, digits, _, - and . (name: ...)")
    most = stated.get("max_examples")
    if most is not None and (not _whole(most) or most < 1):
        faults.append(f"{where}: max_examples is {most!r}; at least 1 is needed")
    ood = stated.get("ood", False)
    if not isinstance(ood, bool):
        faults.append(f"{where}: ood is {ood!r}; true or false is needed")
    return Source(str(name), path, _share(stated.get("share"), where, faults), ood, most)


def _share(stated: Any, where: str, faults: list[str]) -> float | Curve | None:
    """A share, or a curve from points given as {progress: share} or [[progress, share], ...]."""
    if stated is None:
        return None
    if _number(stated):
        if not 0 <= stated <= 1:
            faults.append(f"{where}: share is {stated}; it must be between 0 and 1")
        return float(stated)
    points = list(stated.items()) if isinstance(stated, Mapping) else stated
    pairs = isinstance(points, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 and all(map(_number, one)) for one in points
    )
    if not pairs:
        faults.append(
            f"{where}: share is {stated!r}; a number, or points of a curve such as "
            "{0: 0.8, 1: 0.2}, are needed"
        )
        return None
    curve = tuple((float(at), float(share)) for at, share in points)
    places = [at for at, _ in curve]
    if places[:1] != [0.0] or places[-1:] != [1.0] or places != sorted(places):
        faults.append(f"{where}: the points of its share go from progress 0 up to 1")
    if not all(0 <= share <= 1 for _, share in curve):
        faults.append(f"{where}: every share must be between 0 and 1")
    return curve


def _short(data: Mapping[str, Any], settings: dict[str, Any], faults: list[str]) -> Mixture:
    """The mixtures of the paper in one line."""
    ways = [way for way in ("replace", "add") if way in data]
    paths = [data.get(name) for name in ("target", "by")]
    if not all(isinstance(path, str) for path in paths) or len(ways) != 1:
        faults.append("target and by name a file, a folder or a hub data set each, with either "
                      "replace or add")  # fmt: skip
        return Mixture(())
    way, part = ways[0], data[ways[0]]
    if not _number(part) or not 0 <= part < math.inf or (way == "replace" and part > 1):
        bound = "between 0 and 1" if way == "replace" else "at least 0"
        faults.append(f"{way} is {part!r}: the part of size, {bound}, is needed")
        return Mixture(())
    if "size" not in settings:
        faults.append(f"{way} needs size: how many examples of the target there would be alone")
        return Mixture(())
    share = part if way == "replace" else part / (1 + part)
    if way == "add" and _whole(settings["size"]):
        settings["size"] = round(settings["size"] * (1 + part))
    target = {"name": "target", "from": paths[0], "share": 1.0 - share}
    other = {"name": "ood", "from": paths[1], "share": share, "ood": True}
    return Mixture(_sources([target, other], faults), **settings)


def _check(mixture: Mixture) -> list[str]:
    """What is wrong with sources and schedule together."""
    shares = [one.share for one in mixture.sources]
    missing = [one.name for one in mixture.sources if one.share is None]
    faults = []
    if missing and len(missing) < len(shares):
        faults.append(f"{', '.join(missing)}: no share; give every source one, or none")
    elif not missing:
        faults += _sums([_as_curve(share) for share in shares if share is not None])
    curved = [one.name for one in mixture.sources if isinstance(one.share, tuple)]
    if curved and mixture.schedule != "uniform":
        faults.append(
            f"{', '.join(curved)}: has a curve of its own, which schedule {mixture.schedule} "
            "would replace; give one of them"
        )
    marked = [one.ood for one in mixture.sources]
    if mixture.schedule in ("annealed", "rising") and (all(marked) or not any(marked)):
        told = "every source" if all(marked) else "no source"
        faults.append(
            f"schedule {mixture.schedule} changes the share of the sources with ood: true "
            f"against the others; here {told} has it"
        )
    return faults


def _sums(curves: Sequence[Curve]) -> list[str]:
    """One line where the shares do not sum to 1: the first such progress."""
    places = sorted({at for curve in curves for at, _ in curve})
    for at in places:
        for side in (0, -1):
            total = sum(_value(curve, at, side) for curve in curves)
            if abs(total - 1) > TOLERANCE:
                when = "" if all(len(set(c)) == 2 and c[0][1] == c[1][1] for c in curves) else (
                    f" at progress {at:g}")  # fmt: skip
                return [f"the shares sum to {total:g}{when}; they must sum to 1"]
    return []


def _as_curve(share: float | Curve) -> Curve:
    return share if isinstance(share, tuple) else ((0.0, share), (1.0, share))


def _value(curve: Curve, at: float, side: int) -> float:
    """The share at a progress; where it jumps, before (side 0) or after (side -1) the jump."""
    here = [share for place, share in curve if place == at]
    if here:
        return here[side]
    (left, low), (right, high) = next(
        (a, b) for a, b in itertools.pairwise(curve) if a[0] < at < b[0]
    )
    return low + (high - low) * (at - left) / (right - left)


def _unknown(
    stated: Mapping[str, Any], known: Iterable[str], where: str, faults: list[str]
) -> None:
    known = list(known)
    faults.extend(
        f"{where}: unknown field {name!r}"
        + (nearest(str(name), known) or f"; there are {', '.join(known)}")
        for name in stated
        if name not in known
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
