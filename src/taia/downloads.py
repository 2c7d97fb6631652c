"""The bytes of remote models that a plan names: fetched before a splice, given back after it.

Data in: the pieces of a plan. What they read of a mirror (see `taia.mirror`) is what is
downloaded: attention from one model, the rest from the other, no byte of the parts that are
dropped. Local models take no part in this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from taia.checkpoint import Checkpoint, Tensor
from taia.companions import COMPANIONS
from taia.files import check_room
from taia.holes import mirror_of, refuse_hole
from taia.plan import Plan

if TYPE_CHECKING:
    from taia.transfer import Range

__all__ = ["Download", "refuse_holes"]

Reads = Mapping[str, list[tuple[Path, Tensor]]]
"""What each output tensor is made from: stored tensors, each in its folder."""


class Download:
    """What a splice of `planned` has to fetch. `size` is the bytes that are not there yet."""

    def __init__(self, planned: Plan, reads: Reads) -> None:
        self.planned = planned
        self._wanted = _wanted(reads)
        folders = {planned.base.path, planned.tuned.path}
        self.mirrors = [mirror for f in sorted(folders) if (mirror := mirror_of(f)) is not None]
        self._kept = {id(mirror) for mirror in self.mirrors if mirror.is_whole()}
        self.size = sum(
            stop - start
            for mirror in self.mirrors
            for ranges in mirror.missing(self._wanted.get(mirror.folder, {})).values()
            for start, stop in ranges
        )

    @contextmanager
    def fetched(
        self, out: Path, to_write: int, on_bytes: Callable[[int], None], *, keep: bool = False
    ) -> Iterator[None]:
        """Within the block the bytes are on this disk.

        After it they are gone, unless the block failed (the next run goes on with them), or
        `keep` is set, or the model was all there before.
        """
        if not self.mirrors:
            yield
            return
        self._check_room(out, to_write)
        with ExitStack() as locks:
            for mirror in self.mirrors:
                locks.enter_context(mirror.locked())
            for mirror in self.mirrors:
                mirror.fetch(self._wanted.get(mirror.folder, {}), on_bytes)
            self._fetch_companions()
            yield
            for mirror in self.mirrors:
                if not keep and id(mirror) not in self._kept:
                    mirror.release()

    def _fetch_companions(self) -> None:
        """Tokenizer and configuration come from the tuned model, or with an adapter the base."""
        merge = not isinstance(self.planned.tuned, Checkpoint)
        source = self.planned.base.path if merge else self.planned.tuned.path
        for mirror in self.mirrors:
            if mirror.folder == source:
                mirror.fetch_companions(COMPANIONS)

    def _check_room(self, out: Path, to_write: int) -> None:
        """Raise OutputError unless what is fetched and what is written have room together."""
        cache = self.mirrors[0].folder
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if parent.stat().st_dev == cache.stat().st_dev:
            check_room(out, self.size + to_write)


def refuse_holes(reads: Reads) -> None:
    """Raise SourceError if something that would be read of a mirror is not there."""
    for folder, files in _wanted(reads).items():
        mirror = mirror_of(folder)
        if mirror is not None and mirror.missing(files):
            name, ranges = next(iter(mirror.missing(files).items()))
            refuse_hole(folder / name, *ranges[0])


def _wanted(reads: Reads) -> dict[Path, dict[str, list[Range]]]:
    """Folder -> weight file -> the byte ranges that are read of it."""
    found: dict[Path, dict[str, list[Range]]] = {}
    for sources in reads.values():
        for folder, tensor in sources:
            files = found.setdefault(folder, {})
            files.setdefault(tensor.file, []).append((tensor.start, tensor.stop))
    return found
