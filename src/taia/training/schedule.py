"""From shares and a schedule to the order of training, all of it before the first step.

A schedule says when what comes, not how much: with every schedule the share of a source, over
the whole training, is the one that is stated. Progress goes from 0 to 1 over the training.

    uniform     the same share throughout
    annealed    the sources with `ood` fall linearly together, as steep as their share allows:
                a share s of at most 1/2 from 2s to 0, a larger one from 1 to 2s - 1
    rising      the mirror of annealed
    staged      one source after another, in the order of the list

The order is a function of lengths, settings and seed, and of nothing else: so it is the same
for any number of workers, devices and processes, and a run can go on in its middle.

Which source has the next place is decided by R. Tijdeman's algorithm for the chairman
assignment problem (Discrete Mathematics 32, 1980): at every moment every source has had its
due to within one example. Which example of it comes next is the next one of its own shuffled
epochs. Batches then exchange examples of the same source with each other, so that the long
ones stand together, which changes no batch's shares.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from taia.training.mixture import Curve, Mixture

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["curves_of", "due", "mixed_order", "turns"]

STRETCH = 50
"""Batches among which the lengths are sorted."""


def curves_of(mixture: Mixture, counts: Sequence[int]) -> tuple[Curve, ...]:
    """The share of every source over progress. `counts`: how many examples each one has."""
    stated = [one.share for one in mixture.sources]
    if any(isinstance(share, tuple) for share in stated):
        return tuple(share if isinstance(share, tuple) else _flat(share or 0.0) for share in stated)
    whole = sum(counts)
    shares = [
        count / whole if share is None else float(share)  # type: ignore[arg-type]
        for share, count in zip(stated, counts, strict=True)
    ]
    if mixture.schedule == "staged":
        return _staged(shares)
    if mixture.schedule == "uniform":
        return tuple(_flat(share) for share in shares)
    ood = sum(share for one, share in zip(mixture.sources, shares, strict=True) if one.ood)
    high, low = min(1.0, 2 * ood), max(0.0, 2 * ood - 1)
    first, last = (high, low) if mixture.schedule == "annealed" else (low, high)
    return tuple(
        _line(share / ood, first, last)
        if one.ood and ood
        else _line(share / (1 - ood), 1 - first, 1 - last)
        if not one.ood and ood < 1
        else _flat(0.0)
        for one, share in zip(mixture.sources, shares, strict=True)
    )


def due(curve: Curve, progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area under a share from 0 up to each progress: float64 (progress,)."""
    area = np.zeros_like(progress)
    for (left, low), (right, high) in itertools.pairwise(curve):
        if right > left:
            into = np.clip(progress, left, right) - left
            area += low * into + (high - low) / (right - left) * into**2 / 2
    return area


def turns(curves: Sequence[Curve], total: int) -> list[int]:
    """Which source has each of `total` places; every prefix is within one example of its due."""
    if len(curves) == 1:
        return [0] * total
    progress = np.arange(total + 1) / total
    dues = [(total * due(curve, progress)).tolist() for curve in curves]
    slack = 1 / (2 * len(curves) - 2)
    had = [0] * len(curves)
    deadlines = [bisect_left(one, 1 - slack - 1e-9) for one in dues]
    chosen = []
    for place in range(1, total + 1):
        early = [at for at, one in enumerate(dues) if one[place] - had[at] >= slack - 1e-9]
        source = min(early or range(len(dues)), key=lambda at: (deadlines[at], at))
        had[source] += 1
        deadlines[source] = bisect_left(dues[source], had[source] + 1 - slack - 1e-9)
        chosen.append(source)
    return chosen


def mixed_order(
    lengths: Sequence[Sequence[int]],
    names: Sequence[str],
    curves: Sequence[Curve],
    batch_size: int,
    total: int,
    seed: int,
) -> list[int]:
    """Example numbers in the order of training, counted through all sources one after another.

    `lengths`: of every source, the tokens of its examples. Each example of a source comes once
    before any comes again. A source's own sequence depends on seed and name alone.
    """
    places = turns(curves, total)
    starts = np.cumsum([0, *map(len, lengths)]).tolist()
    flat = [length for source in lengths for length in source]
    streams = [
        _stream(range(starts[at], starts[at + 1]), places.count(at), f"{seed} {name}")
        for at, name in enumerate(names)
    ]
    generator = random.Random(f"{seed}")  # noqa: S311  (an order, not a secret)
    order: list[int] = []
    for start in range(0, total, STRETCH * batch_size):
        part = places[start : start + STRETCH * batch_size]
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        turn = list(range(len(batches)))
        generator.shuffle(turn)
        filled: list[list[int]] = [[] for _ in batches]
        for at, stream in enumerate(streams):
            taken = [stream.pop() for _ in range(part.count(at))]
            taken.sort(key=lambda number: flat[number], reverse=True)
            for batch in turn:  # the short ones of every source meet in one batch
                filled[batch] += [taken.pop() for _ in range(batches[batch].count(at))]
        order += [number for one in filled for number in sorted(one, key=lambda n: flat[n])]
    return order


def _stream(numbers: range, count: int, seed: str) -> list[int]:
    """`count` of the numbers in shuffled epochs, the first to come at the end."""
    generator = random.Random(seed)  # noqa: S311
    stream: list[int] = []
    while len(stream) < count:
        epoch = list(numbers)
        generator.shuffle(epoch)
        stream += epoch
    return stream[:count][::-1]


def _flat(share: float) -> Curve:
    return ((0.0, share), (1.0, share))


def _line(part: float, first: float, last: float) -> Curve:
    return ((0.0, part * first), (1.0, part * last))


def _staged(shares: Sequence[float]) -> tuple[Curve, ...]:
    """1 in the stage of a source, 0 outside of it."""
    curves, start = [], 0.0
    for number, share in enumerate(shares, start=1):
        end = 1.0 if number == len(shares) else min(1.0, start + share)
        stage = ((0.0, 0.0), (start, 0.0), (start, 1.0), (end, 1.0), (end, 0.0), (1.0, 0.0))
        curves.append(stage)
        start = end
    return tuple(curves)
