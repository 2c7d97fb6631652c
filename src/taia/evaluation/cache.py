"""Answers that were computed before, on the disk: nothing is computed twice between runs.

One SQLite file, $TAIA_CACHE/scores/VERSION.sqlite (~/.cache/taia without the variable), some
200 bytes for each choice of a question and more for texts. A key is the SHA-256 of all that an
answer follows from: the model's identity, the fine-tune's and what is kept of it (nothing for
the base, so that it is shared by all its fine-tunes), the dtype, and the request itself, which
is the whole prompt with template, few-shot examples and choice, or the arguments of generation.

VERSION is that of this code and of the libraries that compute. The file of another version is
never read; `others` tells of it.

Limits: answers of another batch may differ in the last digits, as between any two runs.
Several processes may share the file on one machine; on a network file system use another place.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError

__all__ = ["SCORING", "Cache", "open_cache", "others", "place"]

SCORING = 3
"""Raised with every change of the code that can change an answer by more than rounding."""

LIBRARIES = ("torch", "transformers", "peft", "lm_eval")
AT_ONCE = 500
"""Keys asked for in one statement."""


class Cache:
    """An open file of answers, for one model: `scope` is what all its answers follow from."""

    def __init__(self, path: Path, scope: Sequence[str | None]) -> None:
        self.path, self._scope = path, list(scope)
        with self._mended():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL) "
                "WITHOUT ROWID"
            )

    def key(self, kind: str, arguments: Sequence[Any]) -> bytes:
        """The key of a request of lm-eval's: its kind and its arguments."""
        text = json.dumps([self._scope, kind, arguments], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).digest()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The answers that are there."""
        found: dict[bytes, Any] = {}
        with self._mended():
            for at in range(0, len(keys), AT_ONCE):
                some = keys[at : at + AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._file.execute(
                    f"SELECT key, answer FROM answers WHERE key IN ({marks})",  # noqa: S608
                    some,
                )
                found.update((bytes(key), json.loads(answer)) for key, answer in rows)
        return found

    def keep(self, answers: Mapping[bytes, Any]) -> None:
        """Add answers; they survive the end of the process."""
        rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
        with self._mended():
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            self._file.execute("COMMIT")

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """A damaged or unwritable file is told with what mends it."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise EvaluationError(
                f"{self.path}: the cache of scores cannot be used ({error}). Remove the file, name "
                "another place with TAIA_CACHE, or evaluate with --no-cache"
            ) from error


@contextmanager
def open_cache(scope: Sequence[str | None]) -> Iterator[Cache]:
    """The cache for answers that follow from `scope`. Raises EvaluationError if damaged."""
    cache = Cache(place(), scope)
    try:
        yield cache
    finally:
        cache.close()


def place() -> Path:
    """The file of this version."""
    folder = Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser()
    versions = [f"{name}-{importlib.metadata.version(name)}" for name in LIBRARIES]
    return folder / "scores" / f"{'_'.join([str(SCORING), *versions])}.sqlite"


def others() -> str:
    """What is to be told of files of other versions; empty where there are none."""
    mine = place()
    files = [file for file in sorted(mine.parent.glob("*.sqlite")) if file != mine]
    if not files:
        return ""
    size = sum(file.stat().st_size for file in files) / 2**20
    return (
        f"{mine.parent}: scores of other versions are not used ({size:.1f} MB): "
        f"{', '.join(file.name for file in files)}. Remove them when they are not needed"
    )
