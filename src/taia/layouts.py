"""Two checkpoints of one model that name or stack their tensors differently, brought together.

Files of one architecture differ: a base-model prefix is there or not (`transformer.h.0`,
`h.0`), a multimodal model keeps its language model under another path, experts lie one by one
or stacked, old releases stored buffers, and extra prediction layers are dropped when a model
is saved again. transformers loads all of it through rules; layouts.json, written by
`tools/derive_layouts.py`, has these rules, and here they are followed name by name.

Only names that stand in one of the two checkpoints are looked at, so that the usual pair costs
nothing. Two names that load into the same live tensor are one tensor. Where one side holds it
whole and the other in parts, and the parts lie in the whole one after the other, the whole is
read as views: a Tensor that names the bytes of one part. No weight is decoded for it. The
output then has the layout with the smaller parts, which is the one that transformers saves.

Limits: a transposed, permuted or interleaved tensor is refused, not turned round.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from taia.checkpoint import BITS, Checkpoint, Tensor

__all__ = ["Family", "Place", "align", "families_of", "family_of", "is_known", "place_of"]

INTEGER = re.compile(r"(?<![^.])\d+(?![^.])")
BY_RANGES = ({"stack 0"}, {"stack 0", "concatenate 1"}, {"concatenate 0"}, {"chunk 0"})
"""What keeps every part a range of bytes of the whole."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of transformers: names that `find` matches have the match replaced by `to`.

    scopes: prefixes, one of which a name must have; the rule sees what follows it.
    operations: what is done with the tensors, for a rule that joins or cuts them.
    """

    find: re.Pattern[str]
    to: tuple[str, ...]
    scopes: tuple[str, ...]
    operations: tuple[str, ...]

    def apply(self, name: str) -> tuple[tuple[str, ...], int, str] | None:
        """The names after loading, which pattern it was, and the text that it matched."""
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        if scope is None:
            return None
        rest = name[len(scope) :]
        match = self.find.search(rest)
        if match is None:
            return None
        group = next(key for key, text in match.groupdict().items() if text is not None)
        names = []
        for target in self.to:
            if r"\1" in target:
                target = target.replace(r"\1", match.group(self.find.groupindex[group] + 1))
            names.append(scope + rest.replace(match.group(), target, 1))
        return tuple(names), int(group[1:]), match.group()


@dataclass(frozen=True, slots=True)
class Family:
    """What transformers does with the files of one model type; names as in layouts.json."""

    renamings: tuple[Rule, ...] = ()
    converters: tuple[Rule, ...] = ()
    prefix: str = ""
    ignored: tuple[re.Pattern[str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    outside: frozenset[str] = frozenset()
    left_out: tuple[re.Pattern[str], ...] = ()
    inner: Inner | None = None

    def live(self, key: str) -> str:
        """The name in the live model of what `key` gave a key."""
        if not self.prefix or key.partition(".")[0] in self.outside:
            return key
        return f"{self.prefix}.{key}"

    def is_unsure(self, name: str) -> bool:
        """Whether a rule that is left out may rename a tensor of this name."""
        return any(pattern.search(name) for pattern in self.left_out)

    def key(self, live: str) -> str:
        """A live name without the attribute of the base model, which files may leave out."""
        return live.removeprefix(f"{self.prefix}.") if self.prefix else live


@dataclass(frozen=True, slots=True)
class Inner:
    """A language model of another type than the one that a family's rules were derived with."""

    at: str
    family: Family


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes: all of one live tensor, a part of one, or several of them.

    lives: keys of the live tensors; several for a tensor that loading cuts into them.
    item, source: its place in a list of experts, and among what is joined side by side.
    operations: what loading does with it; none for a tensor that is only renamed.
    """

    lives: tuple[str, ...]
    item: int = 0
    source: int = 0
    operations: tuple[str, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether the live tensor is made of several stored ones."""
        return bool(self.operations) and len(self.lives) == 1


def family_of(model_type: str, config: Mapping[str, Any]) -> Family:
    """The rules of a model type; none for a type that the table does not know.

    config: config.json, which names the class: some classes of one type differ.
    """
    index = _table()["models"].get(model_type)
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        index = _table()["classes"].get(model_type, {}).get(named[0], index)
    return Family() if index is None else _with_text(_family(index), index, config)


