"""Where everything in a GGUF file lies; no weight is read.

    magic "GGUF", version (2 or 3), number of tensors, number of fields
    fields   key, type, value: the hyperparameters, the tokenizer, what the file is
    tensors  name, dimensions (the fastest first), type, offset into the data
    data     each tensor at a multiple of the alignment (`general.alignment`, or 32)

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.) Numbers are little-endian.

Everything in the file comes from outside, so it is checked here, before anything else trusts
it: lengths and counts against the file, offsets against shapes, tensors against each other.
Long texts and arrays (a vocabulary, a chat template) are stepped over, and their bytes are
copied when an output is written, so that memory does not grow with what a file claims.

Limits: big-endian files, version 1, arrays of arrays and the parts of a split model are
refused, each by its name.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from taia.checkpoint import Checkpoint, Tensor
from taia.errors import CheckpointError, SourceError
from taia.gguf_kinds import quantisation_types
from taia.sources import Form, Source, resolve

__all__ = ["Field", "GgufFile", "open_gguf", "padding", "read_gguf", "tensor_infos"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_HEADER_BYTES = 100_000_000
"""Four times what the largest vocabularies of 2026 take; the limit of a safetensors header too."""
MAX_TENSORS = 1 << 16
MAX_FIELDS = 1 << 14
MAX_NAME_BYTES = 256
"""llama.cpp itself stops at 63 for tensors; keys are a little longer."""
MAX_TEXT_BYTES = 1024
"""Longer texts are not held; their place is."""
MAX_DIMENSIONS = 4
WINDOW = 1 << 16

SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
"""Types of a field that have one size, as `struct` writes them."""
UINT32, TEXT, ARRAY = 4, 8, 9

PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its type, the bytes `[start, stop)` of its value, and the value itself.

    `value` is None for arrays and for texts above MAX_TEXT_BYTES.
    """

    type: int
    start: int
    stop: int
    value: bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile(Checkpoint):
    """A checkpoint in a GGUF file: its fields, and where each tensor lies.

    `path` is the folder of the file and `files` its one name. `config` holds the fields that
    are numbers or short texts. `tensors` is in the order of the header; shapes have the fastest
    dimension last, as in safetensors. `fields_start` and `fields_stop` bound the fields.
    """

    version: int
    alignment: int
    fields: Mapping[str, Field]
    fields_start: int
    fields_stop: int

    @property
    def file(self) -> Path:
        """The file itself."""
        return self.path / self.files[0]

    @property
    def model_type(self) -> str:
        """`general.architecture`: llama.cpp's name of the architecture. Raises CheckpointError."""
        architecture = self.config.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(
                f"{self.file}: no general.architecture, so that the parts of this model cannot be "
                "told; convert the model again with llama.cpp's convert_hf_to_gguf.py"
            )
        return architecture

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a LoRA adapter and not a model."""
        return self.config.get("general.type") == "adapter"

    def digest(self, key: str) -> str:
        """The SHA-256 of the bytes of a field, empty for one that is not there."""
        field = self.fields.get(key)
        if field is None:
            return ""
        with self.file.open("rb") as file:
            file.seek(field.start)
            return hashlib.sha256(file.read(field.stop - field.start)).hexdigest()


def open_gguf(source: str | Path | Source) -> GgufFile:
    """Read the header of a GGUF model or adapter.

    Raises SourceError for what is no whole GGUF file, CheckpointError for one that
    contradicts the format.
    """
    found = resolve(source)
    if found.form is not Form.GGUF:
        raise SourceError(f"{found.text}: a GGUF file is needed, this is {found.form}")
    opened = read_gguf(found.path.resolve(), found.text)  # the user named it: a link is as good
    parts = opened.config.get("split.count", 1)
    if parts != 1 or PART.search(found.path.name):
        raise SourceError(
            f"{found.text}: one part of a split model; make one file of all parts with llama.cpp's "
            "llama-gguf-split --merge FIRST_PART OUT.gguf"
        )
    return opened


def read_gguf(path: Path, text: str | None = None) -> GgufFile:
    """The header of one GGUF file, checked. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            reader = _Reader(path, file)
            version, tensor_count, field_count = _start(reader)
            fields_start = reader.position
            fields = _fields(reader, field_count)
            fields_stop = reader.position
            alignment = _alignment(path, fields)
            infos = [_info(reader) for _ in range(tensor_count)]
            data = reader.position + padding(reader.position, alignment)
            status = os.fstat(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return GgufFile(
        text=text or str(path),
        path=path.parent,
        config={key: field.value for key, field in fields.items() if field.value is not None},
        tensors=_placed(path, infos, data, alignment, status.st_size),
        files=(path.name,),
        stamps={path.name: (status.st_size, status.st_mtime_ns)},
        version=version,
        alignment=alignment,
        fields=fields,
        fields_start=fields_start,
        fields_stop=fields_stop,
    )


def padding(position: int, alignment: int) -> int:
    """How many bytes are missing to the next multiple of `alignment`."""
    return -position % alignment


def tensor_infos(tensors: Mapping[str, Tensor], alignment: int) -> bytes:
    """The infos of tensors that stand one after the other, each at a multiple of `alignment`."""
    ids = {name: number for number, (name, _, _) in quantisation_types().items()}
    parts, offset = [], 0
    for name, tensor in tensors.items():
        stored = name.encode()
        dimensions = tuple(reversed(tensor.shape))
        parts += [
            struct.pack("<Q", len(stored)),
            stored,
            struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions),
            struct.pack("<IQ", ids[tensor.dtype], offset),
        ]
        offset += tensor.bytes + padding(tensor.bytes, alignment)
    return b"".join(parts)


