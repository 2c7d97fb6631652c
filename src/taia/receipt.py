"""The proof of what was written: `taia.json` in every output.

A receipt states the selection, the sources with the size and modification time of each
file, and for every tensor of the output where its bytes came from. It says nothing that
`taia verify` does not check.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from taia import __version__
from taia.errors import VerificationError
from taia.files import atomic_write

__all__ = ["RECEIPT", "Entry", "FileIdentity", "Receipt", "SourceRecord", "digest_of", "identity"]

RECEIPT = "taia.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as it was when it was read: size in bytes, modification time in nanoseconds."""

    size: int
    modified: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One input: what the user named, where it was found, and its weight files."""

    text: str
    path: str
    files: dict[str, FileIdentity]


@dataclass(frozen=True, slots=True)
class Entry:
    """One output tensor: its bytes `[start, stop)` of `file`, and where they are from.

    `origin` base or tuned: a copy of `[from_start, from_stop)` of that source's `from_file`.
    `origin` blend: computed, base + strength * delta. `digest` is the SHA-256 of its bytes,
    when it was asked for.
    """

    name: str
    file: str
    start: int
    stop: int
    origin: Literal["base", "tuned", "blend"]
    strength: float
    from_file: str | None = None
    from_start: int | None = None
    from_stop: int | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one splice or slice wrote. `form` is checkpoint or adapter.

    `files` holds the SHA-256 of every other file of the output (configuration, tokenizer,
    model card). `headers` holds the SHA-256 of the header of each weight file.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    form: Literal["checkpoint", "adapter"]
    selection: str
    base: SourceRecord | None
    tuned: SourceRecord
    tensors: list[Entry]
    headers: dict[str, str]
    files: dict[str, str]
    taia: str = __version__
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain values, as it stands in the file."""
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> None:
        """Write the receipt into an output folder, one tensor a line."""
        plain = self.to_json()
        tensors = plain.pop("tensors")
        head = json.dumps(plain, indent=1, ensure_ascii=False)[:-2]
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in tensors)
        atomic_write(folder / RECEIPT, f'{head},\n "tensors": [\n{rows}\n ]\n}}\n')

    @staticmethod
    def read(folder: Path) -> Receipt:
        """The receipt of an output folder. Raises VerificationError without a valid one."""
        from pydantic import TypeAdapter, ValidationError

        path = folder / RECEIPT
        if not path.is_file():
            raise VerificationError(f"{folder}: no {RECEIPT} in it; taia did not write this folder")
        try:
            receipt = TypeAdapter(Receipt).validate_json(path.read_bytes())
        except ValidationError as error:
            raise VerificationError(
                f"{path}: not a valid receipt",
                [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()],
            ) from error
        if receipt.format != FORMAT:
            raise VerificationError(f"{path}: format {receipt.format}, this taia reads {FORMAT}")
        return receipt


def identity(path: Path) -> FileIdentity:
    """Size and modification time of a file, links followed."""
    status = path.stat()
    return FileIdentity(status.st_size, status.st_mtime_ns)


def digest_of(path: Path, length: int | None = None) -> str:
    """The SHA-256, in hex, of a file, or of its first `length` bytes."""
    with path.open("rb") as file:
        if length is not None:
            return hashlib.sha256(file.read(length)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()
