"""What any remote place of a model can do: say what files it has, and send parts of them.

A `Remote` is a folder on a server. It is asked for files by name or pattern, and for byte
ranges of one file. It tells its two ways to fail apart: an `TransferError` transfer is worth
another attempt, a SourceError is not.

Everything that a server states is untrusted: sizes are checked here, before anything is
allocated for them, and names before anything is asked by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from taia.companions import file_of, fits
from taia.errors import SourceError

__all__ = [
    "Remote",
    "Stated",
    "TransferError",
    "checked_size",
    "matches",
    "plain_name",
]

MAX_FILE_BYTES = 1 << 50
"""No file of a model has a pebibyte; a server that states more states nonsense."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a server states of one file: its size in bytes, and what tells versions apart.

    Each of `etag`, `modified` and `sha256` is empty where the server does not state it.
    """

    size: int
    etag: str = ""
    modified: str = ""
    sha256: str = ""


class TransferError(Exception):
    """A transfer that failed in a way that another attempt may not.

    `attempts` of them without a byte in between are enough; `wait` is the seconds that the
    server asked for, if it did.
    """

    def __init__(self, message: str, *, attempts: int = 6, wait: float = 0.0) -> None:
        super().__init__(message)
        self.attempts, self.wait = attempts, wait


class Remote(Protocol):
    """A folder of files on a server.

    `text` is what the user named, `url` the same place pinned to one version where the server
    has versions; neither holds a password.
    """

    text: str
    url: str

    def find(self, patterns: Sequence[str]) -> dict[str, Stated]:
        """The files of this very folder whose names are, or match, one of `patterns`.

        Those of `companions.TEMPLATES` inside it are named with that folder.
        A server that cannot list a folder is asked for the names that models use.
        Raises TransferError or SourceError.
        """

    def stream(self, name: str, stated: Stated, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `[start, stop)` of a file, or the first of them, in order.

        Raises TransferError, or SourceError for a file that is not what was stated.
        """


def plain_name(name: object) -> bool:
    """Whether `name` is the name of a file in a folder, and of nothing elsewhere."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and Path(name).name == name
        and not any(character in "\\:" or ord(character) < 32 for character in name)
        and len(name.encode(errors="replace")) <= 255
    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` is, or matches, one of `patterns`, and leads to a file of a model alone."""
    return plain_name(file_of(name)) and fits(name, patterns)


def checked_size(text: str, name: str, size: object) -> int:
    """A size as a server stated it. Raises SourceError for none, or for nonsense."""
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) < 20:
        size = int(size)
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise SourceError(f"{text}: {name}: the server states no usable size ({size!r:.40})")
    return size
