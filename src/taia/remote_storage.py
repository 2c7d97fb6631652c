"""A folder in object storage (s3://, gs://, az://, whatever fsspec reads), by byte range.

fsspec's file systems bring the protocols and the logins. A part is asked for in one request
and comes as one piece, so that a part that breaks is asked for again as a whole. What a storage
states of a file (size, ETag) is compared before and after each part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from taia.companions import TEMPLATES
from taia.errors import DependencyError, SourceError
from taia.remote import Stated, TransferError, checked_size, matches

__all__ = ["StorageRemote", "storage_remote"]

PIECE = 4 * 1024 * 1024
"""Bytes of one request: they are held in memory, once for each connection."""

PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*(?=@)")
"""`user:password` before a host."""

EXTRAS = {"s3": "s3", "s3a": "s3"}


class StorageRemote:
    """The files of one folder of a storage; see Remote."""

    def __init__(self, text: str, filesystem: Any, folder: str) -> None:
        self.text = self.url = text
        self._filesystem, self._folder = filesystem, folder.rstrip("/")

    def find(self, patterns: Sequence[str]) -> dict[str, Stated]:
        """From a list of the folder; see Remote."""
        self._filesystem.invalidate_cache()
        names, folders = self._list(self._folder)
        if TEMPLATES in folders and any(p.startswith(f"{TEMPLATES}/") for p in patterns):
            inside, _ = self._list(f"{self._folder}/{TEMPLATES}")
            names += [f"{TEMPLATES}/{name}" for name in inside]
        found = sorted(name for name in names if matches(name, patterns))
        return {name: self._info(name) for name in found}

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the files, and of the folders, in a folder."""
        kinds: dict[str, list[str]] = {"file": [], "directory": []}
        for row in self._call(self._filesystem.ls, folder, detail=True):
            name = row["name"].rstrip("/").rpartition("/")[2]
            kinds.setdefault(str(row.get("type")), []).append(name)
        return kinds["file"], kinds["directory"]

    def stream(self, name: str, stated: Stated, start: int, stop: int) -> Iterator[bytes]:
        """Request after request of at most PIECE; see Remote."""
        path = f"{self._folder}/{name}"
        self._check_version(name, stated)
        for first in range(start, stop, PIECE):
            last = min(first + PIECE, stop)
            piece = self._call(self._filesystem.cat_file, path, start=first, end=last)
            if len(piece) != last - first:
                raise TransferError(f"{len(piece):,} bytes came, {last - first:,} were asked for")
            if last == stop:
                self._check_version(name, stated)
            yield piece

    def _check_version(self, name: str, stated: Stated) -> None:
        self._filesystem.invalidate_cache()
        if self._info(name) != stated:
            raise SourceError(
                f"{self.text}: {name}: changed in the storage while it was read; "
                "run the command again"
            )

    def _info(self, name: str) -> Stated:
        row = self._call(self._filesystem.info, f"{self._folder}/{name}")
        modified = next((row[key] for key in ("LastModified", "mtime", "updated", "last_modified",
                                              "created") if row.get(key)), "")  # fmt: skip
        etag = row.get("ETag") or row.get("etag") or ""
        return Stated(
            checked_size(self.text, name, row.get("size")), str(etag).strip('"'), str(modified)
        )

    def _call(self, method: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SourceError(f"{self.text}: no such folder or file in the storage") from error
        except PermissionError as error:
            raise SourceError(f"{self.text}: the storage refuses access; log in to it") from error
        except Exception as error:  # every storage has errors of its own
            text = str(error).partition("\n")[0][:200]
            raise TransferError(f"{type(error).__name__}: {text}") from error


def storage_remote(text: str) -> StorageRemote:
    """A folder by its URL. Raises DependencyError without the package of its protocol."""
    import fsspec

    scheme, address = text.partition("://")[0], text
    if scheme != "github":  # there it is ORG:REPOSITORY@REVISION
        text = PASSWORD.sub(r"\1", address)
    if "::" in address:
        raise SourceError(
            f"{scheme}://: fsspec's chains of addresses are not read; download the model first"
        )
    try:
        filesystem, folder = fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        how = f"pip install 'taia[{extra}]'" if extra else str(error)
        raise DependencyError(
            f"{text}: reading {scheme}:// needs one more package: {how}"
        ) from error
    except Exception as error:
        why = error if text == address else type(error).__name__  # its text may have the password
        raise SourceError(f"{text}: not an address that can be opened: {why}") from error
    return StorageRemote(text, filesystem, folder)
