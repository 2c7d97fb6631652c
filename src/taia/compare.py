"""Which tensors differ between two sets of files: bytes side by side, on all cores.

Neighbours become one range, ranges become jobs, and each thread reads both sides of a job in
steps that stay in a core's cache. numpy compares them without holding the interpreter, so the
disk sets the pace. Memory is two steps a thread, however large the files are. Files are read
and not mapped: a mapped file that shrinks would kill the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import local
from typing import Any

from taia.holes import refuse_hole
from taia.untrusted import open_regular
from taia.workers import results

__all__ = ["JOB", "STEP", "Pair", "differing", "read_into"]

STEP = 1 << 20
"""Bytes of each side in memory at a time, a thread."""

JOB = 32 << 20
"""Bytes of one task of a thread."""


@dataclass(frozen=True, slots=True)
class Pair:
    """`length` bytes of `ours` from `start`, and as many of `theirs` from `their_start`."""

    name: str
    ours: Path
    start: int
    theirs: Path
    their_start: int
    length: int


def differing(pairs: Iterable[Pair]) -> set[str]:
    """The names of the pairs that are not equal, byte for byte.

    A file that ends too early differs. Raises CheckpointError for one that cannot be read.
    """
    buffers = local()
    return set().union(*results(_jobs(_runs(pairs)), lambda job: _differing(job, buffers)))


def read_into(file: FileIO, buffer: Any, start: int) -> bool:
    """Fill `buffer` from `start`; whether the file had so many bytes."""
    view = memoryview(buffer)
    while view:
        count = os.preadv(file.fileno(), [view], start)
        if count == 0:
            return False
        view, start = view[count:], start + count
    return True


def _runs(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs that follow each other on both sides, together."""
    runs: list[list[Pair]] = []
    for pair in sorted(pairs, key=lambda pair: (pair.ours, pair.start)):
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and (last.ours, last.theirs) == (pair.ours, pair.theirs)
            and last.start + last.length == pair.start
            and last.their_start + last.length == pair.their_start
        ):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


def _jobs(runs: Iterable[Sequence[Pair]]) -> list[list[Pair]]:
    """Lists of about JOB bytes: long pairs cut, short runs kept together."""
    jobs: list[list[Pair]] = [[]]
    filled = 0
    for run in runs:
        for pair in run:
            for piece in _cut(pair):
                if filled and filled + piece.length > JOB:
                    jobs.append([])
                    filled = 0
                jobs[-1].append(piece)
                filled += piece.length
    return jobs


def _cut(pair: Pair) -> Iterator[Pair]:
    for first in range(0, pair.length, JOB):
        yield Pair(
            pair.name,
            pair.ours,
            pair.start + first,
            pair.theirs,
            pair.their_start + first,
            min(JOB, pair.length - first),
        )


def _differing(job: Sequence[Pair], buffers: local) -> set[str]:
    found: set[str] = set()
    for run in _runs(job):
        refuse_hole(run[0].theirs, run[0].their_start, run[-1].their_start + run[-1].length)
        with open_regular(run[0].ours) as ours, open_regular(run[0].theirs) as theirs:
            _compare_run(run, ours, theirs, buffers, found)
    return found


def _compare_run(
    run: Sequence[Pair], ours: FileIO, theirs: FileIO, buffers: local, found: set[str]
) -> None:
    """Compare one range; where a step differs, tell which pairs it is."""
    import numpy as np

    if not hasattr(buffers, "ours"):
        buffers.ours, buffers.theirs = np.empty(STEP, np.uint8), np.empty(STEP, np.uint8)
    start, their_start = run[0].start, run[0].their_start
    length = run[-1].start + run[-1].length - start
    index = 0
    for first in range(0, length, STEP):
        count = min(STEP, length - first)
        left, right = buffers.ours[:count], buffers.theirs[:count]
        whole = read_into(ours, left, start + first) and read_into(
            theirs, right, their_start + first
        )
        if whole and _equal(left, right):
            continue
        while run[index].start + run[index].length <= start + first:
            index += 1
        for pair in run[index:]:
            low = max(0, pair.start - start - first)
            high = min(count, pair.start + pair.length - start - first)
            if low >= count:
                break
            if not (whole and _equal(left[low:high], right[low:high])):
                found.add(pair.name)


def _equal(left: Any, right: Any) -> bool:
    """Whether two arrays of bytes are the same; eight bytes at a time."""
    words = left.size // 8 * 8
    if left.ctypes.data % 8 or right.ctypes.data % 8:
        return bool((left == right).all())
    return bool(
        (left[:words].view("u8") == right[:words].view("u8")).all()
        and (left[words:] == right[words:]).all()
    )
