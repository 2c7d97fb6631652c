"""Which tensor lies where in the output, decided before a byte is written.

The output keeps the files of the base and the order of their tensors. With a shard size it
is cut anew, in the same order, into files of at most that many bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from taia.checkpoint import SINGLE, Tensor
from taia.copying import BLOCK
from taia.errors import OutputError
from taia.pieces import Copy, Piece
from taia.plan import Plan
from taia.writing import header_of

__all__ = ["Shard", "parse_size", "shards_of"]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output: its head, and its tensors in order, placed in it."""

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


def shards_of(planned: Plan, parts: Mapping[str, Piece], size: int | None = None) -> list[Shard]:
    """The files of the output.

    With `size` each holds at most so many bytes of weights, or one tensor that is larger.
    """
    decisions = {decision.name: decision for decision in planned.decisions}
    tensors = [planned.stored(decisions[name]) for name in planned.base.tensors]
    files: dict[str, list[Tensor]] = {file: [] for file in planned.base.files}
    if size is None:
        for tensor in tensors:
            files[tensor.file].append(tensor)
    else:
        files = _cut(tensors, size)
    return [_shard(name, held, parts) for name, held in files.items()]


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB (10^9 bytes) or 512MiB. Raises OutputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", text.upper())
    size = float(match[1]) * UNITS[match[2]] if match else 0.0
    if not 1 <= size < math.inf:
        raise OutputError(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(size)


def _cut(tensors: Iterable[Tensor], size: int) -> dict[str, list[Tensor]]:
    """Files of at most `size` bytes, called as transformers calls them."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.bytes > room:
            groups.append([])
            room = size
        groups[-1].append(tensor)
        room -= tensor.bytes
    if len(groups) <= 1:
        return {SINGLE: [tensor for group in groups for tensor in group]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _shard(name: str, tensors: Sequence[Tensor], parts: Mapping[str, Piece]) -> Shard:
    header = header_of(tensors, _place(tensors, parts))
    placed, position = [], len(header)
    for tensor in tensors:
        stop = position + tensor.bytes
        placed.append(Tensor(tensor.name, tensor.dtype, tensor.shape, name, position, stop))
        position = stop
    return Shard(name, header, tuple(placed))


def _place(tensors: Sequence[Tensor], parts: Mapping[str, Piece]) -> int:
    """Where in a block the data begin, for most of them to lie as they do in their source.

    Always at a multiple of 8 bytes, as the format asks.
    """
    alike: Counter[int] = Counter({0: 1})
    position = 0
    for tensor in tensors:
        part = parts[tensor.name]
        place = (part.tensor.start - position) % BLOCK if isinstance(part, Copy) else 0
        alike[place if place % 8 == 0 else 0] += tensor.bytes
        position += tensor.bytes
    return max(alike, key=lambda place: alike[place])
