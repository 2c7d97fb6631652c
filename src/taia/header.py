"""The head of a safetensors file: which tensors it holds, and where.

8 bytes of little-endian length, a JSON object name -> {dtype, shape, data_offsets}, then the
data, contiguous and without holes (https://github.com/huggingface/safetensors, "Format").

A head comes from outside, so nothing is believed: lengths are held against the file, offsets
against shapes. `parse_header` reads a stream and touches no disk. Its memory is bounded
whatever the head says (docs/proof.md). It is stricter than the library: names
that stand twice and entries with objects inside are refused, which the library lets pass.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from taia.errors import CheckpointError
from taia.json_stream import CLOSE, COMMA, NATURAL, OPEN, SPACE, Scanner
from taia.untrusted import open_regular

__all__ = [
    "BITS",
    "FLOATS",
    "MAX_FAULTS",
    "MAX_NAME_BYTES",
    "MAX_TENSORS",
    "Tensor",
    "parse_header",
    "read_header",
    "weight_of",
]

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

MAX_TENSORS = 300_000
"""Tensors of one checkpoint; a model of 671B parameters has about 90,000."""

MAX_NAME_BYTES = 80_000_000
"""Memory for all their names and shapes."""

MAX_METADATA = 100_000
"""Texts in `__metadata__`."""

MAX_NAME = 1_000
"""Characters of one name; longer ones are no names."""

MAX_FAULTS = 200
"""Faults after which a file is not read further."""

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8,
    "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits an element, for every dtype that the format knows."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that deltas are computed on; float8 has its scales in other tensors."""

_Layout = tuple[str, tuple[int, ...], int]
_Entry = tuple[_Layout, list[int]]

_ENTRY = re.compile(
    rb'"((?!__metadata__")[^"\\\x00-\x1f]*+)"S:S\{S"dtype"S:S"([A-Z0-9a-z_]{1,32}+)"S,'
    rb'S"shape"S:S\[S((?:N(?:S,SN)*+)?+)S\]S,'
    rb'S"data_offsets"S:S\[S(N)S,S(N)S\]S\}S,S'.replace(b"S", SPACE).replace(b"N", NATURAL)
)
"""An entry in the order in which everyone writes it, and its comma."""

