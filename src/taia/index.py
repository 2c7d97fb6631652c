"""The index of a checkpoint of several files: which of them holds a tensor.

It comes from outside, so it is read a piece at a time and held against limits, as the
headers are (header.py).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path

from taia.errors import CheckpointError
from taia.header import MAX_FAULTS, MAX_NAME_BYTES, MAX_TENSORS
from taia.json_stream import CLOSE, COMMA, OPEN, SPACE, STRING, Scanner

__all__ = ["parse_index", "too_many"]

MAX_INDEX_BYTES = 100_000_000
"""The limit of a header holds for the index too; that of 90,000 tensors has 10 MB."""

_PAIR = re.compile(rb"(" + STRING + rb")" + SPACE + rb":" + SPACE + rb"(" + STRING + rb")")
_PAIRS = re.compile(_PAIR.pattern + SPACE + rb"," + SPACE)


def too_many() -> str:
    """What is wrong with a checkpoint beyond the limits."""
    return (
        f"more than {MAX_TENSORS:,} tensors, or more than {MAX_NAME_BYTES:,} bytes of names: "
        "no known model has so many"
    )


def parse_index(read: Callable[[int], bytes | None], size: int, path: Path) -> dict[str, str]:
    """Tensor name -> shard, from the `size` bytes of an index that `read` gives.

    `path` is for messages. Raises CheckpointError, and nothing else.
    """
    if size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_INDEX_BYTES:,} bytes")
    try:
        placed = _weight_map(Scanner(read, size))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken index: {error}") from error
    if not placed:
        raise CheckpointError(f"{path}: has no weight_map")
    strays = {shard for shard in set(placed.values()) if not _is_shard(shard)}
    faults = [
        f"{name} -> {shard!r:.200}: a shard is a .safetensors file of this very folder"
        for name, shard in islice(placed.items() if strays else (), MAX_FAULTS)
        if shard in strays
    ]
    if strays:
        raise CheckpointError(f"{path}: names files outside the checkpoint", faults)
    return placed


def _is_shard(name: str) -> bool:
    short = len(name.encode(errors="replace")) < 256
    plain = short and Path(name).name == name and not {"\\", "\0"} & set(name)
    return plain and name.endswith(".safetensors") and not name.startswith(".")


def _weight_map(scanner: Scanner) -> dict[str, str]:
    """The pairs of the member `weight_map`; the others are passed over."""
    placed: dict[str, str] | None = None
    scanner.expect(OPEN, "an object")
    if not scanner.take(CLOSE):
        while True:
            if scanner.name() != "weight_map":
                scanner.skip_value()
            elif placed is None:
                placed = _pairs(scanner)
            else:
                scanner.fail("a second weight_map")
            if not scanner.take(COMMA):
                break
        scanner.expect(CLOSE, "',' or '}'")
    scanner.end()
    return placed or {}


def _pairs(scanner: Scanner) -> dict[str, str]:
    placed: dict[str, str] = {}
    names = 0
    scanner.expect(OPEN, "an object")
    if scanner.take(CLOSE):
        return placed
    while True:
        for found in scanner.run(_PAIRS):
            names += _place(placed, found)
            if names > MAX_NAME_BYTES:
                raise ValueError(too_many())
        _place(placed, scanner.expect(_PAIR, "a name and the file that holds it"))
        if not scanner.take(COMMA):
            break
    scanner.expect(CLOSE, "',' or '}'")
    return placed


def _place(placed: dict[str, str], found: re.Match[bytes]) -> int:
    """Take in one pair; the memory that its name takes."""
    name = _text(found[1])
    if name in placed:
        raise ValueError(f"{name:.200}: a name that stands twice")
    if len(placed) >= MAX_TENSORS:
        raise ValueError(too_many())
    placed[name] = _shard(found[2])
    return sys.getsizeof(name)


@lru_cache(maxsize=1024)
def _shard(quoted: bytes) -> str:
    """The name of a file, which stands beside thousands of tensors."""
    return sys.intern(_text(quoted))


def _text(quoted: bytes) -> str:
    """The text of a JSON string."""
    if b"\\" not in quoted:
        return quoted[1:-1].decode()
    text: str = json.loads(quoted)
    return text
