"""The weights of an output, written by several threads, in any order.

Where every byte belongs is known beforehand, so the output is the same whatever thread
writes what. Memory is bounded by the threads, not by the model. The system lets one thread at
a time write to a file, so while one copies another tells the disk to begin with what is copied.
Where they are written past the page cache (`taia.direct`) all threads write at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock

from taia.cold import Reader
from taia.copying import copy_range, create, start_writing, write_all
from taia.direct import DirectFile
from taia.holes import refuse_hole
from taia.pieces import Blend, Copy, Merge, Parted, Piece
from taia.shards import Shard
from taia.workers import cores, nothing, on_all_cores

__all__ = ["fill"]

STEP = 16 * 1024 * 1024
"""Bytes that a thread writes before it takes the next: enough to be fast, few enough to stop."""

QUEUE = 4
"""Threads at least where each waits for the disk by itself."""


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
    direct: bool = False,
    cold: bool = False,
) -> None:
    """Create the files of `shards` in `folder` and fill them; the disk is then busy with them.

    The calling thread does `meanwhile` first, while others already write; it tells
    `on_written` how many bytes were written since it last did. `direct`: they are written past
    the page cache; `cold`: copies and blends are then read past it too, where it lacks them.
    """
    for shard in shards:
        create(folder / shard.name, shard.size, shard.header)
    tasks = [task for shard in shards for task in _tasks(shard, parts)]
    if direct:
        threads = threads or max(QUEUE, cores())
    copying = {shard.name: Lock() for shard in shards}
    merging, counting = Lock(), Lock()  # a merge holds a whole matrix
    untold = sum(len(shard.header) for shard in shards)

    def work(task: Task) -> None:
        nonlocal untold
        path = folder / task.file
        target = DirectFile(path) if direct else CachedFile(path, copying[task.file])
        written = _carry_out(task, target, merging, cold)
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


class CachedFile:
    """A file that is there, to be written through the page cache; for one thread.

    Only one thread at a time is let copy to a file, and only the one that has `lock` tries.
    """

    def __init__(self, path: Path, lock: Lock) -> None:
        self._file = path.open("r+b", buffering=0)
        self._lock = lock
        self._begin: int | None = None
        self._written = 0

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None and self._begin is not None:
                start_writing(self._file, self._begin, self._written)

    def copy(self, source: Reader, start: int, to: int, length: int) -> None:
        """Write bytes of `source`."""
        with self._lock:
            copy_range(source.file, self._file, start, to, length)
        self._count(to, length)

    def write(self, data: bytes, to: int) -> None:
        """Write bytes from memory."""
        self._file.seek(to)
        write_all(self._file, data)
        self._count(to, len(data))

    def _count(self, to: int, length: int) -> None:
        self._begin = to if self._begin is None else self._begin
        self._written += length


def _carry_out(task: Task, opened: CachedFile | DirectFile, merging: Lock, cold: bool) -> int:
    """Write what a task says. Returns its bytes."""
    sources: dict[Path, Reader] = {}
    written = 0
    with ExitStack() as stack, opened as target:
        for step in task.steps:
            if isinstance(step, Computed):
                with merging if isinstance(step.piece, Merge) else nullcontext():
                    written += _compute(step, target, cold)
                continue
            if step.source not in sources:
                sources[step.source] = stack.enter_context(Reader(step.source, cold=cold))
            refuse_hole(step.source, step.start, step.start + step.length)
            target.copy(sources[step.source], step.start, step.to, step.length)
            written += step.length
    return written


def _compute(step: Computed, target: CachedFile | DirectFile, cold: bool) -> int:
    """Write what one step computes; returns its bytes."""
    written = 0
    for chunk in _chunks(step, cold):
        target.write(chunk, step.to + written)
        written += len(chunk)
    return written


def _chunks(step: Computed, cold: bool) -> Iterator[bytes]:
    if isinstance(step.piece, Blend):
        return step.piece.chunks(step.first, step.count, cold=cold)
    return step.piece.chunks()
