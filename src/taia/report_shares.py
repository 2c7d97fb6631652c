"""The shares of a mixture over a training: what was stated, and what each step's batch held.

A pure function from the contents of train.json and log.jsonl, one chart a source. The stated
curve is made again from the recipe of the mixture and the number of examples of each source,
as it was for the training itself; it needs no models.

Limits: a run that is not finished has no train.json, and so no charts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taia.report_plots import Axis, nice_axis

__all__ = ["ShareChart", "share_charts"]

POINTS = 400
"""Steps that a chart shows one by one; of more, runs of steps are averaged."""


@dataclass(frozen=True, slots=True)
class ShareChart:
    """One source: SVG points in a box of 1000 by 300, and its share of the whole training."""

    name: str
    realised: str
    stated: str
    x: Axis
    y: Axis
    total: str


def share_charts(
    log: Sequence[Mapping[str, Any]], training: Mapping[str, Any]
) -> tuple[ShareChart, ...]:
    """A chart of every source of a mixture; none where there is one source, or no finished run."""
    data = training.get("data") or {}
    parts, stated = data.get("parts") or (), data.get("path")
    if not log or len(parts) < 2 or not isinstance(stated, Mapping):
        return ()
    from taia.training.mixture import Mixture
    from taia.training.schedule import curves_of

    curves = curves_of(Mixture.parse(stated), [part["examples"] for part in parts])
    steps = int(log[-1]["steps"])  # of the whole schedule, though an early stop may cut it off
    whole = sum(part["used"] for part in parts)
    x, y = _steps_axis(steps), nice_axis(0.0, 1.0, wanted=2)
    charts = []
    for part, curve in zip(parts, curves, strict=True):
        shares = [float(line[f"share_{part['name']}"]) for line in log]
        ends = [(at * steps, share) for at, share in curve]
        charts.append(
            ShareChart(
                name=part["name"],
                realised=_line(_averaged(shares), x, y),
                stated=_line(ends, x, y),
                x=x,
                y=y,
                total=f"{part['used'] / whole:.1%}",
            )
        )
    return tuple(charts)


def _averaged(shares: Sequence[float]) -> list[tuple[float, float]]:
    """(step, share) in the middle of each step, or of each of POINTS runs of steps."""
    size = -(-len(shares) // POINTS)
    runs = [shares[at : at + size] for at in range(0, len(shares), size)]
    return [(at * size + len(run) / 2, sum(run) / len(run)) for at, run in enumerate(runs)]


def _steps_axis(steps: int) -> Axis:
    """From 0 to the last step, with round ticks as far as they go."""
    wide = nice_axis(0.0, steps)
    ticks = [(at * wide.high / steps, name) for at, name in wide.ticks]
    return Axis(0.0, steps, tuple((round(at, 2), name) for at, name in ticks if at <= 100 + 1e-9))


def _line(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{10 * x.at(at):.1f},{300 - 3 * y.at(share):.1f}" for at, share in points)
