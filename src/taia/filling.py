"""The weights of an output, written by several threads, in any order.

Where every byte belongs is known beforehand, so the output is the same whatever thread
writes what. Memory is bounded by the threads, not by the model.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from taia.copying import copy_range, create, start_writing, write_all
from taia.holes import refuse_hole
from taia.pieces import Blend, Copy, Merge, Parted, Piece
from taia.shards import Shard
from taia.workers import nothing, on_all_cores

__all__ = ["fill"]

STEP = 16 * 1024 * 1024
"""Bytes that a thread writes before it takes the next: enough to be fast, few enough to stop."""


@dataclass(slots=True)
class Range:
    """Bytes of a source file, of one tensor or of several neighbours, and where they go."""

    source: Path
    start: int
    file: str
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Computed:
    """A part of a piece that is computed: `count` elements from `first`, -1 for all."""

    piece: Blend | Parted | Merge
    first: int
    count: int
    file: str
    to: int


Step = Range | Computed


def ignore(written: int) -> None:
    """Tell nobody."""


def fill(
    folder: Path,
    shards: Sequence[Shard],
    parts: Mapping[str, Piece],
    *,
    meanwhile: Callable[[], object] = nothing,
    on_written: Callable[[int], object] = ignore,
    threads: int | None = None,
) -> None:
    """Create the files of `shards` in `folder` and fill them; each is on the disk afterwards.

    The calling thread does `meanwhile` first, while others already write; it tells
    `on_written` how many bytes were written since it last did.
    """
    for shard in shards:
        create(folder / shard.name, shard.size, shard.header)
    steps = [step for shard in shards for step in _steps(shard, parts)]
    left = Counter(step.file for step in steps)
    lock, merging = Lock(), Lock()
    untold = sum(len(shard.header) for shard in shards)

    def work(step: Step) -> None:
        nonlocal untold
        if isinstance(step, Computed) and isinstance(step.piece, Merge):
            with merging:  # a merge holds a whole matrix
                written = _carry_out(step, folder / step.file)
        else:
            written = _carry_out(step, folder / step.file)
        with lock:
            untold += written
            left[step.file] -= 1
            last = not left[step.file]
        if last:
            _flush(folder / step.file)

    def tell() -> None:
        nonlocal untold
        with lock:
            written, untold = untold, 0
        on_written(written)

    on_all_cores(steps, work, first=meanwhile, after=tell, threads=threads)


def _steps(shard: Shard, parts: Mapping[str, Piece]) -> Iterator[Step]:
    """What fills a shard, in the order of its bytes, in steps of about STEP bytes."""
    held: Range | None = None
    for tensor in shard.tensors:
        part = parts[tensor.name]
        if not tensor.bytes:
            continue
        if isinstance(part, Copy):
            path, start = part.folder / part.tensor.file, part.tensor.start
            if held and (held.source, held.start + held.length) == (path, start):
                held.length += tensor.bytes
                continue
            if held:
                yield from _split(held)
            held = Range(path, start, shard.name, tensor.start, tensor.bytes)
            continue
        if held:
            yield from _split(held)
            held = None
        if isinstance(part, Merge | Parted):
            yield Computed(part, 0, -1, shard.name, tensor.start)
            continue
        width = tensor.bytes // tensor.parameters
        for first in range(0, tensor.parameters, STEP // width):
            count = min(STEP // width, tensor.parameters - first)
            yield Computed(part, first, count, shard.name, tensor.start + first * width)
    if held:
        yield from _split(held)


def _split(whole: Range) -> Iterator[Range]:
    """A long range as several, cut where STEP bytes of the output end."""
    done = 0
    while done < whole.length:
        to = whole.to + done
        length = min(STEP - to % STEP, whole.length - done)
        yield Range(whole.source, whole.start + done, whole.file, to, length)
        done += length


def _carry_out(step: Step, path: Path) -> int:
    """Write one step, and let the disk begin with it. Returns its bytes."""
    with path.open("r+b", buffering=0) as target:
        if isinstance(step, Range):
            refuse_hole(step.source, step.start, step.start + step.length)
            with step.source.open("rb", buffering=0) as source:
                copy_range(source, target, step.start, step.to, step.length)
            written = step.length
        else:
            target.seek(step.to)
            written = 0
            for chunk in _chunks(step):
                write_all(target, chunk)
                written += len(chunk)
        start_writing(target, step.to, written)
    return written


def _chunks(step: Computed) -> Iterator[bytes]:
    if isinstance(step.piece, Blend):
        return step.piece.chunks(step.first, step.count)
    return step.piece.chunks()


def _flush(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
