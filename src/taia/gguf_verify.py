"""Whether a GGUF file that taia wrote is what its receipt says, byte for byte.

The plan is made again from the two sources, and so is every byte of the output: the head, each
tensor, and the zeros between them. With digests (`--hash`) the sources are not needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from taia.errors import CheckpointError, TaiaError, VerificationError
from taia.gguf_header import GgufFile, padding, read_gguf
from taia.gguf_splice import GgufPiece, files_of, gguf_pieces, layout_of
from taia.hashing import digests
from taia.pieces import Copy
from taia.plan import Plan, plan
from taia.receipt import Entry, Receipt, receipt_path, source_faults
from taia.sources import Form, Source

__all__ = ["verify_gguf"]


def verify_gguf(out: Path, receipt: Receipt) -> Receipt:
    """Check an output file against its receipt. Raises VerificationError with every fault."""
    try:
        stored = read_gguf(out)
    except CheckpointError as error:
        raise VerificationError(
            f"{out}: not what {receipt_path(out).name} says: {error}"
        ) from error
    name = receipt_path(out).name
    faults = [] if receipt.is_as_written(out) else [f"{name}: edited after it was written"]
    faults += _place_faults(receipt, stored) + _head_faults(receipt, stored)
    gone = source_faults(receipt)
    hashed = all(entry.digest for entry in receipt.tensors)
    if hashed and not faults:
        written = digests(out.parent, receipt.tensors, receipt.algorithm)
        faults += [
            f"{entry.name}: its bytes are not those that were written"
            for entry in receipt.tensors
            if written.get(entry.name) != entry.digest
        ]
    if not gone and not faults:
        faults += _content_faults(out, receipt)
    elif gone and not hashed:
        faults += [*gone, "without its sources only an output made with --hash can be verified"]
    if faults:
        raise VerificationError(f"{out}: not what {receipt_path(out).name} says", faults)
    return receipt


def _place_faults(receipt: Receipt, stored: GgufFile) -> list[str]:
    named = {entry.name: entry for entry in receipt.tensors}
    faults = [f"{name}: missing" for name in named if name not in stored.tensors]
    faults += [f"{name}: not in the receipt" for name in stored.tensors if name not in named]
    return faults + [
        f"{name}: stands at another place than the receipt says"
        for name, tensor in stored.tensors.items()
        if name in named and _place(named[name]) != (tensor.file, tensor.start, tensor.stop)
    ]


def _place(entry: Entry) -> tuple[str, int, int]:
    return entry.file, entry.start, entry.stop


def _head_faults(receipt: Receipt, stored: GgufFile) -> list[str]:
    """A changed head, and anything but zeros between and behind the tensors."""
    tensors = sorted(stored.tensors.values(), key=lambda tensor: tensor.start)
    if not tensors:
        return ["it holds no tensor"]
    faults = []
    with stored.file.open("rb") as file:
        digest = hashlib.sha256(file.read(tensors[0].start)).hexdigest()
        if receipt.headers != {stored.files[0]: digest}:
            faults.append(f"{stored.files[0]}: its header was altered")
        for tensor in tensors:
            length = padding(tensor.stop, stored.alignment)
            file.seek(tensor.stop)
            if file.read(length) != bytes(length):
                faults.append(f"{tensor.name}: the bytes behind it are not zero")
        if file.read(1):
            faults.append("there are bytes behind the last tensor")
    return faults


def _content_faults(out: Path, receipt: Receipt) -> list[str]:
    """Compare with the sources."""
    if receipt.base is None or any(len(r.files) != 1 for r in (receipt.base, receipt.tuned)):
        return ["the receipt does not name one base and one tuned file"]
    try:
        base, tuned = (
            Source(record.text, Form.GGUF, Path(record.path) / next(iter(record.files)))
            for record in (receipt.base, receipt.tuned)
        )
        # what needed requantize is a fault without it, and nothing else changes by it
        planned = plan(base, tuned, receipt.selection, requantize=True)
        planned.refuse_faults()
        return _differences(out, receipt, planned)
    except TaiaError as error:
        return [f"the receipt cannot be followed: {error}"]


def _differences(out: Path, receipt: Receipt, planned: Plan) -> list[str]:
    layout, parts = layout_of(planned, out.name), gguf_pieces(planned)
    decisions = {decision.name: decision for decision in planned.decisions}
    if decisions.keys() != {entry.name for entry in receipt.tensors}:
        return ["the receipt does not list the tensors that its selection gives"]
    faults = []
    with out.open("rb") as file:
        if file.read(len(layout.head)) != layout.head:
            faults.append(f"{out.name}: its header is not the one of its sources")
    for entry in receipt.tensors:
        decision, part = decisions[entry.name], parts[entry.name]
        if (entry.origin, entry.strength) != (decision.source.value, decision.strength):
            faults.append(f"{entry.name}: the receipt names another source than its selection")
        elif _source(entry) != _source_of(part):
            faults.append(f"{entry.name}: the receipt names other bytes of its source")
        elif not _equal(out, entry, part.chunks()):
            faults.append(f"{entry.name}: differs from its source ({entry.origin})")
    return faults or _no_difference(out, receipt, planned)


def _source(entry: Entry) -> tuple[str | None, int | None, int | None]:
    return entry.from_file, entry.from_start, entry.from_stop


def _source_of(part: GgufPiece) -> tuple[str | None, int | None, int | None]:
    if isinstance(part, Copy):
        return part.tensor.file, part.tensor.start, part.tensor.stop
    return None, None, None


def _no_difference(out: Path, receipt: Receipt, planned: Plan) -> list[str]:
    """The fault of a model that keeps something and yet is the base."""
    base, tuned = files_of(planned)
    kept = [entry for entry in receipt.tensors if entry.origin != "base"]
    if tuned.is_adapter or not kept:
        return []
    if any(not _equal(out, e, Copy(base.path, base.tensors[e.name]).chunks()) for e in kept):
        return []
    return [f"'{receipt.selection}' keeps {len(kept)} tensors, and every one equals the base's"]


def _equal(out: Path, entry: Entry, chunks: Iterator[bytes] | Iterable[bytes]) -> bool:
    """Whether the bytes of an entry are exactly those of `chunks`."""
    left = entry.stop - entry.start
    with out.open("rb") as file:
        file.seek(entry.start)
        for chunk in chunks:
            if len(chunk) > left or file.read(len(chunk)) != chunk:
                return False
            left -= len(chunk)
    return left == 0
