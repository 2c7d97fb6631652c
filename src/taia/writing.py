"""What every output has in common: headers, companions, digests, the records of a receipt."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path

from taia.checkpoint import INDEX, Tensor
from taia.files import atomic_write
from taia.receipt import Entry, FileIdentity, SourceRecord, digest_of, identity
from taia.remote import MIRROR_MARKER
from taia.untrusted import refuse_stray_link

__all__ = [
    "COMPANIONS",
    "TOKENIZER_FILES",
    "copy_companions",
    "header_digest",
    "header_of",
    "record_of",
    "start_writing",
    "write_all",
    "write_index",
]

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "*.jinja", "chat_template.json", "tekken.json", "bpe.codes",
    "tokenization_*.py",
)  # fmt: skip
COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "*_processor_config.json", "video_preprocessor_config.json", "configuration_*.py",
    "modeling_*.py", *TOKENIZER_FILES,
)  # fmt: skip
"""Files beside the weights that belong to a model, by the names that transformers gives them."""


def header_of(tensors: Iterable[Tensor]) -> bytes:
    """The head of a safetensors file that holds `tensors` one after the other."""
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
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, entries: Sequence[Entry]) -> None:
    """Write the index of a sharded checkpoint."""
    index = {
        "metadata": {"total_size": sum(entry.stop - entry.start for entry in entries)},
        "weight_map": {entry.name: entry.file for entry in sorted(entries, key=lambda e: e.name)},
    }
    atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")


def copy_companions(
    source: Path, folder: Path, patterns: Sequence[str], without: Sequence[str] = ()
) -> None:
    """Copy the files of `source` that match `patterns` and not `without`; content only."""

    def matches(name: str, among: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in among)

    for file in sorted(source.iterdir()):
        if matches(file.name, patterns) and not matches(file.name, without) and file.is_file():
            refuse_stray_link(file)
            shutil.copyfile(file, folder / file.name)


def record_of(text: str, path: Path, files: Iterable[str]) -> SourceRecord:
    """A source as it stands now; of a remote one, as its server states it."""
    files = list(files)
    if files and (path / MIRROR_MARKER).is_file():
        from taia.mirror import mirror_at

        mirror = mirror_at(path)
        assert mirror is not None  # nothing of a mirror that is not open is ever read
        sizes = {file: FileIdentity(mirror.weights[file].size, 0) for file in files
                 if file in mirror.weights}  # fmt: skip
        return SourceRecord(text, mirror.remote.url, sizes, mirror.stated(sizes))
    return SourceRecord(text, str(path.absolute()), {file: identity(path / file) for file in files})


def header_digest(path: Path) -> str:
    """The SHA-256 of a safetensors file's head: its length field and its JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    return digest_of(path, 8 + length)


def write_all(target: FileIO, data: bytes) -> None:
    """Write every byte; an unbuffered file may take fewer at a time."""
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def start_writing(target: FileIO, length: int) -> None:
    """Let the disk begin with the last `length` bytes, so that the final fsync has less to do."""
    if hasattr(os, "posix_fadvise"):  # Linux starts the writeback of dirty pages on this advice
        start = target.tell() - length
        os.posix_fadvise(target.fileno(), start, length, os.POSIX_FADV_DONTNEED)
