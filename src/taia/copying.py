"""Bytes from one file to another, inside the kernel where it can.

On a file system that shares blocks between files (XFS, btrfs) copy_file_range shares them
wherever source and target lie alike within a block, and nothing is written; elsewhere it
copies without passing through this process. Where it does not work sendfile is tried, then
reading and writing.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

from taia.errors import CheckpointError

__all__ = ["BLOCK", "copy_range", "create", "file_system", "start_writing", "write_all"]

BLOCK = 4096
"""Bytes of a block: the unit in which files share their contents."""

BUFFER = 1024 * 1024
"""Bytes in memory where the kernel does not copy by itself."""

PREALLOCATE = frozenset({"ext4"})
"""File systems on which blocks that are taken beforehand make writing faster.

On others the call may write zeros to every block, or take blocks that would be shared.
"""


def create(path: Path, size: int, head: bytes) -> None:
    """Make a new file of `size` bytes that begins with `head`; the rest is filled later.

    Raises OSError, before much is written, where the disk has no room for it.
    """
    with path.open("xb", buffering=0) as file:
        if size and file_system(path) in PREALLOCATE:
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        write_all(file, head)


def copy_range(source: FileIO, target: FileIO, start: int, to: int, length: int) -> None:
    """Copy `length` bytes of `source` from `start` to `target` at `to`.

    Raises CheckpointError if the source ends before that.
    """
    if length and (start - to) % BLOCK == 0 and to % BLOCK:
        head = min(length, BLOCK - to % BLOCK)  # what follows are whole blocks
        _copy(source, target, start, to, head)
        start, to, length = start + head, to + head, length - head
    _copy(source, target, start, to, length)


def _copy(source: FileIO, target: FileIO, start: int, to: int, length: int) -> None:
    ways = [_copy_file_range, _sendfile, _through_memory]
    while length:
        try:
            moved = ways[0](source, target, start, to, length)
        except (AttributeError, OSError):  # another system, another file system, an old kernel
            if len(ways) == 1:
                raise
            moved = 0
        if moved == 0:
            if len(ways) == 1:
                raise CheckpointError(f"{source.name!s}: became shorter while it was read")
            del ways[0]
        start, to, length = start + moved, to + moved, length - moved


def _copy_file_range(source: FileIO, target: FileIO, start: int, to: int, length: int) -> int:
    return os.copy_file_range(source.fileno(), target.fileno(), length, start, to)


def _sendfile(source: FileIO, target: FileIO, start: int, to: int, length: int) -> int:
    target.seek(to)
    return os.sendfile(target.fileno(), source.fileno(), start, length)


def _through_memory(source: FileIO, target: FileIO, start: int, to: int, length: int) -> int:
    source.seek(start)
    target.seek(to)
    chunk = source.read(min(BUFFER, length))
    write_all(target, chunk)
    return len(chunk)


def write_all(target: FileIO, data: bytes | memoryview) -> None:
    """Write every byte; an unbuffered file may take fewer at a time."""
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def start_writing(target: FileIO, start: int, length: int) -> None:
    """Let the disk begin with these bytes, so that the final flush has less to do."""
    if hasattr(os, "posix_fadvise"):  # Linux starts the writeback of dirty pages on this advice
        os.posix_fadvise(target.fileno(), start, length, os.POSIX_FADV_DONTNEED)


def file_system(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds `path`, such as ext4; empty where it is unknown."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:  # "36 35 98:0 /root /mount options - ext4 /dev/sda rw"
        place, _, kind = line.partition(" - ")
        if place.split()[2:3] == [wanted]:
            return kind.split()[0]
    return ""
