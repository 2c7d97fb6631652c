"""Bytes to the disk past the page cache, for outputs so large that few would stay in it.

A copy in the kernel takes a page of memory for every page of the output, and at the end all
of them are waited for. Here each thread has a small buffer that the disk writes from: nothing
is left to flush, and what the page cache holds for others stays. The output is then on the
disk alone, so whoever reads it next reads the disk.

Limits: file systems that write straight from memory and share no blocks (`ON`); elsewhere,
and wherever one refuses, the caller's own way is as good. Whole blocks only: the ends of what
is written go through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from io import FileIO
from pathlib import Path

from taia.cold import BLOCK, Reader, memory
from taia.copying import file_system, write_all
from taia.errors import CheckpointError

__all__ = ["DirectFile", "suits"]

SHARE = 8
"""An output is large if it takes more than one part in so many of the memory: from about there on
Linux holds writers back until the disk has taken what they wrote. What is smaller is written faster
through the page cache, while the disk works behind it."""

CHUNK = 2 * 1024 * 1024
"""Bytes of a buffer: some threads' worth keep a disk busy and are no memory to speak of."""

ON = frozenset({"ext4"})
"""File systems that this is for. XFS and btrfs share blocks instead, which is faster still."""


def suits(folder: Path, size: int) -> bool:
    """Whether an output of `size` bytes in `folder` is better written past the page cache."""
    return hasattr(os, "O_DIRECT") and SHARE * size > memory() and file_system(folder) in ON


class DirectFile:
    """A file that is there, to be written past the page cache; for one thread.

    Others may write to other places of it meanwhile. What is written from the end of the last
    piece on joins it; nothing is sure to be in the file before the context is left.
    """

    def __init__(self, path: Path) -> None:
        self._usual = path.open("r+b", buffering=0)
        self._straight = _straight(path)
        self._buffer = memoryview(mmap.mmap(-1, CHUNK))  # begins at a page, as the disk asks
        self._first = self._begin = self._end = 0  # places in the file; the first of the buffer's

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._usual.close()
            self._straight.close()

    def copy(self, source: Reader, start: int, to: int, length: int) -> None:
        """Write bytes of `source`. Raises CheckpointError if it ends before that."""
        while length:
            room = self._room(to, length)
            count = source.read_into(room, start, length)
            if not count:
                raise CheckpointError(f"{source.file.name!s}: became shorter while it was read")
            self._end += count
            start, to, length = start + count, to + count, length - count

    def write(self, data: bytes | memoryview, to: int) -> None:
        """Write bytes from memory."""
        view = memoryview(data)
        while view:
            room = self._room(to, len(view))
            room[:] = view[: len(room)]
            self._end += len(room)
            to, view = to + len(room), view[len(room) :]

    def _room(self, to: int, length: int) -> memoryview:
        """Where in the buffer the bytes for place `to` go, as many as it holds of `length`."""
        if to != self._end or to == self._first + CHUNK:
            self._flush()
            self._first = to // CHUNK * CHUNK
            self._begin = self._end = to
        place = to - self._first
        return self._buffer[place : min(CHUNK, place + length)]

    def _flush(self) -> None:
        """Write what the buffer holds: whole blocks straight, what is before and behind not."""
        begin, end = self._begin - self._first, self._end - self._first
        head = min(end, -(-begin // BLOCK) * BLOCK)
        tail = max(head, end // BLOCK * BLOCK)
        for file, start, stop in (
            (self._straight, head, tail),
            (self._usual, begin, head),
            (self._usual, tail, end),
        ):
            file.seek(self._first + start)
            write_all(file, self._buffer[start:stop])
        self._begin = self._end


def _straight(path: Path) -> FileIO:
    """The file again, for writing from memory to the disk; as usual where that is refused."""

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.open(name, flags)

    return FileIO(path, "r+b", opener=opener)
