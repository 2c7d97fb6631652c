"""What every output has in common: headers, digests, the records of a receipt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from taia.checkpoint import INDEX, Tensor
from taia.copying import BLOCK
from taia.holes import mirror_of
from taia.receipt import Entry, FileIdentity, SourceRecord, digest_of, identity

__all__ = [
    "digest_of_bytes",
    "header_digest",
    "header_of",
    "record_of",
    "write_index",
]


def header_of(tensors: Iterable[Tensor], place: int = 0) -> bytes:
    """The head of a safetensors file that holds `tensors` one after the other.

    Its end, where the data begin, lies at `place` within a block of the file system, so
    that a source with its data at the same place can share its blocks.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.bytes],
        }
        position += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((place - 8 - len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the index of a sharded checkpoint."""
    index = {
        "metadata": {"total_size": sum(entry.stop - entry.start for entry in entries)},
        "weight_map": {entry.name: entry.file for entry in sorted(entries, key=lambda e: e.name)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def record_of(text: str, path: Path, files: Iterable[str]) -> SourceRecord:
    """A source as it stands now; of a remote one, as its server states it."""
    files = list(files)
    mirror = mirror_of(path) if files else None
    if mirror is not None:
        sizes = {file: FileIdentity(mirror.weights[file].size, 0) for file in files
                 if file in mirror.weights}  # fmt: skip
        return SourceRecord(text, mirror.remote.url, sizes, mirror.stated(sizes))
    return SourceRecord(text, str(path.absolute()), {file: identity(path / file) for file in files})


def digest_of_bytes(data: bytes) -> str:
    """The SHA-256, in hex, of bytes."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def header_digest(path: Path) -> str:
    """The SHA-256 of a safetensors file's head: its length field and its JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    return digest_of(path, 8 + length)
