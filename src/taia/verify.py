"""Whether an output is what its receipt says, byte for byte.

The plan of the receipt is made again from the sources, every stream of bytes is made again,
and each is compared with what stands on the disk. So a copied tensor is compared with the
very bytes it was copied from, and a blend is computed again. Where the receipt holds digests
(`--hash`) the sources are not needed and each tensor is compared with its digest.

Found: a flipped bit, a missing or additional tensor or file, a changed header, an altered
receipt, sources that changed after the splice, and an output that keeps something and yet
equals the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from taia.adapter import WEIGHTS, read_adapter
from taia.checkpoint import INDEX, Tensor, open_checkpoint, read_header
from taia.errors import CheckpointError, TaiaError, VerificationError
from taia.pieces import Copy, pieces
from taia.plan import plan
from taia.receipt import RECEIPT, Entry, Receipt, SourceRecord, digest_of, identity
from taia.slicing import sliced_tensors
from taia.writing import header_digest, tensor_digest

__all__ = ["verify"]


def verify(out: str | Path) -> Receipt:
    """Check an output folder against its receipt, and return the receipt.

    Raises VerificationError with every fault that was found.
    """
    folder = Path(out)
    receipt = Receipt.read(folder)
    faults = _file_faults(folder, receipt)
    stored, unreadable = _stored(folder, receipt)
    faults += unreadable + _entry_faults(receipt, stored)
    intact = [e for e in receipt.tensors if e.name in stored and _same_place(e, stored[e.name])]
    hashed = all(entry.digest for entry in receipt.tensors)
    if hashed:
        faults += [f"{entry.name}: its bytes are not those that were written"
                   for entry in intact if tensor_digest(folder, entry) != entry.digest]  # fmt: skip
    if not hashed or not _missing_sources(receipt):
        faults += _content_faults(folder, receipt, intact)
    if faults:
        raise VerificationError(f"{folder}: not what {RECEIPT} says", faults)
    return receipt


def _file_faults(folder: Path, receipt: Receipt) -> list[str]:
    """Files that are missing, additional or altered, weights aside."""
    faults = []
    expected = {RECEIPT, *receipt.headers, *receipt.files}
    for file in sorted(folder.iterdir()):
        if file.name not in expected and not file.name.startswith("."):
            faults.append(f"{file.name}: not written by taia")
    for name, digest in receipt.files.items():
        path = folder / name
        if Path(name).name != name:
            faults.append(f"{name}: the receipt names a file outside the folder")
        elif not path.is_file():
            faults.append(f"{name}: missing")
        elif digest_of(path) != digest:
            faults.append(f"{name}: altered")
    return faults


def _stored(folder: Path, receipt: Receipt) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that stand in the weight files, and what is wrong with those files."""
    stored: dict[str, Tensor] = {}
    faults = []
    for file, digest in receipt.headers.items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            faults.append(f"{file}: missing")
            continue
        try:
            stored |= read_header(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if header_digest(path) != digest:
            faults.append(f"{file}: its header was altered")
    if (folder / INDEX).is_file() and not faults:
        try:
            open_checkpoint(folder)
        except TaiaError as error:
            faults.append(str(error))
    return stored, faults


def _entry_faults(receipt: Receipt, stored: Mapping[str, Tensor]) -> list[str]:
    named = {entry.name: entry for entry in receipt.tensors}
    faults = [f"{name}: missing" for name in named if name not in stored]
    faults += [f"{name}: not in the receipt" for name in stored if name not in named]
    faults += [
        f"{name}: stands at another place than the receipt says"
        for name, entry in named.items()
        if name in stored and not _same_place(entry, stored[name])
    ]
    return faults


def _same_place(entry: Entry, tensor: Tensor) -> bool:
    return (entry.file, entry.start, entry.stop) == (tensor.file, tensor.start, tensor.stop)


def _content_faults(folder: Path, receipt: Receipt, intact: list[Entry]) -> list[str]:
    """Compare with the sources. Their own changes are faults, as nothing can then be proven."""
    faults = _missing_sources(receipt)
    if faults:
        return [*faults, "without its sources only an output made with --hash can be verified"]
    try:
        if receipt.form == "adapter":
            return _adapter_faults(folder, receipt, intact)
        return _checkpoint_faults(folder, receipt, intact)
    except TaiaError as error:
        return [f"the receipt cannot be followed: {error}"]


def _checkpoint_faults(folder: Path, receipt: Receipt, intact: list[Entry]) -> list[str]:
    if receipt.base is None:
        return ["the receipt names no base"]
    planned = plan(receipt.base.path, receipt.tuned.path, receipt.selection)
    planned.refuse_faults()
    decisions = {decision.name: decision for decision in planned.decisions}
    parts = pieces(planned)
    faults = []
    if decisions.keys() != {entry.name for entry in receipt.tensors}:
        faults.append("the receipt does not list the tensors of the two models")
    kept = [entry for entry in intact if entry.name in decisions and entry.origin != "base"]
    if kept and all(
        _equal(folder, entry, Copy(planned.base.path, planned.base.tensors[entry.name]).chunks())
        for entry in kept
    ):
        faults.append("nothing that is kept differs from the base: the output is the base model")
    for entry in intact:
        decision, part = decisions.get(entry.name), parts.get(entry.name)
        if decision is None or part is None:
            continue
        place = None
        if isinstance(part, Copy):
            place = (part.tensor.file, part.tensor.start, part.tensor.stop)
        stated = (entry.origin, entry.strength)
        if stated != (decision.source.value, decision.strength) or (
            place and place != (entry.from_file, entry.from_start, entry.from_stop)
        ):
            faults.append(f"{entry.name}: the receipt names another source than its selection")
        elif not _equal(folder, entry, part.chunks()):
            faults.append(f"{entry.name}: differs from its source ({entry.origin})")
    return faults


def _adapter_faults(folder: Path, receipt: Receipt, intact: list[Entry]) -> list[str]:
    adapter = read_adapter(receipt.tuned.path)
    base = None if receipt.base is None else receipt.base.path
    kept = sliced_tensors(adapter, receipt.selection, base)
    faults = []
    if kept.keys() != {entry.name for entry in receipt.tensors}:
        faults.append("the receipt does not list the tensors that its selection keeps")
    faults += [
        f"{entry.name}: the receipt names another source than its selection"
        for entry in receipt.tensors
        if (entry.origin, entry.strength, entry.from_file) != ("tuned", 1.0, WEIGHTS)
    ]
    return faults + [
        f"{entry.name}: differs from its source"
        for entry in intact
        if entry.name in kept and not _equal(folder, entry, iter([kept[entry.name][1]]))
    ]


def _missing_sources(receipt: Receipt) -> list[str]:
    """Which source files are gone or changed."""
    records = [record for record in (receipt.base, receipt.tuned) if record is not None]
    return [fault for record in records for fault in _source_faults(record)]


def _source_faults(record: SourceRecord) -> list[str]:
    faults = []
    for name, before in record.files.items():
        path = Path(record.path) / name
        if not path.is_file():
            faults.append(f"{path}: the source is gone")
        elif identity(path) != before:
            faults.append(f"{path}: the source changed since")
    return faults


def _equal(folder: Path, entry: Entry, chunks: Iterator[bytes]) -> bool:
    """Whether the bytes of an entry are exactly those of `chunks`."""
    left = entry.stop - entry.start
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.start)
        for chunk in chunks:
            if len(chunk) > left or file.read(len(chunk)) != chunk:
                return False
            left -= len(chunk)
    return left == 0