MAX_KINDS = 10_000
"""How many pairs of dtype and shape are remembered; a model has about twenty."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: dtype as in the header, shape, and its bytes `[start, stop)` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return self.stop - self.start

    @property
    def parameters(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises CheckpointError if the file is truncated, its header is longer than the file,
    or the tensors overlap, leave gaps, or do not fill the file.
    """
    with open_regular(path) as file:
        try:
            return parse_header(file.read, os.fstat(file.fileno()).st_size, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_header(read: Callable[[int], bytes | None], size: int, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of `size` bytes that `read` gives from its first byte.

    `path` is for messages and for `Tensor.file`. Raises CheckpointError, and nothing else.
    """
    prefix = read(8) or b""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: "
            f"a header of {length:,} bytes is stated, the file has {size:,}"
        )
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    broken: set[str] = set()
    names = 0
    try:
        for name, entry in _entries(Scanner(read, length)):
            names += weight_of(name, () if isinstance(entry, str) else entry[0][1])
            if len(tensors) >= MAX_TENSORS or names > MAX_NAME_BYTES:
                raise ValueError(f"more than {MAX_TENSORS:,} tensors, or too many long names")
            if name in tensors or name in broken:
                raise ValueError(f"{name[:MAX_NAME]}: a name that stands twice")
            try:
                tensors[name] = _tensor(name, entry, path.name, 8 + length)
            except (TypeError, ValueError) as error:
                faults.append(f"{name[:MAX_NAME]}: {error}")
                broken.add(name)
                if len(faults) >= MAX_FAULTS:
                    break
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken safetensors header: {error}") from error
    return _checked_layout(path, tensors, faults, 8 + length, size)


def _entries(scanner: Scanner) -> Iterator[tuple[str, _Entry | str]]:
    """Name -> what its entry says, or what is wrong with it. Raises ValueError."""
    layouts: dict[tuple[bytes, bytes], _Layout | str] = {}
    seen_metadata = False
    scanner.expect(OPEN, "an object")
    if scanner.take(CLOSE):
        return scanner.end()
    while True:
        for found in scanner.run(_ENTRY):
            key = found[2], found[3]
            layout = layouts.get(key)
            if layout is None:
                shape = list(map(int, key[1].split(b","))) if key[1] else []
                layout = _layout(key[0].decode(), shape)
                if len(layouts) < MAX_KINDS:
                    layouts[key] = layout
            offsets = [int(found[4]), int(found[5])]
            yield found[1].decode(), layout if isinstance(layout, str) else (layout, offsets)
        name = scanner.name()
        if name != "__metadata__":
            yield name, scanner.flat(_unordered)
        elif seen_metadata:
            scanner.fail("a second __metadata__")
        else:
            seen_metadata = True
            _skip_metadata(scanner)
        if not scanner.take(COMMA):
            break
    scanner.expect(CLOSE, "',' or '}'")
    return scanner.end()


def weight_of(name: str, shape: tuple[int, ...]) -> int:
    """The memory, in bytes, that a name and a shape take at most."""
    return sys.getsizeof(name) + 40 * len(shape)


def _skip_metadata(scanner: Scanner) -> None:
    """Texts by name, of any length; nothing of it is used."""
    scanner.expect(OPEN, "an object")
    if scanner.take(CLOSE):
        return
    for _ in range(MAX_METADATA):
        scanner.name()
        scanner.skip_string()
        if not scanner.take(COMMA):
            break
    scanner.expect(CLOSE, "',' or '}'")


def _unordered(pairs: list[tuple[str, Any]]) -> _Entry | str:
    """An entry whose members stand in another order, or lack something."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise ValueError("a name that stands twice")
    if not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "its entry lacks dtype, shape or data_offsets"
    offsets = entry["data_offsets"]
    layout = _layout(entry["dtype"], entry["shape"])
    if isinstance(layout, str):
        return layout
    return (layout, offsets) if _are_numbers(offsets) else "its offsets are no two numbers"


def _layout(dtype: Any, shape: Any) -> _Layout | str:
    """The dtype, the shape and the bytes of a tensor, or what the format forbids of them."""
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"unknown dtype {dtype!r:.100}"
    if not _are_numbers(shape):
        return "its shape is no list of numbers"
    bits = BITS[dtype]
    for count in shape:
        bits *= count
        if count >= 1 << 64 or bits >= 1 << 64:
            return f"a shape beyond 64 bits, {shape!r:.100}"
    if bits % 8:
        return f"{dtype} {shape!r:.100} does not end with a byte"
    return sys.intern(dtype), tuple(shape), bits // 8


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int for n in value)


def _tensor(name: str, entry: _Entry | str, file: str, data: int) -> Tensor:
    """One header entry. Raises ValueError for what the format forbids."""
    if isinstance(entry, str):
        raise ValueError(entry)
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name):,} characters")
    (dtype, shape, size), offsets = entry
    start, stop = offsets if len(offsets) == 2 else (1, 0)
    if stop - start != size or stop >= 1 << 63:
        raise ValueError(
            f"offsets {offsets!r:.100} do not fit {dtype} {list(shape)!r:.100}, {size:,} bytes"
        )
    return Tensor(name, dtype, shape, file, data + start, data + stop)


def _checked_layout(
    path: Path, tensors: dict[str, Tensor], faults: list[str], data: int, size: int
) -> dict[str, Tensor]:
    """Tensors in byte order, proven to tile `[data, size)` exactly."""
    ordered = list(tensors.values())
    if any(_place(after) < _place(before) for before, after in pairwise(ordered)):
        ordered.sort(key=_place)
        tensors = {tensor.name: tensor for tensor in ordered}
    end = data
    for tensor in ordered:
        if tensor.start != end and len(faults) < MAX_FAULTS:
            what = "overlaps the tensor before it" if tensor.start < end else "follows a gap"
            faults.append(f"{tensor.name}: {what} ({tensor.start:,} where {end:,} was due)")
        end = tensor.stop
    if not faults and end != size:
        what = "truncated" if end > size else "longer than its tensors"
        faults.append(f"{what}: tensors end at byte {end:,}, the file at {size:,}")
    if faults:
        raise CheckpointError(f"{path}: broken safetensors file", faults)
    return tensors


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.start, tensor.stop
