"""How much of each delta is kept: a small language, its values, its presets.

    attention                       TAIA
    all - ffn - router              TAIA as the authors' code does it for full checkpoints
    attention + ffn[0:8]*0.3        layers by Python slice or list: [0:8], [-4:], [0,5,7]
    attention.q + attention.k       projections
    all*0.5                         WiSE-FT: interpolate every delta
    all*linear(0.2, 1)              strength rising with depth (LiNeS, arXiv 2410.17146)
    attention@language              one tower of a multimodal model
    none                            the base model

Terms apply left to right: `+` sets the strength of what it names, `-` sets it to 0,
what no term names has 0. Strength 0 is the base model, 1 the tuned one; any other
number interpolates or extrapolates.

A term that matches nothing is an error, with one exception: taking away a whole kind
that the model does not have (`- router` on a dense model) leaves nothing to do and
means what it says.

Grammar:
    selection := "none" | ["+"] term (("+" | "-") term)*
    term      := kind ["." projection] ["[" layers "]"] ["@" tower] ["*" strength]
    layers    := slice | integer ("," integer)*
    strength  := number | "linear(" number "," number ")"
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from taia.errors import SelectionError, nearest
from taia.kinds import Address, Kind

__all__ = ["PARTS", "PRESETS", "Constant", "Layers", "Linear", "Selection", "Term"]

PRESETS = {
    "base": "none",
    "vanilla": "all",
    "taia": "attention",
    "taia-full": "all - ffn - router",
    "taif": "ffn",
}
"""Named selections; a name parses wherever a selection does."""

ALL = "all"
PROJECTIONS = ("q", "k", "v", "o", "qkv", "kv", "gate", "up", "down", "gate_up")
PARTS = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up")}
"""What a fused projection holds. Its name also names those, where they are stored apart."""

KINDS = tuple(kind.value for kind in Kind)
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True, slots=True)
class Constant:
    """One strength for every layer."""

    value: float

    def at(self, layer: int | None, layers: int) -> float:  # noqa: ARG002
        """The strength; the same for any layer."""
        return self.value

    def __str__(self) -> str:
        return "" if self.value == 1 else f"*{_number(self.value)}"


@dataclass(frozen=True, slots=True)
class Linear:
    """A strength that changes linearly from the first layer to the last (LiNeS)."""

    first: float
    last: float

    def at(self, layer: int | None, layers: int) -> float:
        """The strength at `layer` of `layers`; what has no layer takes `first`, as in LiNeS."""
        if layer is None or layers < 2:
            return self.first
        if layer == layers - 1:  # free of rounding: 1 is a copy, and nearly 1 is not
            return self.last
        return self.first + (self.last - self.first) * layer / (layers - 1)

    def __str__(self) -> str:
        return f"*linear({_number(self.first)}, {_number(self.last)})"


@dataclass(frozen=True, slots=True)
class Layers:
    """Which layers a term names: a slice, or a list of indices; negative counts from the end."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None
    indices: tuple[int, ...] = ()

    def within(self, layers: int) -> frozenset[int]:
        """The named layers of a tower that has `layers` of them."""
        if self.indices:
            return frozenset(index % layers for index in self.indices if -layers <= index < layers)
        return frozenset(range(layers)[self.start : self.stop : self.step])

    def beyond(self, layers: int) -> list[int]:
        """Listed indices that a tower of `layers` does not have."""
        return [index for index in self.indices if not -layers <= index < layers]

    @property
    def from_end(self) -> bool:
        """Whether it counts from the last layer."""
        return any(n is not None and n < 0 for n in (self.start, self.stop, *self.indices))

    def __str__(self) -> str:
        if self.indices:
            return "[" + ",".join(map(str, self.indices)) + "]"
        text = f"{_blank(self.start)}:{_blank(self.stop)}"
        return f"[{text}]" if self.step is None else f"[{text}:{self.step}]"