def _with_text(family: Family, index: int, config: Mapping[str, Any]) -> Family:
    """The family with the rules of the language model that the config states, where it may."""
    text, stated = _table()["layouts"][index]["text"], config.get("text_config")
    kind = stated.get("model_type") if isinstance(stated, dict) else None
    if text is None or not isinstance(kind, str) or kind == text[1]:
        return family
    return dataclasses.replace(family, inner=Inner(text[0], family_of(kind, {})))


def families_of(model_type: str, config: Mapping[str, Any]) -> list[Family]:
    """The rules of every class of a model type, those of the config's own class first."""
    classes = _table()["classes"].get(model_type, {}).values()
    others = [family_of(model_type, {}), *(_family(index) for index in classes)]
    return list(dict.fromkeys([family_of(model_type, config), *others]))


def is_known(model_type: str) -> bool:
    """Whether the table has this model type, so that its live names are known."""
    return model_type in _table()["models"]


def place_of(name: str, family: Family) -> Place:
    """Where transformers puts a tensor of this name: all renamings, then one converter."""
    for rule in family.renamings:
        found = rule.apply(name)
        if found is not None:
            name = found[0][0]
    for rule in family.converters:
        found = rule.apply(name)
        if found is not None:
            lives, source, matched = found
            items = INTEGER.findall(matched)
            return Place(
                tuple(family.key(live) for live in lives),
                int(items[-1]) if items else 0,
                source,
                rule.operations,
            )
    key = family.key(name)
    inner = family.inner
    if inner is None or not key.startswith(f"{inner.at}."):
        return Place((key,))
    return _place_inside(key.removeprefix(f"{inner.at}."), inner)


