"""Carry a plan out: a new checkpoint from the bytes of two.

Where the strength is 0 or 1 the bytes of a tensor are copied from base or tuned without
being decoded; neighbours in one file are copied in one go, inside the kernel. Elsewhere
base + strength * delta is computed in float32, a bounded chunk at a time. No torch, and
memory does not grow with the model.

The output keeps the base's shards and the order of their tensors; everything that is not
weights (configuration, tokenizer, chat template) is the tuned model's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path

from taia.adapter import WEIGHTS, Adapter
from taia.card import model_card
from taia.checkpoint import SINGLE, Checkpoint
from taia.downloads import Download
from taia.errors import SourceError
from taia.files import (
    atomic_write,
    check_room,
    refuse_existing,
    refuse_overlap,
    staged_folder,
)
from taia.hashing import ALGORITHM, with_digests
from taia.pieces import Blend, Copy, Merge, Piece, copy_range, pieces
from taia.plan import Origin, Plan, plan
from taia.receipt import RECEIPT, Entry, Receipt, digest_of
from taia.selection import Selection
from taia.slicing import slice_adapter
from taia.sources import Form, Source, resolve
from taia.writing import (
    COMPANIONS,
    TOKENIZER_FILES,
    copy_companions,
    header_digest,
    header_of,
    record_of,
    start_writing,
    write_all,
    write_index,
)

__all__ = ["execute", "splice"]

COPY_AT_ONCE = 16 * 1024 * 1024
"""Bytes after which the disk is set to work and progress is told."""

Progress = Callable[[int, int], None]
"""Told the bytes downloaded and written so far, and in all."""


def splice(
    base: str | Path | Source,
    tuned: str | Path | Source,
    out: str | Path,
    keep: str | Selection = "attention",
    *,
    merge: bool = False,
    hash: bool = False,  # noqa: A002  the name that the command line has
    overwrite: bool = False,
    keep_downloads: bool = False,
    on_progress: Progress | None = None,
) -> Receipt:
    """Write the model that keeps `keep` of the delta from `base` to `tuned`.

    Two checkpoints give a checkpoint. An adapter gives a sliced adapter, or with `merge`
    a checkpoint. `hash` stores the BLAKE3 digest of every tensor in the receipt, so that it can
    be verified without the sources; with a remote model they are always stored. Of one, only
    the bytes that are taken are downloaded, and not kept unless `keep_downloads` says so.
    Raises a TaiaError, and leaves nothing at `out`.
    """
    destination = Path(out)
    selection = Selection.parse(keep)
    refuse_existing(destination, overwrite=overwrite)
    found = resolve(tuned, headers_only=True)
    if found.form is Form.ADAPTER and not merge:
        return slice_adapter(
            found, destination, selection, base=base, hash=hash, overwrite=overwrite
        )
    if merge and found.form is not Form.ADAPTER:
        raise SourceError(f"{found.text}: a {found.form}; --merge is for adapters")
    planned = plan(base, found, selection)
    planned.refuse_faults()
    return execute(
        planned, destination, hash=hash, overwrite=overwrite, keep_downloads=keep_downloads,
        on_progress=on_progress,
    )  # fmt: skip


def execute(
    planned: Plan,
    out: Path,
    *,
    hash: bool = False,  # noqa: A002
    overwrite: bool = False,
    keep_downloads: bool = False,
    on_progress: Progress | None = None,
) -> Receipt:
    """Write a plan without faults to `out`. Raises OutputError if it cannot be written,
    SourceError if a remote model cannot be read.
    """
    refuse_overlap(out, planned.base.path, planned.tuned.path)
    total = planned.totals["all"]
    to_write = sum(total[origin.value] for origin in Origin)
    check_room(out, to_write)
    parts = pieces(planned, fetched=False)
    download = Download(planned, {name: part.reads for name, part in parts.items()})
    progress = _Counter(download.size + to_write, on_progress)
    with (
        download.fetched(out, to_write, progress.add, keep=keep_downloads),
        staged_folder(out, overwrite=overwrite) as folder,
    ):
        entries: list[Entry] = []
        for file in planned.base.files:
            entries += _write_file(planned, parts, folder, file, progress)
        if planned.base.files != (SINGLE,):
            write_index(folder, entries)
        if hash or download.mirrors:
            entries = with_digests(folder, entries)
        _copy_companions(planned, folder)
        atomic_write(folder / "README.md", model_card(planned, out.name))
        receipt = _receipt(planned, folder, entries)
        for source in (planned.base, planned.tuned):
            if isinstance(source, Checkpoint):
                source.refuse_changed()
        receipt.write(folder)
    return receipt


class _Counter:
    """Bytes downloaded and written so far, told to whoever asked."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def add(self, count: int) -> None:
        self.done += count
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def _write_file(
    planned: Plan, parts: Mapping[str, Piece], folder: Path, file: str, progress: _Counter
) -> list[Entry]:
    """Write one shard, its tensors in the base's order, and say where each came from."""
    decisions = {decision.name: decision for decision in planned.decisions}
    tensors = [
        planned.stored(decisions[name])
        for name, tensor in planned.base.tensors.items()
        if tensor.file == file
    ]
    header = header_of(tensors)
    entries, position = [], len(header)
    for tensor in tensors:
        part, decision = parts[tensor.name], decisions[tensor.name]
        entry = Entry(
            name=tensor.name,
            file=file,
            start=position,
            stop=position + tensor.bytes,
            origin=decision.source.value,
            strength=decision.strength,
        )
        if isinstance(part, Copy):
            entry = dataclasses.replace(
                entry,
                from_file=part.tensor.file,
                from_start=part.tensor.start,
                from_stop=part.tensor.stop,
            )
        entries.append(entry)
        position = entry.stop
    with (folder / file).open("wb", buffering=0) as target:
        target.write(header)
        for step in _steps([parts[tensor.name] for tensor in tensors]):
            _carry_out(step, target, progress)
    return entries