@dataclass(frozen=True, slots=True)
class Term:
    """One step of a selection: what it names, and the strength it sets there."""

    kind: Kind | None  # None names every kind: the word `all`
    projection: str | None = None
    layers: Layers | None = None
    tower: str | None = None
    strength: Constant | Linear = Constant(1.0)
    removes: bool = False

    def matches(self, address: Address, layers: int) -> bool:
        """Whether the term names `address`, in a tower that has `layers` layers."""
        if self.kind is not None and address.kind != self.kind:
            return False
        named = (self.projection, *PARTS.get(self.projection or "", ()))
        if self.projection is not None and address.projection not in named:
            return False
        if self.tower is not None and address.tower != self.tower:
            return False
        if self.layers is None:
            return True
        return address.layer is not None and address.layer in self.layers.within(layers)

    @property
    def is_whole_kind(self) -> bool:
        """Whether the term names a kind in full, with nothing narrowing it."""
        return self.projection is None and self.layers is None and self.tower is None

    def __str__(self) -> str:
        text = ALL if self.kind is None else self.kind.value
        text += "" if self.projection is None else f".{self.projection}"
        text += "" if self.layers is None else str(self.layers)
        text += "" if self.tower is None else f"@{self.tower}"
        return text if self.removes else text + str(self.strength)


@dataclass(frozen=True, slots=True)
class Selection:
    """A strength for every address, as an ordered tuple of terms. No terms: the base model."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def parse(cls, text: str | Selection) -> Selection:
        """Read a selection or the name of a preset.

        Raises SelectionError, which points at the column, for anything outside the grammar.
        """
        if isinstance(text, Selection):
            return text
        source = PRESETS.get(text.strip(), text)
        return cls(tuple(_Parser(source).terms()))

    def strengths(
        self, addresses: Iterable[Address], layers: int | None = None
    ) -> dict[Address, float]:
        """The strength of each address of one model.

        `layers` is the depth of the language tower, for an adapter that changes only some of
        them; without it the deepest address counts. Raises SelectionError if a term matches
        no address, listing what there is.
        """
        found = list(dict.fromkeys(addresses))
        depth = _depths(found)
        if layers is not None:
            depth["language"] = max(layers, depth.get("language", 0))
        strengths = dict.fromkeys(found, 0.0)
        faults = []
        for term in self.terms:
            hit = [a for a in found if term.matches(a, depth.get(a.tower, 0))]
            if not hit and not (term.removes and term.is_whole_kind):
                faults.append(f"'{term}' matches nothing{_why_nothing(term, found, depth)}")
            elif term.layers is not None and hit:
                deepest = max(depth[address.tower] for address in hit)
                beyond = ", ".join(map(str, term.layers.beyond(deepest)))
                if beyond:
                    faults.append(f"'{term}': layer {beyond} of a model with {deepest} layers")
            for address in hit:
                value = term.strength.at(address.layer, depth.get(address.tower, 0))
                strengths[address] = 0.0 if term.removes else value
        if faults:
            raise SelectionError(f"selection '{self}': {len(faults)} fault(s)", faults)
        return strengths

    @property
    def needs_depth(self) -> bool:
        """Whether its meaning depends on the number of layers: [-4:], or linear(...)."""
        return any(
            isinstance(term.strength, Linear) or (term.layers is not None and term.layers.from_end)
            for term in self.terms
        )

    def __str__(self) -> str:
        if not self.terms:
            return "none"
        parts = [("- " if term.removes else "+ ") + str(term) for term in self.terms]
        return " ".join(parts).removeprefix("+ ")


class _Parser:
    """One pass over the text, left to right; every failure knows its column."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def terms(self) -> list[Term]:
        self.skip_space()
        if self.take(r"none\b") is not None:
            self.skip_space()
            if self.position < len(self.text):
                self.fail("'none' stands alone")
            return []
        if self.position == len(self.text):
            self.fail("the selection is empty; write 'none' for the base model")
        sign = self.take(r"[+-]") or "+"
        if sign == "-":
            self.position -= 1
            self.fail("a selection begins with what it keeps, for instance 'all - ffn'")
        terms = [self.term("+")]
        while self.position < len(self.text):
            next_sign = self.take(r"[+-]")
            if next_sign is None:
                self.fail("expected '+', '-' or the end")
            terms.append(self.term(next_sign))
        return terms

    def term(self, sign: str) -> Term:
        self.skip_space()
        kind = self.kind()
        projection = self.projection() if self.take(r"\.") else None
        layers = self.layers() if self.take(r"\[") else None
        tower = self.name("tower") if self.take("@") else None
        strength: Constant | Linear = Constant(1.0)
        self.skip_space()
        if self.text.startswith("*", self.position):
            if sign == "-":
                self.fail("'-' sets the strength to 0 and takes none of its own")
            self.position += 1
            strength = self.strength()
        self.skip_space()
        return Term(kind, projection, layers, tower, strength, removes=sign == "-")

    def kind(self) -> Kind | None:
        start = self.position
        word = self.name("kind")
        if word == ALL:
            return None
        if word in KINDS:
            return Kind(word)
        self.position = start
        known = [ALL, *KINDS]
        hint = nearest(word, known)
        if word in PRESETS or word == "none":
            hint = f"; '{word}' stands alone, it cannot be part of a sum"
        self.fail(f"unknown kind '{word}'{hint or '; known are ' + ', '.join(known)}")

    def projection(self) -> str:
        start = self.position
        word = self.name("projection")
        if word not in PROJECTIONS:
            self.position = start
            hint = nearest(word, PROJECTIONS) or "; known are " + ", ".join(PROJECTIONS)
            self.fail(f"unknown projection '{word}'{hint}")
        return word

    def layers(self) -> Layers:
        start = self.position
        body = self.take(r"[^\]]*")
        if self.take(r"\]") is None:
            self.position = start
            self.fail("a layer list is not closed by ']'")
        text = re.sub(r"\s+", "", body or "")
        if re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*,?", text):
            return Layers(indices=tuple(int(part) for part in text.split(",") if part))
        if re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?(:([1-9]\d{0,8})?)?", text):
            first, last, step = [*(int(p) if p else None for p in text.split(":")), None][:3]
            return Layers(first, last, step)
        self.position = start
        self.fail("layers are a slice or a list: [0:8], [-4:], [0,5,7]")

    def strength(self) -> Constant | Linear:
        self.skip_space()
        if self.take(r"linear\s*\("):
            first = self.number()
            if self.take(r"\s*,\s*") is None:
                self.fail("linear takes two numbers: linear(0.2, 1)")
            last = self.number()
            if self.take(r"\s*\)") is None:
                self.fail("linear( is not closed by ')'")
            return Linear(first, last)
        return Constant(self.number())

    def number(self) -> float:
        self.skip_space()
        start = self.position
        text = self.take(NUMBER)
        if text is None:
            self.fail("expected a number")
        value = float(text)
        if not math.isfinite(value):
            self.position = start
            self.fail("a strength is a finite number")
        return value

    def name(self, what: str) -> str:
        word = self.take(r"[A-Za-z_]\w*")
        if word is None:
            self.fail(f"expected the name of a {what}")
        return word

    def take(self, pattern: str) -> str | None:
        match = re.compile(pattern).match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match.group()

    def skip_space(self) -> None:
        self.take(r"\s*")

    def fail(self, message: str) -> NoReturn:
        column = self.position + 1
        line = self.text.replace("\n", " ").replace("\t", " ")
        raise SelectionError(
            f"selection, column {column}: {message}\n  {line}\n  {' ' * (column - 1)}^"
        )


