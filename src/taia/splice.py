"""Carry a plan out: a new checkpoint from the bytes of two.

Where the strength is 0 or 1 the bytes of a tensor are copied from base or tuned without
being decoded; neighbours in one file are copied in one go, inside the kernel or, where the
output is large, past the page cache (`taia.direct`, `taia.cold`). Elsewhere base +
strength * delta is computed in float32, a bounded chunk at a time. No torch, and memory does not
grow with the model.

The output keeps the base's shards and the order of their tensors, unless a shard size is
given; everything that is not weights (configuration, tokenizer, chat template) is the tuned
model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from taia import cold, direct
from taia.checkpoint import SINGLE, Checkpoint
from taia.companions import COMPANIONS, TOKENIZER_FILES, copy_companions, files_in
from taia.downloads import Download
from taia.errors import SourceError
from taia.files import (
    check_room,
    refuse_existing,
    refuse_gguf_name,
    refuse_overlap,
    staged_folder,
)
from taia.filling import fill
from taia.pieces import Copy, Merge, Piece, pieces
from taia.plan import Plan, plan
from taia.receipt import ALGORITHM, RECEIPT, Entry, Receipt, digest_of
from taia.selection import Selection
from taia.shards import Shard, parse_size, shards_of
from taia.sources import Form, Source, resolve
from taia.writing import (
    digest_of_bytes,
    record_of,
    write_index,
)

__all__ = ["Note", "Progress", "execute", "splice"]

Progress = Callable[[int, int], None]
"""Told the bytes downloaded and written so far, and in all."""

Note = Callable[[str], object]
"""Told what a plan notes: what transformers does not load, a head that is tied in one model."""


def splice(
    base: str | Path | Source,
    tuned: str | Path | Source,
    out: str | Path,
    keep: str | Selection = "attention",
    *,
    merge: bool = False,
    requantize: bool = False,
    hash: bool = False,  # noqa: A002  the name that the command line has
    shard_size: str | int | None = None,
    overwrite: bool = False,
    keep_downloads: bool = False,
    on_progress: Progress | None = None,
    on_note: Note | None = None,
) -> Receipt:
    """Write the model that keeps `keep` of the delta from `base` to `tuned`.

    Two checkpoints give a checkpoint. An adapter gives a sliced adapter, or with `merge`
    a checkpoint. Two GGUF files give the GGUF file `out`; `requantize` lets their types differ.
    `hash` stores the BLAKE3 digest of every tensor in the receipt, so that it
    can be verified without the sources; with a remote model they are always stored. Of one,
    only the bytes that are taken are downloaded, and not kept unless `keep_downloads` says so.
    `shard_size` (bytes, or a text such as 5GB) cuts the
    weights anew; without it the files are the base's. `on_note` is told what is done beyond
    the selection, before anything is written. Raises a TaiaError, and leaves nothing at `out`.
    """
    destination = Path(out)
    selection = Selection.parse(keep)
    size = parse_size(str(shard_size)) if shard_size is not None else None
    start, found = resolve(base, headers_only=True), resolve(tuned, headers_only=True)
    if start.form is found.form is Form.GGUF and not merge:
        if size is not None:
            raise SourceError(f"{found.text}: a GGUF file is one file; --shard-size is not for it")
        from taia.gguf_splice import write_gguf

        planned = plan(start, found, selection, requantize=requantize)
        _clear(planned, on_note)
        return write_gguf(
            planned, destination, hash=hash, overwrite=overwrite, on_progress=on_progress
        )
    refuse_gguf_name(destination)
    refuse_existing(destination, overwrite=overwrite)
    if found.form is Form.ADAPTER and not merge:
        if size is not None:
            raise SourceError(f"{found.text}: a sliced adapter is one file; --shard-size is not")
        if requantize:
            raise SourceError(f"{found.text}: an adapter; --requantize is for two GGUF files")
        from taia.slicing import slice_adapter

        return slice_adapter(
            found, destination, selection, base=start, hash=hash, overwrite=overwrite
        )
    if merge and found.form is not Form.ADAPTER:
        raise SourceError(f"{found.text}: a {found.form}; --merge is for adapters")
    planned = plan(start, found, selection, requantize=requantize)
    _clear(planned, on_note)
    return execute(
        planned,
        destination,
        hash=hash,
        shard_size=size,
        overwrite=overwrite,
        keep_downloads=keep_downloads,
        on_progress=on_progress,
    )


def _clear(planned: Plan, on_note: Note | None) -> None:
    """Raise the faults of a plan; without any tell its notes."""
    planned.refuse_faults()
    if on_note is not None:
        for note in planned.notes:
            on_note(note)


def execute(
    planned: Plan,
    out: Path,
    *,
    hash: bool = False,  # noqa: A002
    shard_size: int | None = None,
    overwrite: bool = False,
    keep_downloads: bool = False,
    on_progress: Progress | None = None,
) -> Receipt:
    """Write a plan without faults to `out`. Raises OutputError if it cannot be written,
    SourceError if a remote model cannot be read.
    """
    refuse_overlap(out, planned.base.path, planned.tuned.path)
    parts = pieces(planned, fetched=False)
    shards = shards_of(planned, parts, shard_size)
    entries = _entries(planned, parts, shards)
    to_write = sum(shard.size for shard in shards)
    check_room(out, to_write)
    download = Download(planned, {name: part.reads for name, part in parts.items()})
    progress = _Counter(download.size + to_write, on_progress)
    receipts: list[Receipt] = []
    hashed = hash or bool(download.mirrors)
    to_read = sum(tensor.bytes for part in parts.values() for _, tensor in part.reads)
    with (
        download.fetched(out, to_write, progress.add, keep=keep_downloads),
        staged_folder(out, overwrite=overwrite) as folder,
    ):
        # what is hashed is read again at once, so it had better be in the page cache
        past = not hashed and direct.suits(folder, to_write)
        fill(
            folder,
            shards,
            parts,
            meanwhile=lambda: receipts.append(
                _write_the_rest(planned, folder, out.name, shards, entries)
            ),
            on_written=progress.add,
            direct=past,
            cold=past and cold.suits({planned.base.path, planned.tuned.path}, to_read),
        )
        receipt = receipts[0]
        if hashed:
            from taia.hashing import with_digests

            receipt = replace(receipt, tensors=with_digests(folder, entries))
        else:
            receipt = replace(receipt, tensors=_with_merges(folder, entries, parts))
        for source in (planned.base, planned.tuned):
            source.refuse_changed()
        receipt.write(folder)
    return receipt


def _with_merges(folder: Path, entries: Sequence[Entry], parts: Mapping[str, Piece]) -> list[Entry]:
    """The entries with the digest of every merge: another machine may sum in another order."""
    merged = [entry for entry in entries if isinstance(parts[entry.name], Merge)]
    if not merged:
        return list(entries)
    from taia.hashing import with_digests

    found = {entry.name: entry for entry in with_digests(folder, merged)}
    return [found.get(entry.name, entry) for entry in entries]


class _Counter:
    """Bytes downloaded and written so far, told to whoever asked."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def add(self, count: int) -> None:
        self.done += count
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def _entries(planned: Plan, parts: Mapping[str, Piece], shards: Sequence[Shard]) -> list[Entry]:
    """Where every tensor of the output will lie, and where it comes from."""
    decisions = {decision.name: decision for decision in planned.decisions}
    entries = []
    for shard in shards:
        for tensor in shard.tensors:
            decision, part = decisions[tensor.name], parts[tensor.name]
            source = part.tensor if isinstance(part, Copy) else None
            entries.append(
                Entry(
                    name=tensor.name,
                    file=shard.name,
                    start=tensor.start,
                    stop=tensor.stop,
                    origin=decision.source.value,
                    strength=decision.strength,
                    from_file=source.file if source else None,
                    from_start=source.start if source else None,
                    from_stop=source.stop if source else None,
                    parts=dict(decision.parts) or None,
                )
            )
    return entries