@dataclasses.dataclass(slots=True)
class _Range:
    """Bytes `[start, stop)` of a source file, of one tensor or of several neighbours."""

    path: Path
    start: int
    stop: int


def _steps(parts: Sequence[Piece]) -> list[_Range | Blend | Merge]:
    """Pieces in order, with copies that are neighbours in their source made one."""
    steps: list[_Range | Blend | Merge] = []
    for part in parts:
        if not isinstance(part, Copy):
            steps.append(part)
            continue
        path, last = part.folder / part.tensor.file, steps[-1] if steps else None
        if isinstance(last, _Range) and (last.path, last.stop) == (path, part.tensor.start):
            last.stop = part.tensor.stop
        else:
            steps.append(_Range(path, part.tensor.start, part.tensor.stop))
    return steps


def _carry_out(step: _Range | Blend | Merge, target: FileIO, progress: _Counter) -> None:
    if isinstance(step, _Range):
        with step.path.open("rb", buffering=0) as source:
            for start in range(step.start, step.stop, COPY_AT_ONCE):
                length = min(COPY_AT_ONCE, step.stop - start)
                copy_range(source, target, start, length)
                start_writing(target, length)
                progress.add(length)
        return
    for chunk in step.chunks():
        write_all(target, chunk)
        progress.add(len(chunk))


def _copy_companions(planned: Plan, folder: Path) -> None:
    """Configuration and tokenizer of the tuned model; an adapter brings at most a tokenizer."""
    tuned = planned.tuned.path
    if not isinstance(planned.tuned, Adapter):
        copy_companions(tuned, folder, COMPANIONS)
        if planned.config:
            config = {**planned.tuned.config, **planned.config}
            atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return
    # a tokenizer is one set of files: two mixed ones would be a third
    complete = (tuned / "tokenizer_config.json").is_file() and (tuned / "tokenizer.json").is_file()
    without = TOKENIZER_FILES if complete else ()
    copy_companions(planned.base.path, folder, COMPANIONS, without=without)
    copy_companions(tuned, folder, TOKENIZER_FILES if complete else ("*.jinja",))


def _receipt(planned: Plan, folder: Path, entries: list[Entry]) -> Receipt:
    tuned_files = (
        (WEIGHTS, "adapter_config.json")
        if isinstance(planned.tuned, Adapter)
        else planned.tuned.files
    )
    weights = {entry.file for entry in entries}
    others = [f.name for f in sorted(folder.iterdir()) if f.name not in weights | {RECEIPT}]
    return Receipt(
        form="checkpoint",
        selection=str(planned.selection),
        base=record_of(planned.base.text, planned.base.path, planned.base.files),
        tuned=record_of(planned.tuned.text, planned.tuned.path, tuned_files),
        tensors=entries,
        headers={file: header_digest(folder / file) for file in sorted(weights)},
        files={name: digest_of(folder / name) for name in others},
        algorithm=ALGORITHM,
    )