def _depths(addresses: Sequence[Address]) -> dict[str, int]:
    """How many layers each tower has."""
    depths: dict[str, int] = {}
    for address in addresses:
        layers = 0 if address.layer is None else address.layer + 1
        depths[address.tower] = max(layers, depths.get(address.tower, 0))
    return depths


def _why_nothing(term: Term, addresses: Sequence[Address], depths: dict[str, int]) -> str:
    """The end of the message about a term without a match: what there is instead."""
    same_kind = [a for a in addresses if term.kind is None or a.kind == term.kind]
    if not same_kind:
        return "; kinds here: " + ", ".join(sorted({a.kind.value for a in addresses}))
    if term.tower is not None and term.tower not in depths:
        return "; towers here: " + ", ".join(sorted(depths))
    projections = sorted({a.projection for a in same_kind if a.projection})
    if term.projection is not None and term.projection not in projections:
        fused = "; a fused projection is kept or dropped as a whole"
        note = fused if {"qkv", "gate_up"} & set(projections) else ""
        return "; its projections here: " + (", ".join(projections) or "none") + note
    layers = ", ".join(f"{tower} has {count}" for tower, count in sorted(depths.items()) if count)
    return f"; layers here: {layers or 'none'}"


def _number(value: float) -> str:
    """The shortest text that reads back as the same number: 1, 0.5, 1e-07."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _blank(value: int | None) -> str:
    return "" if value is None else str(value)
