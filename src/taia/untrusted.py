"""Files from outside, opened with care.

Whoever hands over a checkpoint chooses what its names lead to. So a file of a model is a
regular file: a pipe or a device would hang or never end. A link may point inside its folder,
or to the blobs of the hub's cache when the folder is in a snapshot of that very cache
(`models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`, which may be a link to
`blobs/XX/HASH` of the cache). Every other link is refused: the content of a private file would
end up in an output, which may then be shared.

The rule is about links inside the folder; the folder itself may be one, as the user named it.
A file is never read through a mapping into memory: one that shrinks would kill the process.
"""

from __future__ import annotations

import os
import re
import stat
from io import FileIO
from pathlib import Path

from taia.errors import CheckpointError

__all__ = ["open_regular", "refuse_stray_link"]

BLOBS, SNAPSHOTS = "blobs", "snapshots"
"""Folders of the hub's cache, of one repository."""

SHARED = ".huggingface-shared-blobs"
"""What marks the folder of blobs that all repositories of a cache share."""

REPOSITORY = re.compile(r"(models|datasets|spaces)--.")
XET_HASH = re.compile(r"[0-9a-f]{64}")


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
    if not target.is_relative_to(folder) and not _is_cached(target, folder):
        raise CheckpointError(
            f"{path}: a link that leads out of the model's folder; put the file itself there, "
            "or a hard link"
        )


def _is_cached(target: Path, folder: Path) -> bool:
    """Whether a file is where the hub's cache keeps those of the snapshot that `folder` is in.

    That is among the blobs of its repository, or in the store that all repositories of the cache
    share (huggingface_hub 2.4): blobs/XX/HASH, under a marker of its own. A folder inside a
    snapshot counts in a cache whose repositories have the hub's names.
    """
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        named = REPOSITORY.match(repository.name) is not None
        if place.parent.name == SNAPSHOTS and (named or place == folder):
            store = repository.parent / BLOBS
            return target.is_relative_to(repository / BLOBS) or (
                named
                and (store / SHARED).is_file()
                and target.parent.parent == store
                and XET_HASH.fullmatch(target.name) is not None
                and target.parent.name == target.name[:2]
            )
    return False