def _place_inside(name: str, inner: Inner) -> Place:
    """The place of a tensor of the language model, by its name in there and its own rules."""
    before = f"{inner.at}."
    if inner.family.prefix and name.startswith(f"{inner.family.prefix}."):  # it has a head too
        before += f"{inner.family.prefix}."
    place = place_of(name, inner.family)
    return dataclasses.replace(place, lives=tuple(before + live for live in place.lives))


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("layouts.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def _family(index: int) -> Family:
    entry = _table()["layouts"][index]

    def rules(key: str) -> tuple[Rule, ...]:
        return tuple(
            Rule(
                re.compile(rule["find"]),
                tuple(rule["to"]),
                tuple(rule.get("scopes", ("",))),
                tuple(rule.get("operations", ())),
            )
            for rule in entry[key]
        )

    ignored = tuple(re.compile(text) for text in entry["ignored"])
    return Family(
        rules("renamings"),
        rules("converters"),
        entry["prefix"],
        ignored,
        tuple(entry["tied"].items()),
        frozenset(entry["outside"]),
        tuple(re.compile(text) for text in entry["left_out"]),
    )


Placed = list[tuple[Place, Tensor]]


def align(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Both checkpoints, with one name and one shape of cut for what is the same tensor.

    What cannot be aligned keeps its name. The third value are faults: pairs that load into the
    same tensor and lie differently, with the reason.
    """
    only_base = [tensor for name, tensor in base.tensors.items() if name not in tuned.tensors]
    only_tuned = [tensor for name, tensor in tuned.tensors.items() if name not in base.tensors]
    if not only_base or not only_tuned:
        return base, tuned, []
    family = family_of(base.model_type, base.config)
    groups = _by_live(only_base, family), _by_live(only_tuned, family)
    views: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = ({}, {})
    faults = []
    for live, ours in groups[0].items():
        theirs = groups[1].get(live)
        if theirs is None:
            continue
        try:
            _join(ours, theirs, groups, views)
        except ValueError as reason:
            names = ", ".join(tensor.name for _, tensor in (*ours[:1], *theirs[:1]))
            faults.append(f"{names}: the same tensor, not stored alike: {reason}")
    return _with_views(base, views[0]), _with_views(tuned, views[1]), faults


def _by_live(tensors: Iterable[Tensor], family: Family) -> dict[str, Placed]:
    """Stored tensors by the (first) live tensor that they go into, parts in their order."""
    groups: dict[str, Placed] = defaultdict(list)
    for tensor in tensors:
        place = place_of(tensor.name, family)
        groups[place.lives[0]].append((place, tensor))
    for group in groups.values():
        group.sort(key=lambda pair: (pair[0].item, pair[0].source))
    return groups


def _join(
    ours: Placed,
    theirs: Placed,
    groups: tuple[Mapping[str, Placed], Mapping[str, Placed]],
    views: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]],
) -> None:
    """Decide how two groups are the same. Raises ValueError with the reason if they are not."""
    first, second = ours[0][0], theirs[0][0]
    if [place for place, _ in ours] == [place for place, _ in theirs]:
        for (_, old), (_, new) in zip(ours, theirs, strict=True):
            views[1][new.name] = [dataclasses.replace(new, name=old.name)]
    elif first.is_part and not second.operations:
        _cut(theirs, ours, views[1])
    elif second.is_part and not first.operations:
        _cut(ours, theirs, views[0])
    elif len(first.lives) > 1 and not second.operations:
        _cut(ours, _lives(first, groups[1]), views[0], first)
    elif len(second.lives) > 1 and not first.operations:
        _cut(theirs, _lives(second, groups[0]), views[1], second)
    else:
        raise ValueError("their parts differ")


def _lives(place: Place, groups: Mapping[str, Placed]) -> Placed:
    """The live tensors, each stored whole, that a stored tensor is cut into."""
    found = [groups.get(live, []) for live in place.lives]
    if any(len(group) != 1 or group[0][0].operations for group in found):
        raise ValueError(f"it is one of {', '.join(place.lives)}, and not all of them are there")
    return [group[0] for group in found]


def _cut(
    whole: Placed, parts: Placed, views: dict[str, list[Tensor]], place: Place | None = None
) -> None:
    """Read a whole tensor as ranges of bytes, one for each part, under the parts' names."""
    if len(whole) != 1:
        raise ValueError("one tensor was expected")
    operations = (place or parts[0][0]).operations
    if set(operations) not in BY_RANGES:
        raise ValueError(f"loading it takes {' and '.join(operations)}; save both in one layout")
    stored = whole[0][1]
    if place is None:
        _check_complete([part for part, _ in parts])
    shape = _joined_shape(operations, [(part.item, tensor.shape) for part, tensor in parts])
    if stored.shape != shape:
        raise ValueError(f"shapes differ: {list(stored.shape)}, the parts make {list(shape)}")
    found, position = [], stored.start
    for _, part in parts:
        bits = part.parameters * BITS[stored.dtype]
        if bits % 8:
            raise ValueError(f"a part of it does not begin at a byte of {stored.dtype}")
        size = bits // 8
        found.append(
            Tensor(part.name, stored.dtype, part.shape, stored.file, position, position + size)
        )
        position += size
    assert position == stored.stop
    views[stored.name] = found


def _check_complete(places: Sequence[Place]) -> None:
    """Raise ValueError unless there is every item of every source, once."""
    items = {place.item for place in places}
    sources = {place.source for place in places}
    if items != set(range(len(items))) or sources != set(range(len(sources))):
        raise ValueError("some of its parts are missing")
    if len(places) != len(items) * len(sources):
        raise ValueError("some of its parts are missing")


def _joined_shape(
    operations: Sequence[str], parts: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[int, ...]:
    """The shape of the parts, stacked or side by side. Raises ValueError if they do not fit."""
    rows: dict[int, int] = defaultdict(int)
    for item, shape in parts:
        if not shape or shape[1:] != parts[0][1][1:]:
            raise ValueError("its parts do not fit together")
        rows[item] += shape[0]
    if len(set(rows.values())) > 1:
        raise ValueError("its parts do not fit together")
    joined = (rows[parts[0][0]], *parts[0][1][1:])
    return (len(rows), *joined) if "stack 0" in operations else joined


def _with_views(checkpoint: Checkpoint, views: Mapping[str, Sequence[Tensor]]) -> Checkpoint:
    """The checkpoint with some tensors replaced by views of their bytes, in the same order."""
    if not views:
        return checkpoint
    tensors = {
        part.name: part
        for name, tensor in checkpoint.tensors.items()
        for part in views.get(name, (tensor,))
    }
    return dataclasses.replace(checkpoint, tensors=tensors)
