"""Carry a plan of two GGUF files out: one new file, and its receipt beside it.

The fields (hyperparameters, tokenizer, chat template) are the tuned file's, byte for byte, and
so is the order of the tensors; the blocks of each tensor are copied inside the kernel, and
memory does not grow with the model. So the whole of the delta gives the very file of the
tuned model. One field changes in one case: with `requantize` the types are the base's, and
`general.file_type`, which names them, becomes the base's too.

OUT.gguf appears when it is complete. Its receipt, OUT.gguf.taia.json, appears just before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from taia.checkpoint import Tensor
from taia.copying import copy_range, create, start_writing, write_all
from taia.errors import OutputError
from taia.files import check_room, staged_files
from taia.gguf_header import MAGIC, UINT32, GgufFile, padding, tensor_infos
from taia.hashing import with_digests
from taia.pieces import Copy
from taia.plan import Decision, Origin, Plan
from taia.receipt import ALGORITHM, Entry, Receipt, receipt_path
from taia.writing import record_of

__all__ = ["GgufPiece", "Layout", "Mixed", "Scaled", "gguf_pieces", "layout_of", "write_gguf"]

COPY_AT_ONCE = 16 * 1024 * 1024
FILE_TYPE = "general.file_type"


@dataclasses.dataclass(frozen=True, slots=True)
class Mixed:
    """base + strength * (tuned - base), in the type of the base."""

    base_folder: Path
    base: Tensor
    tuned_folder: Path
    tuned: Tensor
    strength: float

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a bounded piece at a time."""
        from taia.gguf_quants import mixed_chunks  # numpy only where something is computed

        return mixed_chunks(
            self.base_folder, self.base, self.tuned_folder, self.tuned, self.strength
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Scaled:
    """strength * a tensor: the B of a LoRA pair."""

    folder: Path
    tensor: Tensor
    strength: float

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a bounded piece at a time."""
        from taia.gguf_quants import scaled_chunks

        return scaled_chunks(self.folder, self.tensor, self.strength)


GgufPiece = Copy | Mixed | Scaled


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What an output file is: everything before its data, and where each tensor stands."""

    head: bytes
    tensors: dict[str, Tensor]
    size: int


def write_gguf(
    planned: Plan,
    out: Path,
    *,
    hash: bool = False,  # noqa: A002
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Receipt:
    """Write a plan of two GGUF files without faults to the file `out`.

    Raises OutputError if it cannot be written, or is one of the two.
    """
    if out.suffix != ".gguf":
        raise OutputError(f"{out}: two GGUF files give a GGUF file; name it {out.name}.gguf")
    base, tuned = files_of(planned)
    for source in (base, tuned):
        if out.resolve() == source.file.resolve():
            raise OutputError(f"{out}: is one of the two models; write somewhere else")
    layout = layout_of(planned, out.name)
    check_room(out, layout.size)
    parts = gguf_pieces(planned)
    with staged_files(receipt_path(out), out, overwrite=overwrite) as (receipt_file, partial):
        create(partial, layout.size, layout.head)  # what no tensor fills stays zero
        with partial.open("r+b", buffering=0) as target:
            for name, tensor in layout.tensors.items():
                _carry_out(parts[name], target, tensor.start)
                if on_progress is not None:
                    on_progress(tensor.stop, layout.size)
        receipt = _receipt(planned, layout)
        if hash:
            entries = with_digests(partial.parent, receipt.tensors)
            receipt = dataclasses.replace(receipt, tensors=entries, algorithm=ALGORITHM)
        for source in (base, tuned):
            source.refuse_changed()
        receipt_file.write_text(receipt.text(), encoding="utf-8")
    return receipt


def files_of(planned: Plan) -> tuple[GgufFile, GgufFile]:
    """Base and tuned of a plan of GGUF files."""
    assert isinstance(planned.base, GgufFile)
    assert isinstance(planned.tuned, GgufFile)
    return planned.base, planned.tuned


def layout_of(planned: Plan, name: str) -> Layout:
    """The head of the output, and its tensors as they will stand in the file `name`."""
    base, tuned = files_of(planned)
    shaped = {d.name: _shaped(planned, d, name) for d in planned.decisions}
    infos = tensor_infos(shaped, tuned.alignment)
    counts = struct.pack("<4sIQQ", MAGIC, tuned.version, len(shaped), len(tuned.fields))
    head = counts + _fields(base, tuned, shaped) + infos
    head += bytes(padding(len(head), tuned.alignment))
    position, placed = len(head), {}
    for tensor in shaped.values():
        stop = position + tensor.bytes
        placed[tensor.name] = dataclasses.replace(tensor, start=position, stop=stop)
        position = stop + padding(stop, tuned.alignment)
    return Layout(head, placed, position)


def gguf_pieces(planned: Plan) -> dict[str, GgufPiece]:
    """The piece of every output tensor, by name. The plan has no faults."""
    return {decision.name: _piece(planned, decision) for decision in planned.decisions}


def _piece(planned: Plan, decision: Decision) -> GgufPiece:
    base, tuned = files_of(planned)
    name = decision.name
    if decision.source is Origin.BASE:
        return Copy(base.path, base.tensors[name])
    if decision.source is Origin.TUNED:
        return Copy(tuned.path, tuned.tensors[name])
    if tuned.is_adapter:
        return Scaled(tuned.path, tuned.tensors[name], decision.strength)
    return Mixed(base.path, base.tensors[name], tuned.path, tuned.tensors[name], decision.strength)


def _shaped(planned: Plan, decision: Decision, file: str) -> Tensor:
    """An output tensor, its type and length known and its place not yet."""
    base, tuned = files_of(planned)
    source = tuned if tuned.is_adapter else base
    return dataclasses.replace(source.tensors[decision.name], file=file)


def _fields(base: GgufFile, tuned: GgufFile, shaped: dict[str, Tensor]) -> bytes:
    """The tuned file's fields as they stand there; the file type as the tensors are."""
    with tuned.file.open("rb") as file:
        file.seek(tuned.fields_start)
        fields = bytearray(file.read(tuned.fields_stop - tuned.fields_start))
    new, old = base.fields.get(FILE_TYPE), tuned.fields.get(FILE_TYPE)
    converted = any(tensor.dtype != tuned.tensors[name].dtype for name, tensor in shaped.items())
    if converted and new and old and new.type == old.type == UINT32:
        at = old.start - tuned.fields_start
        fields[at : at + 4] = struct.pack("<I", new.value)
    return bytes(fields)


def _carry_out(part: GgufPiece, target: FileIO, to: int) -> None:
    """Write one tensor at byte `to`."""
    if not isinstance(part, Copy):
        target.seek(to)
        for chunk in part.chunks():
            write_all(target, chunk)
        return
    tensor = part.tensor
    with (part.folder / tensor.file).open("rb", buffering=0) as source:
        for start in range(tensor.start, tensor.stop, COPY_AT_ONCE):
            length = min(COPY_AT_ONCE, tensor.stop - start)
            copy_range(source, target, start, to, length)
            start_writing(target, to, length)
            to += length


def _receipt(planned: Plan, layout: Layout) -> Receipt:
    base, tuned = files_of(planned)
    parts = gguf_pieces(planned)
    entries = []
    for decision in planned.decisions:
        tensor, part = layout.tensors[decision.name], parts[decision.name]
        source = part.tensor if isinstance(part, Copy) else None
        entries.append(
            Entry(
                name=tensor.name, file=tensor.file, start=tensor.start, stop=tensor.stop,
                origin=decision.source.value, strength=decision.strength,
                from_file=source.file if source else None,
                from_start=source.start if source else None,
                from_stop=source.stop if source else None,
            )
        )  # fmt: skip
    return Receipt(
        form="gguf",
        selection=str(planned.selection),
        base=record_of(base.text, base.path, base.files),
        tuned=record_of(tuned.text, tuned.path, tuned.files),
        tensors=entries,
        headers={tensor.file: hashlib.sha256(layout.head).hexdigest() for tensor in
                 list(layout.tensors.values())[:1]},
        files={},
    )  # fmt: skip
