"""Sources that are read past the page cache, where the page cache does not hold them.

What a large splice reads it reads once: through the page cache it takes a page of memory for
every page of the disk, and pushes out what others need. Here a window of the file goes into a
small buffer instead, unless the page cache holds half of it: memory is faster than any disk.

Limits: copies and blends whose output goes past the page cache too (`taia.direct`), from file
systems that read straight into memory (`ON`); elsewhere a file is read as usual. So is one that
is neither the user's own nor the user's to write: of those the system does not tell what it
holds. The memory is the machine's, even where a container is allowed less.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from taia.copying import file_system
from taia.untrusted import open_regular

__all__ = ["BLOCK", "Reader", "memory", "suits"]

SHARE = 3
"""Sources are large if what is read of them takes more than one part in so many of the memory:
what is smaller may well stay in the page cache until the next splice of the same models."""

WINDOW = 2 * 1024 * 1024
"""Bytes of a buffer: some threads' worth keep a disk busy and are no memory to speak of."""

BLOCK = max(mmap.PAGESIZE, 4096)
"""What a disk reads into memory, or writes from it, begins and ends at a multiple of it."""

ON = frozenset({"ext4"})
"""File systems that this is for. On others it may be slower, as nothing is read ahead."""


def suits(folders: Iterable[Path], size: int) -> bool:
    """Whether `size` bytes of sources in `folders` are better read past the page cache."""
    return SHARE * size > memory() and all(file_system(folder) in ON for folder in folders)


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Reader:
    """A file of a model, read mostly in the order of its bytes, by one thread.

    `cold`: past the page cache where that does not hold the bytes. Raises CheckpointError where
    `open_regular` does.
    """

    def __init__(self, path: Path, *, cold: bool = False) -> None:
        self.file = open_regular(path)
        self._straight = _straight(self.file.fileno()) if cold else None
        self._buffer = memoryview(b"")
        self._first = self._stop = 0  # places in the file: of what the buffer holds
        self._held_until = 0  # the page cache holds what is before this place

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close_straight()
        finally:
            self.file.close()

    def read_into(self, room: memoryview, start: int, soon: int) -> int:
        """Fill `room`, or its first part, with the bytes from `start` on.

        `soon` is how many of the bytes from `start` on will be asked for before any others.
        Returns how many were read; 0 where the file ends.
        """
        if not self._first <= start < self._stop and not self._look(start, soon):
            self.file.seek(start)
            return self.file.readinto(room) or 0
        place = start - self._first
        held = self._buffer[place : min(self._stop - self._first, place + len(room))]
        room[: len(held)] = held
        return len(held)

    def _look(self, start: int, soon: int) -> bool:
        """Have the bytes at `start` in the buffer; False where they are better read as usual."""
        if self._straight is None or start < self._held_until:
            return False
        first = start // BLOCK * BLOCK
        length = min(WINDOW, -(-(start + soon) // BLOCK) * BLOCK - first)
        if not _is_cold(self.file.fileno(), first, length):
            self._held_until = first + length
            return False
        if not self._buffer:
            self._buffer = memoryview(mmap.mmap(-1, WINDOW))  # begins at a page, as the disk asks
        self._first = self._stop = 0  # a read that fails may have written to the buffer
        try:
            read = os.preadv(self._straight, [self._buffer[:length]], first)
        except OSError:  # a file system that takes the flag and then does not read
            self._close_straight()
            return False
        self._first, self._stop = first, first + read
        return start < self._stop

    def _close_straight(self) -> None:
        if self._straight is not None:
            descriptor, self._straight = self._straight, None
            os.close(descriptor)


def _straight(descriptor: int) -> int | None:
    """The open file again, for reading from the disk into memory; None where there is no way."""
    if not hasattr(os, "O_DIRECT") or _mincore() is None:
        return None
    try:  # by its number: its name may lead to another file by now
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # a system that has no such folder, or a file system that refuses
        return None


def _is_cold(descriptor: int, first: int, length: int) -> bool:
    """Whether the page cache holds less than half of these bytes, as far as the system tells."""
    mincore = _mincore()
    length = min(length, os.fstat(descriptor).st_size - first)
    if mincore is None or length <= 0:
        return False
    pages = bytearray(-(-length // mmap.PAGESIZE))
    with suppress(OSError, ValueError):  # of a file that shrinks
        # the mapping only names the bytes: none is read through it
        with mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=first) as named:
            failed = mincore(named, length, pages)
        return not failed and 2 * sum(page & 1 for page in pages) < len(pages)
    return False


@cache
def _mincore() -> Any:
    """The call that tells which pages are in memory: (mapping, its length, a byte a page)."""
    try:
        import ctypes

        called = ctypes.CDLL(None).mincore
    except (AttributeError, ImportError, OSError, TypeError):  # a system that has no such call
        return None
    called.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def mincore(mapping: mmap.mmap, length: int, pages: bytearray) -> int:
        # nothing may hold on to the mapping, or it could not be given back
        place = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
        return int(called(place, length, ctypes.addressof(ctypes.c_ubyte.from_buffer(pages))))

    return mincore
