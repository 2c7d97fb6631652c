"""Whether an output is what its receipt says, byte for byte.

The plan of the receipt is made again from the sources, every stream of bytes is made again,
and each is compared with what stands on the disk: copied tensors side by side with the very
bytes they were copied from, on all cores, blends by computing them again. Where the receipt
holds digests (`--hash`) the sources are not needed: each tensor is compared with its digest. Of
checkpoints that are there no more is then read than tells the output from them; adapters,
extractions and GGUF files are compared with them as without digests.

Found: a flipped bit, a missing or additional tensor or file, a changed header, an altered
receipt, sources that changed after the splice, a tie between embedding and head that is
broken, and an output that keeps something and yet equals the base. What that proves, and
what not: docs/proof.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from taia.adapter import WEIGHTS, read_adapter
from taia.checkpoint import INDEX, Checkpoint, Tensor, open_checkpoint, read_header
from taia.companions import file_of, files_in
from taia.compare import Pair, differing
from taia.errors import CheckpointError, TaiaError, VerificationError
from taia.files import read_json
from taia.hashing import digests
from taia.pieces import Copy, Merge, Piece, pieces
from taia.plan import Decision, Plan, plan
from taia.receipt import RECEIPT, Entry, Receipt, source_faults
from taia.slicing import sliced_tensors
from taia.ties import tie_faults
from taia.untrusted import open_regular
from taia.workers import results
from taia.writing import header_digest

__all__ = ["verify"]

Note = Callable[[str], None]

AT_ONCE = 16 * 1024 * 1024
"""Bytes that are read at once: the system gives 2 GiB at the most."""


def verify(out: str | Path, *, on_note: Note | None = None) -> Receipt:
    """Check an output folder or GGUF file against its receipt, and return the receipt.

    `on_note` is told what is no fault and yet worth knowing. Raises VerificationError with
    every fault that was found.
    """
    folder = Path(out)
    receipt = Receipt.read(folder)
    if receipt.form == "gguf":
        from taia.gguf_verify import verify_gguf

        return verify_gguf(folder, receipt)
    faults = [] if receipt.is_as_written(folder) else [f"{RECEIPT}: edited after it was written"]
    faults += _file_faults(folder, receipt)
    stored, unreadable = _stored(folder, receipt)
    faults += unreadable + _entry_faults(receipt, stored)
    intact = [e for e in receipt.tensors if e.name in stored and _same_place(e, stored[e.name])]
    hashed = all(entry.digest for entry in receipt.tensors)
    faults += _digest_faults(folder, receipt, [entry for entry in intact if entry.digest])
    if not hashed or not source_faults(receipt):
        faults += _source_faults(folder, receipt, intact, on_note, hashed=hashed)
    if receipt.form == "checkpoint":
        faults += _tie_faults(folder, stored)
    if faults:
        raise VerificationError(f"{folder}: not what {RECEIPT} says", faults)
    return receipt


def _file_faults(folder: Path, receipt: Receipt) -> list[str]:
    """Files that are missing, additional or altered, weights aside."""
    faults = []
    expected = {RECEIPT, *receipt.headers, *receipt.files}
    there = files_in(folder)
    for name in there:
        if name not in expected and not file_of(name).startswith("."):
            faults.append(f"{name}: not written by taia")
    for name, digest in receipt.files.items():
        path = folder / name
        if Path(file_of(name)).name != file_of(name):
            faults.append(f"{name}: the receipt names a file outside the folder")
        elif name not in there or not path.is_file():
            faults.append(f"{name}: missing")
        elif _digest_of(path, folder) != digest:
            faults.append(f"{name}: altered")
    return faults


def _digest_of(path: Path, folder: Path) -> str | None:
    try:
        with open_regular(path, folder) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, CheckpointError):
        return None


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
            altered = header_digest(path) != digest
        except (CheckpointError, OSError) as error:
            faults.append(str(error))
            continue
        if altered:
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


def _digest_faults(folder: Path, receipt: Receipt, intact: list[Entry]) -> list[str]:
    try:
        found = digests(folder, intact, receipt.algorithm)
    except CheckpointError as error:
        return [str(error)]
    return [f"{entry.name}: its bytes are not those that were written"
            for entry in intact if found.get(entry.name) != entry.digest]  # fmt: skip


def _source_faults(
    folder: Path, receipt: Receipt, intact: list[Entry], on_note: Note | None, *, hashed: bool
) -> list[str]:
    """Compare with the sources. Their own changes are faults, as nothing can then be proven."""
    faults = source_faults(receipt)
    if faults:
        return [*faults, "without its sources only an output made with --hash can be verified"]
    try:
        if receipt.form == "extracted":
            from taia.extract import extraction_faults  # numpy only where something is computed

            return extraction_faults(folder, receipt)
        if receipt.form == "adapter":
            return _adapter_faults(folder, receipt, intact)
        return _checkpoint_faults(folder, receipt, intact, on_note, hashed=hashed)
    except (TaiaError, OSError) as error:
        return [f"the receipt cannot be followed: {error}"]


def _checkpoint_faults(
    folder: Path, receipt: Receipt, intact: list[Entry], on_note: Note | None, *, hashed: bool
) -> list[str]:
    if receipt.base is None:
        return ["the receipt names no base"]
    planned = plan(receipt.base.path, receipt.tuned.path, receipt.selection)
    planned.refuse_faults()
    decisions = {decision.name: decision for decision in planned.decisions}
    parts = pieces(planned)
    faults = []
    if decisions.keys() != {entry.name for entry in receipt.tensors}:
        faults.append("the receipt does not list the tensors of the two models")
    known = [entry for entry in intact if entry.name in decisions and entry.name in parts]
    faults += _equality_faults(folder, planned, known, on_note)
    followed = []
    for entry in known:
        if _names_its_source(entry, decisions[entry.name], parts[entry.name]):
            followed.append(entry)
        else:
            faults.append(f"{entry.name}: the receipt names another source than its selection")
    if hashed:
        return faults
    different = _differing(folder, followed, parts)
    return faults + [
        f"{entry.name}: differs from its source ({entry.origin})"
        for entry in followed
        if entry.name in different
    ]


def _names_its_source(entry: Entry, decision: Decision, part: Piece) -> bool:
    """Whether a line of the receipt says what its selection says."""
    if (entry.origin, entry.strength) != (decision.source.value, decision.strength):
        return False
    if (entry.parts or {}) != dict(decision.parts):
        return False
    if not isinstance(part, Copy):
        return True
    place = (part.tensor.file, part.tensor.start, part.tensor.stop)
    return place == (entry.from_file, entry.from_start, entry.from_stop)


def _differing(folder: Path, entries: Sequence[Entry], parts: Mapping[str, Piece]) -> set[str]:
    """The names of the entries that are not what their pieces give; in one pass over both."""
    copies: list[Pair] = []
    others: list[tuple[Entry, Piece]] = []
    different = set()
    for entry in entries:
        part = parts[entry.name]
        if not isinstance(part, Copy):
            others.append((entry, part))
        elif part.tensor.bytes != entry.stop - entry.start:
            different.add(entry.name)
        else:
            copies.append(_pair(folder, entry, part.folder, part.tensor))
    equal = results(others, lambda task: _as_computed(folder, *task))
    for (entry, _), same in zip(others, equal, strict=True):
        if not same:
            different.add(entry.name)
    return different | differing(copies)


def _as_computed(folder: Path, entry: Entry, part: Piece) -> bool:
    """Whether an entry is what its piece gives; a merge, whose bytes a digest guards, nearly."""
    if _equal(folder, entry, part.chunks()):
        return True
    if not isinstance(part, Merge) or entry.digest is None:
        return False
    from taia.nearly import nearly_equal

    return nearly_equal(folder, entry, part.base.dtype, part.chunks())


def _pair(folder: Path, entry: Entry, source: Path, tensor: Tensor) -> Pair:
    return Pair(
        entry.name,
        folder / entry.file,
        entry.start,
        source / tensor.file,
        tensor.start,
        tensor.bytes,
    )


def _equality_faults(
    folder: Path, planned: Plan, entries: Sequence[Entry], on_note: Note | None
) -> list[str]:
    """The fault of an output that keeps something and equals the base all the same.

    That it equals the tuned model, although something was dropped, is only told: its bytes
    are as asked for, the fine-tune changed nothing but what is kept.
    """
    kept = [entry for entry in entries if entry.origin != "base"]
    if kept and _all_equal(folder, kept, planned.base):
        return ["nothing that is kept differs from the base: the output is the base model"]
    dropped = [entry for entry in entries if entry.origin == "base"]
    blended = any(entry.origin == "blend" for entry in entries)
    if on_note is None or not dropped or blended or not isinstance(planned.tuned, Checkpoint):
        return []
    if _all_equal(folder, dropped, planned.tuned):
        on_note("nothing that is dropped differs from the base: the output is the tuned model")
    return []


def _all_equal(folder: Path, entries: Sequence[Entry], source: Checkpoint) -> bool:
    """Whether every entry has the bytes of `source`; small ones first, until one differs."""
    for entry in sorted(entries, key=lambda entry: entry.stop - entry.start):
        tensor = source.tensors.get(entry.name)
        if tensor is None or tensor.bytes != entry.stop - entry.start:
            return False
        if not _equal(folder, entry, Copy(source.path, tensor).chunks()):
            return False
    return True


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


def _tie_faults(folder: Path, stored: Mapping[str, Tensor]) -> list[str]:
    try:
        config = read_json(folder / "config.json")
        return tie_faults(folder, config if isinstance(config, dict) else {}, stored)
    except TaiaError:
        return []  # told as an altered file, or as names that the table does not know


def _equal(folder: Path, entry: Entry, chunks: Iterator[bytes]) -> bool:
    """Whether the bytes of an entry are exactly those of `chunks`."""
    left = entry.stop - entry.start
    with open_regular(folder / entry.file) as file:
        file.seek(entry.start)
        for chunk in chunks:
            if len(chunk) > left:
                return False
            for first in range(0, len(chunk), AT_ONCE):
                part = memoryview(chunk)[first : first + AT_ONCE]
                if file.read(len(part)) != part:
                    return False
            left -= len(chunk)
    return left == 0
