"""Byte ranges, and getting them: merged, cut into parts, retried from where they broke.

A connection that drops costs nothing but a new one: the next request begins at the byte
after the last that arrived. Attempts without any progress are few, with a growing pause.
Small files come whole, and are written when they are what the server states.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from taia.errors import SourceError
from taia.remote import Remote, Stated, TransferError

__all__ = [
    "MAX_SMALL_BYTES",
    "Range",
    "find",
    "merged",
    "parts",
    "read",
    "read_small",
    "subtracted",
    "total",
    "write_small",
]

PART = 16 * 1024 * 1024
"""Bytes of one request: enough that its latency does not matter, few enough to share out."""

PAUSE = 0.25
"""Seconds before the second attempt; doubled before every further one."""

MAX_SMALL_BYTES = 100 * 1024 * 1024
"""The limit of a header and of any JSON file; see `taia.checkpoint`."""

Wait = Callable[[float], object]

Range = tuple[int, int]
"""Bytes `[start, stop)` of a file."""


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as disjoint ranges in order, neighbours made one, empty ones gone."""
    result: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def subtracted(ranges: Iterable[Range], present: Iterable[Range]) -> list[Range]:
    """The bytes of `ranges` that are not in `present`, as `merged` gives them."""
    result = []
    there = merged(present)
    first = 0
    for start, stop in merged(ranges):
        while first < len(there) and there[first][1] <= start:
            first += 1
        for have_start, have_stop in there[first:]:
            if have_start >= stop:
                break
            if start < have_start:
                result.append((start, have_start))
            start = max(start, have_stop)
        if start < stop:
            result.append((start, stop))
    return result


def total(ranges: Iterable[Range]) -> int:
    """The number of bytes of disjoint ranges."""
    return sum(stop - start for start, stop in ranges)


def parts(ranges: Iterable[Range]) -> Iterator[Range]:
    """The same bytes in order, in ranges of at most PART."""
    for start, stop in ranges:
        for first in range(start, stop, PART):
            yield first, min(first + PART, stop)


def read(
    remote: Remote, name: str, stated: Stated, start: int, stop: int, wait: Wait | None = None
) -> Iterator[bytes]:
    """Bytes `[start, stop)` of a remote file, in order, over as many connections as it takes.

    `wait` is called with the seconds before another attempt, and sleeps without it.
    Raises SourceError when no more bytes come, or for what `Remote.stream` refuses.
    """
    failures = 0
    while start < stop:
        try:
            for chunk in remote.stream(name, stated, start, stop):
                start += len(chunk)
                failures = 0
                yield chunk
            if start < stop:
                raise TransferError("the answer ended early")
        except TransferError as fault:
            failures += 1
            _again(remote, name, fault, failures, wait)


def find(remote: Remote, patterns: Sequence[str]) -> dict[str, Stated]:
    """`Remote.find`, attempted again where it is interrupted."""
    failures = 0
    while True:
        try:
            return remote.find(patterns)
        except TransferError as fault:
            failures += 1
            _again(remote, "", fault, failures)


def _again(
    remote: Remote, name: str, fault: TransferError, failures: int, wait: Wait | None = None
) -> None:
    """Wait before another attempt, or raise SourceError after the last."""
    if failures >= fault.attempts:
        place = f"{remote.text}: {name}: " if name else f"{remote.text}: "
        raise SourceError(
            f"{place}{fault} ({failures} attempts). What has arrived of the weights is kept, and "
            "the same command goes on from there"
        ) from fault
    (wait or time.sleep)(max(fault.wait, PAUSE * 2 ** (failures - 1)))


def read_small(remote: Remote, name: str, stated: Stated) -> Iterator[bytes]:
    """A small file. Raises SourceError for one that is not small."""
    if stated.size > MAX_SMALL_BYTES:
        raise SourceError(
            f"{remote.text}: {name}: {stated.size:,} bytes, where {MAX_SMALL_BYTES:,} are the limit"
        )
    return read(remote, name, stated, 0, stated.size)


def write_small(
    remote: Remote, folder: Path, name: str, stated: Stated, chunks: Iterable[bytes] | None
) -> None:
    """Write a small file in one step, checked against its SHA-256 where one is stated.

    Without `chunks` it is downloaded.
    """
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    digest = hashlib.sha256()
    with partial.open("wb") as file:
        for chunk in read_small(remote, name, stated) if chunks is None else chunks:
            digest.update(chunk)
            file.write(chunk)
    if stated.sha256 and digest.hexdigest() != stated.sha256:
        partial.unlink()
        raise SourceError(f"{remote.text}: {name}: not of the SHA-256 that the server states")
    os.utime(partial, (0, 0))  # as for weights: the same file again is no change of the model
    partial.replace(target)
