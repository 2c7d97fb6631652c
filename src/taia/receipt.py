"""The proof of what was written: `taia.json` in every output.

A receipt states the selection, the sources with the size and modification time of each
file, and for every tensor of the output where its bytes came from. It says nothing that
`taia verify` does not check, and holds a digest of itself, so that an edit is found. It is
not signed: docs/proof.md says what it proves.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from taia import __version__
from taia.errors import CheckpointError, VerificationError
from taia.untrusted import open_regular

__all__ = [
    "ALGORITHM",
    "RECEIPT",
    "Algorithm",
    "Entry",
    "FileIdentity",
    "Receipt",
    "SourceRecord",
    "digest_of",
    "identity",
    "receipt_path",
    "source_faults",
]

RECEIPT = "taia.json"
FORMATS = (1, 2)
"""What is read; the last one is written. Format 2 added `algorithm` and `content`."""

MAX_BYTES = 256 * 1024 * 1024
MAX_OBJECTS = 400_000
"""A receipt has an object for each tensor and for each source file."""

MAX_FAULTS = 1_000
"""With more of them a file is no receipt at all, and they are not listed."""

CONTENT = re.compile(rb'\{\n "content": "[0-9a-f]{64}",')

Algorithm = Literal["sha256", "blake3"]

ALGORITHM: Algorithm = "blake3"
"""What new receipts hold."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as it was when it was read: size in bytes, modification time in nanoseconds."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    size: int
    modified: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One input: what the user named, where it was found, and its weight files.

    Of a remote model `path` is its address, pinned to one version where its server has
    versions, and `stated` is what the server stated of each file (`etag`, `sha256`).
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    text: str
    path: str
    files: dict[str, FileIdentity]
    stated: dict[str, dict[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One output tensor: its bytes `[start, stop)` of `file`, and where they are from.

    `origin` base or tuned: a copy of `[from_start, from_stop)` of that source's `from_file`.
    `origin` blend: computed, base + strength * delta. `digest` is that of its
    bytes, when it was asked for. `parts`: the strengths of the projections of a fused tensor,
    where they differ; `strength` is then their mean.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

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
    parts: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one splice, slice or extraction wrote: a checkpoint, an adapter, a GGUF file.

    `files` holds the SHA-256 of every other file of the output (configuration, tokenizer,
    model card). `headers` holds the SHA-256 of the header of each weight file. `algorithm`
    made the digests of the tensors, where there are any. `content` is the SHA-256 of the
    rest of the receipt's own file.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    form: Literal["checkpoint", "adapter", "extracted", "gguf"]
    selection: str
    base: SourceRecord | None
    tuned: SourceRecord
    tensors: list[Entry]
    headers: dict[str, str]
    files: dict[str, str]
    algorithm: Algorithm = "sha256"
    taia: str = __version__
    format: int = FORMATS[-1]
    content: str | None = dataclasses.field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain values, as it stands in the file."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("content", "tensors")
        }
        for name in ("base", "tuned"):
            plain[name] = None if plain[name] is None else dataclasses.asdict(plain[name])
        names = [field.name for field in dataclasses.fields(Entry)]
        rows = [{name: getattr(entry, name) for name in names} for entry in self.tensors]
        return plain | {"tensors": rows}

    def write(self, out: Path) -> None:
        """Write the receipt of an output that is not in its place yet."""
        receipt_path(out).write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The receipt as JSON, one tensor a line, its own digest first."""
        plain = self.to_json()
        tensors = plain.pop("tensors")
        head = json.dumps(plain, indent=1, ensure_ascii=False)[1:-2]
        rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in tensors)
        rest = f'{head},\n "tensors": [\n{rows}\n ]\n}}\n'
        import hashlib

        content = hashlib.sha256(rest.encode()).hexdigest()
        return f'{{\n "content": "{content}",{rest}'

    @staticmethod
    def read(out: Path) -> Receipt:
        """The receipt of an output. Raises VerificationError without a valid one."""
        from pydantic import TypeAdapter, ValidationError

        path = receipt_path(out)
        try:
            found = path.is_file()
        except OSError as error:
            raise VerificationError(f"{str(out)[:200]}: {error.strerror}") from error
        if not found:
            what = "folder" if out.is_dir() else "file"
            raise VerificationError(f"{out}: no {path.name} there; taia did not write this {what}")
        raw = _read(path)
        try:
            receipt = TypeAdapter(Receipt).validate_json(raw)
        except ValidationError as error:
            told = error.errors() if error.error_count() < MAX_FAULTS else []
            raise VerificationError(
                f"{path}: not a valid receipt",
                [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in told],
            ) from error
        if receipt.format not in FORMATS:
            raise VerificationError(
                f"{path}: format {receipt.format}, this taia reads {', '.join(map(str, FORMATS))}"
            )
        return receipt

    def is_as_written(self, out: Path) -> bool:
        """Whether the file is the one that was written, by the digest that it holds of itself.

        No signature: whoever edits a receipt can also make its digest again. One of format 1
        holds none.
        """
        if self.format == 1:
            return self.content is None
        import hashlib

        found = CONTENT.match(raw := _read(receipt_path(out)))
        return found is not None and hashlib.sha256(raw[found.end() :]).hexdigest() == self.content


def _read(path: Path) -> bytes:
    """The bytes of a receipt, of a bounded size and count of values."""
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, CheckpointError) as error:
        raise VerificationError(f"{path}: cannot be read: {error}") from error
    if len(raw) > MAX_BYTES or raw.count(b"{") > MAX_OBJECTS:
        raise VerificationError(f"{path}: too large for a receipt")
    return raw


def receipt_path(out: Path) -> Path:
    """Where the receipt of an output is: in its folder, or beside its GGUF file."""
    return out.with_name(f"{out.name}.{RECEIPT}") if out.suffix == ".gguf" else out / RECEIPT


def identity(path: Path) -> FileIdentity:
    """Size and modification time of a file, links followed."""
    status = path.stat()
    return FileIdentity(status.st_size, status.st_mtime_ns)


def source_faults(receipt: Receipt) -> list[str]:
    """Which source files of an output are gone, or not what they were."""
    records = [record for record in (receipt.base, receipt.tuned) if record is not None]
    return [fault for record in records for fault in _record_faults(record)]


def _record_faults(record: SourceRecord) -> list[str]:
    if not Path(record.path).is_absolute():
        return [f"{record.path}: not the place of a source"]
    try:
        return list(_changes(record))
    except OSError as error:  # a name that no file can have
        return [f"{record.path[:200]}: cannot be looked at: {error.strerror}"]


def _changes(record: SourceRecord) -> Iterator[str]:
    """The files of a source that are gone or others; of one without files, the whole of it."""
    if not record.files and not Path(record.path).exists():  # the base of a slice may have none
        yield f"{record.path}: the source is gone"
    for name, before in record.files.items():
        path = Path(record.path) / name
        if not path.is_file():
            yield f"{path}: the source is gone"
        elif identity(path) != before:
            yield f"{path}: the source changed since"


def digest_of(path: Path, length: int | None = None) -> str:
    """The SHA-256, in hex, of a file, or of its first `length` bytes."""
    import hashlib

    with path.open("rb") as file:
        if length is not None:
            return hashlib.sha256(file.read(length)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()
