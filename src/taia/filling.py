"""The weights of an output, written by several threads, in any order.

Where every byte belongs is known beforehand, so the output is the same whatever thread
writes what. Memory is bounded by the threads, not by the model. The system lets one thread at
a time write to a file, so while one copies another tells the disk to begin with what is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from threading import Lock

from taia.copying import copy_range, create, start_writing, write_all
from taia.holes import refuse_hole
from taia.pieces import Blend, Copy, Merge, Parted, Piece
from taia.shards import Shard
from taia.untrusted import open_regular
from taia.workers import nothing, on_all_cores

__all__ = ["fill"]

STEP = 16 * 1024 * 1024
"""Bytes that a thread writes before it takes the next: enough to be fast, few enough to stop."""


@dataclass(slots=True)
class Range:
    """Bytes of a source file, of one tensor or of several neighbours, and where they go."""

    source: Path
    start: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Computed:
    """A part of a piece that is computed: `count` elements from `first`, -1 for all."""

    piece: Blend | Parted | Merge
    first: int
    count: int
    to: int


Step = Range | Computed


@dataclass(frozen=True, slots=True)
class Task:
    """Neighbouring steps that fill about STEP bytes of a file."""

    file: str
    steps: list[Step]


@dataclass(frozen=True, slots=True)
class Locks:
    """What one thread at a time does: copy to each of the files; hold a whole matrix."""

    copying: Mapping[str, Lock]
    merging: Lock


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
    """Create the files of `shards` in `folder` and fill them; the disk is then busy with them.

    The calling thread does `meanwhile` first, while others already write; it tells
    `on_written` how many bytes were written since it last did.
    """
    for shard in shards:
        create(folder / shard.name, shard.size, shard.header)
    tasks = [task for shard in shards for task in _tasks(shard, parts)]
    locks = Locks({shard.name: Lock() for shard in shards}, Lock())
    counting = Lock()
    untold = sum(len(shard.header) for shard in shards)

    def work(task: Task) -> None:
        nonlocal untold
        written = _carry_out(task, folder / task.file, locks)
        with counting:
            untold += written

    def tell() -> None:
        nonlocal untold
        with counting:
            written, untold = untold, 0
        on_written(written)

    on_all_cores(tasks, work, first=meanwhile, after=tell, threads=threads)


def _tasks(shard: Shard, parts: Mapping[str, Piece]) -> Iterator[Task]:
    """What fills a shard, in the order of its bytes."""
    for _, steps in groupby(_steps(shard, parts), key=lambda step: step.to // STEP):
        yield Task(shard.name, list(steps))


def _steps(shard: Shard, parts: Mapping[str, Piece]) -> Iterator[Step]:
    """The same, step by step; none of more than STEP bytes but those of whole matrices."""
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
            held = Range(path, start, tensor.start, tensor.bytes)
            continue
        if held:
            yield from _split(held)
            held = None
        if isinstance(part, Merge | Parted):
            yield Computed(part, 0, -1, tensor.start)
            continue
        width = tensor.bytes // tensor.parameters
        for first in range(0, tensor.parameters, STEP // width):
            count = min(STEP // width, tensor.parameters - first)
            yield Computed(part, first, count, tensor.start + first * width)
    if held:
        yield from _split(held)


def _split(whole: Range) -> Iterator[Range]:
    """A long range as several, cut where STEP bytes of the output end."""
    done = 0
    while done < whole.length:
        to = whole.to + done
        length = min(STEP - to % STEP, whole.length - done)
        yield Range(whole.source, whole.start + done, to, length)
        done += length


def _carry_out(task: Task, path: Path, locks: Locks) -> int:
    """Write what a task says, and let the disk begin with it. Returns its bytes."""
    sources: dict[Path, FileIO] = {}
    written = 0
    with ExitStack() as opened:
        target = opened.enter_context(path.open("r+b", buffering=0))
        for step in task.steps:
            if isinstance(step, Computed):
                with locks.merging if isinstance(step.piece, Merge) else nullcontext():
                    written += _compute(step, target)
                continue
            if step.source not in sources:
                sources[step.source] = opened.enter_context(open_regular(step.source))
            refuse_hole(step.source, step.start, step.start + step.length)
            with locks.copying[task.file]:
                copy_range(sources[step.source], target, step.start, step.to, step.length)
            written += step.length
        start_writing(target, task.steps[0].to, written)
    return written


def _compute(step: Computed, target: FileIO) -> int:
    """Write what one step computes; returns its bytes."""
    written = 0
    target.seek(step.to)
    for chunk in _chunks(step):
        write_all(target, chunk)
        written += len(chunk)
    return written


def _chunks(step: Computed) -> Iterator[bytes]:
    if isinstance(step.piece, Blend):
        return step.piece.chunks(step.first, step.count)
    return step.piece.chunks()
