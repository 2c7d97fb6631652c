"""The guard of every reader: what a mirror has not downloaded is an error, never zeros.

A mirror (see `taia.mirror`) looks like any folder, and where weights are missing its sparse
files read as zeros. So whatever reads weights asks here first. For other folders that is one
look for the mirror's marker.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from taia.errors import SourceError

if TYPE_CHECKING:
    from taia.mirror import Mirror

__all__ = ["MIRROR_MARKER", "mirror_of", "refuse_hole"]

MIRROR_MARKER = ".taia-mirror.json"
"""The file that tells a mirror (see `taia.mirror`) from a folder whose weights are all there."""


def refuse_hole(path: Path, start: int, stop: int) -> None:
    """Raise SourceError if bytes `[start, stop)` of a weight file are not on this disk."""
    mirror = mirror_of(path.parent)
    if mirror is not None and mirror.missing({path.name: [(start, stop)]}):
        raise SourceError(
            f"{mirror.remote.text}: a remote model of which only a part is here, and more of it "
            "is needed; download it first and name its folder"
        )


def mirror_of(folder: Path) -> Mirror | None:
    """The mirror at a folder; None for any other folder.

    Raises SourceError for one that this process did not open: a part of a model is none.
    """
    if not (folder / MIRROR_MARKER).is_file():
        return None
    from taia.mirror import is_incomplete, mirror_at  # not for those who read local folders only

    mirror = mirror_at(folder)
    if mirror is None and is_incomplete(folder):
        raise SourceError(
            f"{folder}: a part of a remote model, kept by taia; name the model by its own address"
        )
    return mirror