class _Reader:
    """A cursor over the head of a file; it holds WINDOW bytes, and never passes its end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        size = os.fstat(file.fileno()).st_size
        self.end = min(size, MAX_HEADER_BYTES)
        self.why = "truncated" if size <= MAX_HEADER_BYTES else "a header of more than 100 MB"
        self.window, self.start, self.at = b"", 0, 0

    @property
    def position(self) -> int:
        return self.start + self.at

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable GGUF file: {what}")

    def take(self, count: int) -> bytes:
        self._fill(count)
        taken = self.window[self.at : self.at + count]
        self.at += count
        return taken

    def skip(self, count: int) -> None:
        if count > self.end - self.position:
            raise self.fail(f"{self.why} inside a value at byte {self.position:,}")
        self.at += count

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def name(self, what: str) -> str:
        length = self.number("<Q")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.fail(f"{what} of {length:,} bytes at byte {self.position:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} that is not UTF-8 at byte {self.position:,}") from error

    def skip_texts(self, count: int) -> None:
        """Step over `count` texts; a vocabulary has hundreds of thousands."""
        for _ in range(count):
            self._fill(8)
            self.skip_one()

    def skip_one(self) -> None:
        length = int.from_bytes(self.window[self.at : self.at + 8], "little")
        self.at += 8
        self.skip(length)

    def _fill(self, count: int) -> None:
        if self.at + count <= len(self.window):
            return
        self.start, self.at = self.position, 0
        if count > self.end - self.start:
            raise self.fail(f"{self.why} at byte {self.start:,}")
        self.file.seek(self.start)
        self.window = self.file.read(min(max(count, WINDOW), self.end - self.start))
        if len(self.window) < count:
            raise self.fail("became shorter while it was read")


def _start(reader: _Reader) -> tuple[int, int, int]:
    """Version, number of tensors, number of fields."""
    if reader.end < 24 or reader.take(4) != MAGIC:
        raise reader.fail("it does not start with GGUF")
    version = reader.number("<I")
    if version & 0xFFFF == 0:
        raise reader.fail("a big-endian file; convert it with `gguf-convert-endian FILE little`")
    if version not in VERSIONS:
        raise reader.fail(f"version {version}, taia reads {VERSIONS[0]} and {VERSIONS[1]}")
    tensors, fields = reader.number("<Q"), reader.number("<Q")
    if tensors > MAX_TENSORS or fields > MAX_FIELDS:
        raise reader.fail(f"it claims {tensors:,} tensors and {fields:,} fields")
    return version, tensors, fields


def _fields(reader: _Reader, count: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for _ in range(count):
        key = reader.name("a key")
        if key in fields:
            raise reader.fail(f"the field {key!r} stands twice")
        fields[key] = _field(reader, key)
    return fields


def _field(reader: _Reader, key: str) -> Field:
    kind = reader.number("<I")
    start = reader.position
    value: bool | int | float | str | None = None
    if kind in SCALARS:
        value = reader.number(SCALARS[kind])
    elif kind == TEXT:
        value = _text(reader, key)
    elif kind == ARRAY:
        item, length = reader.number("<I"), reader.number("<Q")
        if item not in SCALARS and item != TEXT:
            raise reader.fail(f"the field {key!r} is an array of type {item}")
        least = 8 if item == TEXT else struct.calcsize(SCALARS[item])
        if length * least > reader.end - reader.position:
            raise reader.fail(f"{reader.why} inside the {length:,} values of {key!r}")
        if item == TEXT:
            reader.skip_texts(length)
        else:
            reader.skip(length * least)
    else:
        raise reader.fail(f"the field {key!r} has the unknown type {kind}")
    return Field(kind, start, reader.position, value)


def _text(reader: _Reader, key: str) -> str | None:
    length = reader.number("<Q")
    if length > MAX_TEXT_BYTES:
        reader.skip(length)
        return None
    try:
        return reader.take(length).decode()
    except UnicodeDecodeError as error:
        raise reader.fail(f"the text of {key!r} is not UTF-8") from error


def _alignment(path: Path, fields: Mapping[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return DEFAULT_ALIGNMENT
    value = field.value
    if field.type != UINT32 or not isinstance(value, int) or value.bit_count() != 1:
        raise CheckpointError(f"{path}: general.alignment is {value!r}, not a power of two")
    if value > MAX_ALIGNMENT:
        raise CheckpointError(f"{path}: general.alignment is {value:,}, above {MAX_ALIGNMENT:,}")
    return value


def _info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor: name, shape with the fastest dimension last, type, offset into the data."""
    name = reader.name("a tensor name")
    count = reader.number("<I")
    if count > MAX_DIMENSIONS:
        raise reader.fail(f"{name}: {count:,} dimensions")
    stored = struct.unpack(f"<{count}Q", reader.take(8 * count))
    return name, tuple(reversed(stored)), reader.number("<I"), reader.number("<Q")


