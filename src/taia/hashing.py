"""Digests of written tensors, on all cores.

BLAKE3 (https://github.com/BLAKE3-team/BLAKE3) is a tree hash: one tensor can be hashed on many
cores, and one core hashes it at several times the speed of SHA-256. A receipt names its
algorithm, so that those written with SHA-256 are read as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from taia.compare import JOB
from taia.receipt import ALGORITHM, Algorithm, Entry
from taia.untrusted import open_regular
from taia.workers import results

__all__ = ["digests", "with_digests"]

STEP = 4 << 20
"""Bytes in memory at a time, a thread."""


def with_digests(folder: Path, entries: Sequence[Entry]) -> list[Entry]:
    """The entries of a receipt with the digest of each tensor, read back from the disk."""
    found = digests(folder, entries, ALGORITHM)
    return [dataclasses.replace(entry, digest=found.get(entry.name)) for entry in entries]


def digests(folder: Path, entries: Iterable[Entry], algorithm: Algorithm) -> dict[str, str]:
    """Name -> digest in hex. A tensor whose file ends too early has none.

    Raises CheckpointError for a file that cannot be read.
    """
    found: dict[str, str] = {}
    for part in results(_jobs(entries), lambda job: _digests(folder, job, algorithm)):
        found |= part
    return found


def _jobs(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries of one file together, about JOB bytes of them."""
    job: list[Entry] = []
    filled = 0
    for entry in entries:
        if job and (filled >= JOB or job[0].file != entry.file):
            yield job
            job, filled = [], 0
        job.append(entry)
        filled += entry.stop - entry.start
    if job:
        yield job


def _digests(folder: Path, job: Sequence[Entry], algorithm: Algorithm) -> dict[str, str]:
    with open_regular(folder / job[0].file) as file:
        found = {entry.name: _digest(file, entry, algorithm) for entry in job}
    return {name: digest for name, digest in found.items() if digest is not None}


def _digest(file: FileIO, entry: Entry, algorithm: Algorithm) -> str | None:
    hasher, left = _hasher(algorithm, entry.stop - entry.start), entry.stop - entry.start
    file.seek(entry.start)
    while left:
        chunk = file.read(min(STEP, left))
        if not chunk:
            return None
        hasher.update(chunk)
        left -= len(chunk)
    digest: str = hasher.hexdigest()
    return digest


def _hasher(algorithm: Algorithm, size: int) -> Any:
    if algorithm == "sha256":
        return hashlib.sha256()
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO if size > JOB else 1)
