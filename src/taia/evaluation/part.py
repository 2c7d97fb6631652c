"""A result file in the making: examples are appended as they come, and a kill loses one batch.

    results/VARIANT/TASK.jsonl.part    what is there so far, in the order in which it was computed
    results/VARIANT/TASK.jsonl         all of it, in the order of the task's records

The part is locked while it is written to, so two processes cannot do the same work; a process
that dies lets it go. A line that was cut by a kill is dropped.

Limits: where the system has no such locks, nothing keeps two processes apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from taia.errors import EvaluationError, OutputError
from taia.evaluation.result import Example
from taia.files import atomic_write

__all__ = ["Part", "open_part", "part_of"]


def part_of(file: Path) -> Path:
    """Where the examples of a result file are while it is in the making."""
    return file.with_name(f"{file.name}.part")


class Part:
    """An open part. `kept`: the examples that it holds, by id."""

    def __init__(self, opened: IO[bytes], file: Path) -> None:
        self._opened, self._file = opened, file
        self.kept: dict[str, Example] = {}
        good = 0
        for line in opened:
            try:
                example = Example.from_json(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.kept[example.id] = example
            good += len(line)
        opened.seek(good)
        opened.truncate()

    def append(self, examples: Sequence[Example]) -> None:
        """Add examples; they are on the disk when this returns."""
        lines = [f"{example.to_json()}\n" for example in examples]
        try:
            self._opened.write("".join(lines).encode("utf-8"))
            self._opened.flush()
            os.fsync(self._opened.fileno())
        except OSError as error:
            raise OutputError(f"{self._file}: cannot be written: {error.strerror}") from error

    def finish(self, examples: Sequence[Example]) -> None:
        """Write the whole file, and remove the part."""
        atomic_write(self._file, "".join(f"{example.to_json()}\n" for example in examples))
        part_of(self._file).unlink(missing_ok=True)


@contextmanager
def open_part(file: Path) -> Iterator[Part]:
    """The part of a result file, made where there is none.

    Raises OutputError when it cannot be written, EvaluationError when another process has it.
    """
    path = part_of(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "r+b") as opened:
        _lock(opened.fileno(), path)
        yield Part(opened, file)


def _lock(descriptor: int, path: Path) -> None:
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvaluationError(
                f"{path}: another process is computing this task of this variant. Wait for it; the "
                "same command then finds it done"
            ) from None