def _write_the_rest(
    planned: Plan, folder: Path, title: str, shards: Sequence[Shard], entries: list[Entry]
) -> Receipt:
    """Everything beside the weights; the receipt of both is returned, not yet written."""
    from taia.card import model_card

    if [shard.name for shard in shards] != [SINGLE]:
        write_index(folder, entries)
    _copy_companions(planned, folder)
    (folder / "README.md").write_text(model_card(planned, title), encoding="utf-8")
    return _receipt(planned, folder, shards, entries)


def _copy_companions(planned: Plan, folder: Path) -> None:
    """Configuration and tokenizer of the tuned model; an adapter brings at most a tokenizer."""
    tuned = planned.tuned.path
    if isinstance(planned.tuned, Checkpoint):
        copy_companions(tuned, folder, COMPANIONS)
        if planned.config:
            config = {**planned.tuned.config, **planned.config}
            text = json.dumps(config, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
        return
    # a tokenizer is one set of files: two mixed ones would be a third
    complete = (tuned / "tokenizer_config.json").is_file() and (tuned / "tokenizer.json").is_file()
    without = TOKENIZER_FILES if complete else ()
    copy_companions(planned.base.path, folder, COMPANIONS, without=without)
    copy_companions(tuned, folder, TOKENIZER_FILES if complete else ("*.jinja",))


def _receipt(planned: Plan, folder: Path, shards: Sequence[Shard], entries: list[Entry]) -> Receipt:
    if isinstance(planned.tuned, Checkpoint):
        tuned_files = planned.tuned.files
    else:
        from taia.adapter import CONFIG, WEIGHTS

        tuned_files = (WEIGHTS, CONFIG)
    headers = {shard.name: digest_of_bytes(shard.header) for shard in shards}
    others = files_in(folder, {*headers, RECEIPT})
    return Receipt(
        form="checkpoint",
        selection=str(planned.selection),
        base=record_of(planned.base.text, planned.base.path, planned.base.files),
        tuned=record_of(planned.tuned.text, planned.tuned.path, tuned_files),
        tensors=entries,
        headers=dict(sorted(headers.items())),
        files={name: digest_of(folder / name) for name in others},
        algorithm=ALGORITHM,
    )
