"""Files from outside, opened with care.

Whoever hands over a checkpoint chooses what its names lead to. So a file of a model is a
regular file: a pipe or a device would hang or never end. A link may point inside its folder,
or to the blobs of the hub's cache when the folder is a snapshot of that very cache
(`models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`). Every other link is refused:
the content of a private file would end up in an output, which may then be shared.

The rule is about links inside the folder; the folder itself may be one, as the user named it.
A file is never read through a mapping into memory: one that shrinks would kill the process.
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from taia.errors import CheckpointError

__all__ = ["open_regular", "refuse_stray_link"]

BLOBS, SNAPSHOTS = "blobs", "snapshots"
"""Folders of the hub's cache, of one repository."""


def open_regular(path: Path, model: Path | None = None) -> FileIO:
    """Open a file of a model, unbuffered, for reading. `model` as for `refuse_stray_link`.

    Raises CheckpointError for what is no regular file, cannot be read, or is a link that
    leads out of its folder.
    """
    refuse_stray_link(path, model)
    try:  # without O_NONBLOCK a pipe would block the open itself
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file; put the file itself there")
    return FileIO(path, "rb", opener=lambda *_: descriptor)  # whose errors name the path


def refuse_stray_link(path: Path, model: Path | None = None) -> None:
    """Raise CheckpointError if `path` is a link that leads out of its model's folder.

    That is `model`, for a file that lies in a folder inside it, else the file's own folder.
    """
    if not path.is_symlink():
        return
    folder = (model or path.parent).resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop, or nothing there
        raise CheckpointError(f"{path}: a link that leads nowhere") from error
    allowed = [folder]
    if folder.parent.name == SNAPSHOTS:
        allowed.append(folder.parent.parent / BLOBS)
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path}: a link that leads out of the model's folder; put the file itself there, "
            "or a hard link"
        )
