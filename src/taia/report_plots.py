"""The pictures of a report as plain values: axes, curves, heat maps.

Everything here is a pure function from the contents of a run's files to small frozen values,
whose positions are percentages of a chart's width or height. The template puts them on the
page. No third-party plotting code is inlined: the charts are a few kilobytes of HTML and SVG
that follow the reader's colour scheme, scale with the screen and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DASH",
    "MINUS",
    "Axis",
    "Curve",
    "HeatMap",
    "heat_map",
    "label",
    "loss_curve",
    "nice_axis",
    "number",
]

LABELS = {
    "base": "Base",
    "vanilla": "Vanilla",
    "taia": "TAIA",
    "taia-full": "TAIA (full)",
    "taif": "TAIF",
}
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
PROJECTION_ORDER = ("q", "k", "v", "qkv", "kv", "o", "gate", "up", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis: ticks as (position in percent from the low end, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """The position of `value` in percent of the axis, clipped to it."""
        return round(min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low))), 2)


@dataclass(frozen=True, slots=True)
class Curve:
    """Training loss over steps: SVG points in a box of 1000 by 300, and its axes."""

    raw: str
    smooth: str
    x: Axis
    y: Axis
    first: float
    last: float
    steps: int


@dataclass(frozen=True, slots=True)
class Square:
    """One cell of a heat map: shade in percent of the largest value, and its words."""

    shade: float
    title: str


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Size of the deltas by projection and layer, and each kind's share of the whole."""

    relative: bool
    largest: str
    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Square | None, ...]], ...]
    shares: tuple[tuple[str, str, float, str], ...]  # kind, norm, share in percent, its text


def label(name: str) -> str:
    """How a variant is called on paper."""
    return LABELS.get(name, name)


def nice_axis(low: float, high: float, *, signed: bool = False, wanted: int = 5) -> Axis:
    """An axis over [low, high], widened to round ticks of 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    axis = Axis(first * step, last * step, ())
    ticks = tuple(
        (axis.at(index * step), number(index * step, decimals, signed=signed))
        for index in range(first, last + 1)
    )
    return Axis(axis.low, axis.high, ticks)


def loss_curve(log: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The training loss, raw and as a running mean. None with fewer than two points."""
    points = [
        (float(row["step"]), float(row["loss"]))
        for row in log
        if row.get("loss") is not None and math.isfinite(float(row["loss"]))
    ]
    if len(points) < 2 or max(step for step, _ in points) <= 0:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    half = max(1, len(points) // 30)
    windows = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    means = [sum(window) / len(window) for window in windows]
    x = nice_axis(0.0, max(steps))
    x = Axis(0.0, max(steps), tuple(_within(x, max(steps))))
    y = nice_axis(min(0.0, *losses), max(losses), wanted=4)
    return Curve(
        raw=_points(steps, losses, x, y),
        smooth=_points(steps, means, x, y),
        x=x,
        y=y,
        first=means[0],
        last=means[-1],
        steps=int(max(steps)),
    )


def heat_map(deltas: Sequence[Mapping[str, Any]]) -> HeatMap | None:
    """Delta norms by projection and layer; relative to the base weights where these are known."""
    placed = [row for row in deltas if row["layer"] is not None]
    total = sum(row["norm"] ** 2 for row in deltas)
    if not placed or total <= 0:
        return None
    relative = all(row["base_norm"] for row in placed)
    layers = tuple(sorted({row["layer"] for row in placed}))
    squares: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for row in placed:
        cells = squares.setdefault((row["kind"], row["projection"] or ""), {})
        delta, base = cells.get(row["layer"], (0.0, 0.0))
        cells[row["layer"]] = delta + row["norm"] ** 2, base + (row["base_norm"] or 0.0) ** 2
    sizes = {
        key: {at: math.sqrt(d / b if relative else d) for at, (d, b) in cells.items()}
        for key, cells in squares.items()
    }
    largest = max(size for cells in sizes.values() for size in cells.values())
    if largest <= 0:
        return None
    rows = tuple(
        (_projection_name(key), tuple(_square(sizes[key], at, largest, relative) for at in layers))
        for key in sorted(sizes, key=_projection_order)
    )
    return HeatMap(relative, _size(largest, relative), layers, rows, _shares(deltas, total))


def _shares(
    deltas: Iterable[Mapping[str, Any]], total: float
) -> tuple[tuple[str, str, float, str], ...]:
    kinds: dict[str, float] = {}
    for row in deltas:
        kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["norm"] ** 2
    return tuple(
        (kind, f"{math.sqrt(square):.3g}", round(100 * square / total, 2), f"{square / total:.0%}")
        for kind, square in kinds.items()
    )


def _square(
    cells: Mapping[int, float], layer: int, largest: float, relative: bool
) -> Square | None:
    if layer not in cells:
        return None
    size = cells[layer]
    return Square(round(100 * size / largest, 1), f"layer {layer}: {_size(size, relative)}")


def _size(size: float, relative: bool) -> str:
    return f"{100 * size:.2g} %" if relative else f"{size:.3g}"


def _projection_name(key: tuple[str, str]) -> str:
    kind, projection = key
    return f"{kind}.{projection}" if projection else kind


def _projection_order(key: tuple[str, str]) -> tuple[str, int, str]:
    kind, projection = key
    known = projection in PROJECTION_ORDER
    place = PROJECTION_ORDER.index(projection) if known else len(PROJECTION_ORDER)
    return kind, place, projection


def _within(axis: Axis, last: float) -> list[tuple[float, str]]:
    """The ticks of `axis` up to `last`, placed on an axis that ends there."""
    span = axis.high - axis.low
    scaled = [(at * span / last, name) for at, name in axis.ticks]
    return [(round(at, 2), name) for at, name in scaled if at <= 100 + 1e-9]


def _points(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> str:
    return " ".join(
        f"{10 * x.at(a):.1f},{300 - 3 * y.at(b):.1f}" for a, b in zip(xs, ys, strict=True)
    )


def number(value: float, decimals: int, *, signed: bool = False) -> str:
    """A number with a true minus sign, and a plus where `signed`; never a negative zero."""
    if not math.isfinite(value):
        return DASH
    text = f"{abs(value):.{decimals}f}"
    if not float(text):
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text