def _placed(
    path: Path,
    infos: list[tuple[str, tuple[int, ...], int, int]],
    data: int,
    alignment: int,
    size: int,
) -> dict[str, Tensor]:
    """Tensors with their bytes in the file, which do not overlap."""
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    for name, shape, kind, offset in infos:
        if name in tensors:
            faults.append(f"{name}: stands twice")
        fault = _fault(shape, kind, offset, alignment)
        if fault:
            faults.append(f"{name}: {fault}")
            continue
        stored, block, width = quantisation_types()[kind]
        length = math.prod(shape) // block * width
        start = data + offset
        if start + length > size:
            faults.append(f"{name}: ends at byte {start + length:,}, the file at {size:,}")
        tensors[name] = Tensor(name, stored, shape, path.name, start, start + length)
    end = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start < end:
            faults.append(f"{tensor.name}: overlaps the tensor before it")
        end = tensor.stop
    if faults:
        raise CheckpointError(f"{path}: not a readable GGUF file", faults)
    return tensors


def _fault(shape: tuple[int, ...], kind: int, offset: int, alignment: int) -> str:
    """What the format forbids about one tensor, or nothing."""
    if kind not in quantisation_types():
        return f"the unknown type {kind}; is there a newer taia?"
    name, block, _ = quantisation_types()[kind]
    row = shape[-1] if shape else 1
    if 0 in shape or math.prod(shape) >= 1 << 60:
        return f"the shape {list(shape)}"
    if row % block:
        return f"rows of {row:,} are not whole blocks of {block} ({name})"
    if offset % alignment:
        return f"starts at {offset:,}, which is no multiple of {alignment}"
    return ""
