"""The selection that gives every address of a model a certain strength, if there is one.

The other direction of `Selection.strengths`: well-known selections are tried first, then one
is put together kind by kind, by projection where a kind has several strengths, by layers where
a projection has. What is found is parsed and checked again; what cannot be said is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from taia.errors import SelectionError
from taia.kinds import Address, Kind
from taia.selection import PRESETS, Constant, Layers, Linear, Selection, Term

__all__ = ["selection_of"]

NEAR = 2e-3
"""How far strengths may be apart: rounding to bfloat16 hides smaller differences."""

MOST_TERMS = 64
"""A longer selection explains nothing."""


def selection_of(strengths: Mapping[Address, float | None]) -> str | None:
    """A short selection with these strengths; None stands for any strength. None if none is found.

    An address without a layer, or a projection, is reached only through its whole kind.
    """
    known = {address: value for address, value in strengths.items() if value is not None}
    if not known:
        return "none"
    every = _by_layers(Term(None), strengths)
    at_once = None if every is None else str(Selection(tuple(every)))
    for text in (
        *PRESETS.values(),
        *_with_one_strength(known),
        at_once,
        _put_together(strengths),
    ):
        if text is not None and _holds(text, strengths):
            return str(Selection.parse(text))
    return None


def _holds(text: str, strengths: Mapping[Address, float | None]) -> bool:
    try:
        given = Selection.parse(text).strengths(strengths)
    except SelectionError:
        return False
    return all(
        value is None or abs(given[address] - value) <= (NEAR if value not in (0, 1) else 0)
        for address, value in strengths.items()
    )


def _with_one_strength(known: Mapping[Address, float]) -> Iterator[str]:
    """`all*s` and the presets at the one strength that there is."""
    values = {value for value in known.values() if value != 0}
    if len(values) == 1:
        yield str(Term(None, strength=Constant(values.pop())))


def _put_together(strengths: Mapping[Address, float | None]) -> str | None:
    terms: list[Term] = []
    for kind in Kind:
        there = {a: v for a, v in strengths.items() if a.kind == kind}
        if not there:
            continue
        towers = dict.fromkeys(address.tower for address in there)
        whole = _terms(Term(kind), there)
        if whole is not None or len(towers) == 1:
            parts: list[list[Term] | None] = [whole]
        else:
            parts = [
                _terms(
                    Term(kind, tower=tower), {a: v for a, v in there.items() if a.tower == tower}
                )
                for tower in towers
            ]
        for part in parts:
            if part is None:
                return None
            terms += part
    return str(Selection(tuple(terms))) if len(terms) <= MOST_TERMS else None


def _terms(term: Term, there: Mapping[Address, float | None]) -> list[Term] | None:
    """Terms that give what `term` names its strengths: as one, by layers, then by projection."""
    found = _by_layers(term, there)
    if found is not None:
        return found
    by_projection = [
        _by_layers(
            Term(term.kind, projection, tower=term.tower),
            {a: v for a, v in there.items() if a.projection == projection},
        )
        for projection in dict.fromkeys(a.projection for a in there if a.projection is not None)
    ]
    bare = {v for a, v in there.items() if a.projection is None and v is not None}
    if len(bare) > 1 or None in by_projection:
        return None
    first = [Term(term.kind, tower=term.tower, strength=Constant(bare.pop()))] if bare else []
    kept = [t for part in by_projection if part is not None for t in part]
    return first + kept


def _by_layers(term: Term, there: Mapping[Address, float | None]) -> list[Term] | None:
    """One term, a linear one, or one for each run of layers; None if a layer has two strengths."""
    layers: dict[int | None, float] = {}
    for address, value in there.items():
        if value is None:
            continue
        if abs(layers.setdefault(address.layer, value) - value) > NEAR:
            return None
    values = list(layers.values())
    if not any(values):
        return []
    if max(values) - min(values) <= NEAR:
        return [_strong(term, Constant(_plain(values)))]
    indexed = {layer: value for layer, value in layers.items() if layer is not None}
    depth = 1 + max(a.layer for a in there if a.layer is not None)
    outside = layers.get(None)
    linear = _linear(term, indexed, depth)
    if linear and (outside is None or abs(linear[0].strength.at(None, depth) - outside) <= NEAR):
        return linear
    if not outside:
        return _runs(term, indexed, 0)
    whole = _strong(term, Constant(_plain([outside])))
    return [whole, *_runs(term, indexed, outside)]


def _linear(term: Term, layers: Mapping[int, float], depth: int) -> list[Term] | None:
    """The term whose strength rises or falls evenly over all layers."""
    if len(layers) < 3:
        return None
    (low, first), (high, last) = min(layers.items()), max(layers.items())
    slope = (last - first) / (high - low)
    if any(abs(first + slope * (layer - low) - value) > NEAR for layer, value in layers.items()):
        return None
    ends = (first - slope * low, first + slope * (depth - 1 - low))
    return [_strong(term, Linear(_plain([ends[0]]), _plain([ends[1]])))]


def _runs(term: Term, layers: Mapping[int, float], outside: float) -> list[Term]:
    """One term for each run of layers of one strength that is not the one outside of layers."""
    found = []
    for value, run in groupby(sorted(layers.items()), key=lambda item: round(item[1], 3)):
        members = [layer for layer, _ in run]
        if abs(value - outside) > NEAR or (value == 0) != (outside == 0):
            exact = Constant(_plain([layers[layer] for layer in members]))
            narrowed = Layers(members[0], members[-1] + 1)
            found.append(
                Term(term.kind, term.projection, narrowed, term.tower, exact, removes=not value)
            )
    return found


def _strong(term: Term, strength: Constant | Linear) -> Term:
    return Term(term.kind, term.projection, term.layers, term.tower, strength)


def _plain(values: Iterable[float]) -> float:
    """One number for strengths that are nearly the same: the one with the fewest decimals."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    for digits in range(4):
        rounded = round(middle, digits)
        if all(abs(rounded - value) <= NEAR for value in ordered):
            return rounded
    return middle
