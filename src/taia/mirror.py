"""A remote model as a local folder that holds only what was asked for.

A mirror lies in the user's cache. It has the configuration and the index of the model, and for
every weight file a sparse file of the right size with the header in its place, so that all that
reads headers works on it as on any folder. Weights come later, by byte range: `fetch`. What is
there stands in a journal beside each file, written after the bytes are on the disk, so that a
download that was killed goes on where it was.

The folder is named for the address and for what the server stated of the files: a model that
changed on its server is another mirror, and the old one goes.

Limits: needs a file system with sparse files for its small size; two processes do not fetch
into one mirror at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path

from taia.companions import TOKENIZER_FILES
from taia.errors import CheckpointError, OutputError, SourceError
from taia.files import atomic_write, check_room, read_json, staged_folder
from taia.holes import MIRROR_MARKER
from taia.index import parse_index
from taia.remote import Remote, Stated
from taia.transfer import (
    MAX_SMALL_BYTES,
    Range,
    find,
    merged,
    parts,
    read,
    read_small,
    subtracted,
    total,
    write_small,
)

__all__ = ["Mirror", "is_incomplete", "mirror_at", "open_mirror"]

CONNECTIONS = 8
FLUSH = 8 * 1024 * 1024
"""Bytes after which a part is noted as present; at most so many are fetched twice."""

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

_opened: dict[Path, Mirror] = {}
"""The mirrors that this process opened, by folder: a path leads back to its server."""


class Mirror:
    """One remote model in the cache. `weights` is what the server states of its weight files."""

    def __init__(self, remote: Remote, folder: Path, weights: Mapping[str, Stated]) -> None:
        self.remote, self.folder, self.weights = remote, folder, dict(weights)
        self._lock = threading.Lock()

    def stated(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """What tells the versions of weight files apart, as far as the server states it."""
        facts = {name: asdict(self.weights[name]) for name in names}
        keys = ("etag", "modified", "sha256")
        return {name: {key: f[key] for key in keys if f[key]} for name, f in facts.items()}

    def missing(self, wanted: Mapping[str, Sequence[Range]]) -> dict[str, list[Range]]:
        """What of `wanted` (weight file -> byte ranges) is not in the mirror yet."""
        left = {name: subtracted(ranges, self.present(name)) for name, ranges in wanted.items()}
        return {name: ranges for name, ranges in left.items() if ranges}

    def present(self, name: str) -> list[Range]:
        """The byte ranges of a weight file that are there, its header included."""
        ranges = [(0, _header_end(self.folder / name))]
        with suppress(FileNotFoundError):
            text = self._journal(name).read_text(encoding="ascii", errors="replace")
            for line in text.split("\n")[:-1]:  # what follows the last newline was cut off
                numbers = line.split()
                if len(numbers) == 2 and all(n.isascii() and n.isdigit() for n in numbers):
                    start, stop = map(int, numbers)
                    if stop <= self.weights[name].size:
                        ranges.append((start, stop))
        return merged(ranges)

    def is_whole(self) -> bool:
        """Whether every byte of every weight file is there."""
        return not self.missing({name: [(0, s.size)] for name, s in self.weights.items()})

    @contextmanager
    def locked(self, wait: float = 0) -> Iterator[None]:
        """Keep other processes from this mirror.

        Raises SourceError if one is at it, and still is after `wait` seconds.
        """
        from filelock import FileLock, Timeout

        with writable(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_name(f"{self.folder.name}.lock"), timeout=wait)
        try:
            lock.acquire()
        except Timeout as error:
            raise SourceError(
                f"{self.remote.text}: another process is downloading it into {self.folder}; "
                "wait for that one, or set TAIA_CACHE to another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def fetch(
        self, wanted: Mapping[str, Sequence[Range]], on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Download what is missing of `wanted`, in parallel. What arrives before a fault stays.

        Raises SourceError, also for a file that is then whole and has another SHA-256 than
        the server states.
        """
        with writable(self.folder):
            self._fetch(wanted, on_bytes)

    def _fetch(
        self, wanted: Mapping[str, Sequence[Range]], on_bytes: Callable[[int], None] | None
    ) -> None:
        missing = self.missing(wanted)
        check_room(self.folder, sum(total(ranges) for ranges in missing.values()))
        work = [(name, *part) for name, ranges in missing.items() for part in parts(ranges)]
        stopped = threading.Event()
        told = on_bytes or (lambda _count: None)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            futures = [pool.submit(self._fetch_part, *item, told, stopped) for item in work]
            try:
                for future in as_completed(futures):  # the first fault ends them all
                    future.result()
            except BaseException:  # an interrupt too: no thread goes on
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        self.settle()
        for name in missing:
            self._check_digest(name)

    def fetch_all(self, companions: Sequence[str], have: Mapping[str, bytes] | None = None) -> None:
        """Download whatever is missing of the weights, and the small files but those in `have`."""
        with self.locked():
            self.fetch({name: [(0, stated.size)] for name, stated in self.weights.items()})
            self.fetch_companions(companions, have)

    def fetch_companions(
        self, patterns: Sequence[str], have: Mapping[str, bytes] | None = None
    ) -> None:
        """Bring the small files that match `patterns` (tokenizer, chat template) up to date.

        The content of those in `have` is not downloaded again.
        """
        for name, stated in find(self.remote, patterns).items():
            if not name.endswith(".safetensors") and name != INDEX:
                with writable(self.folder):
                    chunks = [have[name]] if have and name in have else None
                    write_small(self.remote, self.folder, name, stated, chunks)

    def release(self) -> None:
        """Give the room of the weights back; headers stay."""
        for name, stated in self.weights.items():
            journal = self._journal(name)
            if journal.exists():
                journal.unlink()  # first: what is not noted is not trusted
                end = _header_end(self.folder / name)
                os.truncate(self.folder / name, end)
                os.truncate(self.folder / name, stated.size)
        self.settle()

    def settle(self) -> None:
        """Give every weight file one time: holes that are filled are no change of the model."""
        for name in self.weights:
            os.utime(self.folder / name, (0, 0))

    def _fetch_part(
        self, name: str, start: int, stop: int, told: Callable[[int], None],
        stopped: threading.Event,
    ) -> None:  # fmt: skip
        noted = position = start
        with (self.folder / name).open("r+b", buffering=0) as file:
            file.seek(start)
            try:
                stated = self.weights[name]
                for chunk in read(self.remote, name, stated, start, stop, stopped.wait):
                    if stopped.is_set():
                        return
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                    position += len(chunk)
                    with self._lock:
                        told(len(chunk))
                    if position - noted >= FLUSH:
                        noted = self._note(name, file, noted, position)
            finally:
                if position > noted:
                    self._note(name, file, noted, position)

    def _note(self, name: str, file: FileIO, start: int, stop: int) -> int:
        """Write a range into the journal, after its bytes are on the disk. Returns `stop`."""
        os.fsync(file.fileno())
        with self._lock, self._journal(name).open("a", encoding="ascii") as journal:
            journal.write(f"{start} {stop}\n")
            journal.flush()
            os.fsync(journal.fileno())
        return stop

    def _journal(self, name: str) -> Path:
        return self.folder / f".{name}.ranges"

    def _check_digest(self, name: str) -> None:
        stated = self.weights[name]
        if not stated.sha256 or self.present(name) != [(0, stated.size)]:
            return
        with (self.folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != stated.sha256:
            self._journal(name).unlink(missing_ok=True)
            raise SourceError(
                f"{self.remote.text}: {name}: what arrived has SHA-256 {digest}, the server states "
                f"{stated.sha256}; run the command again"
            )


def open_mirror(remote: Remote) -> Mirror:
    """The mirror of a remote model, made if it is new: configuration, index, headers.

    An adapter is small and fetched whole. Raises SourceError.
    """
    found = find(remote, [CONFIG, INDEX, SINGLE, *ADAPTER])
    if CONFIG not in found and ADAPTER[0] not in found:
        raise _without_config(remote)
    small = {name: stated for name, stated in found.items() if name.endswith(".json")}
    weights = {name: stated for name, stated in found.items() if name not in small}
    if not weights and INDEX not in found:
        raise _without_weights(remote)
    content = {name: b"".join(read_small(remote, name, stated)) for name, stated in small.items()}
    if ADAPTER[0] not in found and INDEX in content:
        weights |= _shards(remote, content[INDEX])
    folder = _place(remote, small | weights)
    mirror = Mirror(remote, folder, weights)
    if not _stands(mirror):
        _make(mirror, content)
    mirror.settle()
    _opened[folder] = mirror
    if ADAPTER[0] in found:
        mirror.fetch_all([*TOKENIZER_FILES, "*.json", "*.txt"], content)
    return mirror


def _without_config(remote: Remote) -> SourceError:
    files = sorted(find(remote, ["*.gguf"]))
    why = "; download one of its GGUF files and name it on this disk" if files else ""
    told = f"{remote.text}: not a model: neither {CONFIG} nor {ADAPTER[0]} is there{why}"
    return SourceError(told, files[:8])


def _without_weights(remote: Remote) -> SourceError:
    pickles = sorted(find(remote, ["pytorch_model.bin", "pytorch_model.bin.index.json"]))
    why = ", only pickles, which can run code when loaded and are not read" if pickles else ""
    return SourceError(f"{remote.text}: neither {SINGLE} nor {INDEX} is there{why}")


def mirror_at(folder: Path) -> Mirror | None:
    """The mirror that this process opened at `folder`; None for any other folder."""
    return _opened.get(folder)


def is_incomplete(folder: Path) -> bool:
    """Whether `folder` is a mirror that has holes where weights belong."""
    marker = folder / MIRROR_MARKER
    if not marker.is_file():
        return False
    try:
        weights = {name: Stated(**some) for name, some in read_json(marker)["weights"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{marker}: broken; remove it if all weights are there") from error
    return not Mirror(None, folder, weights).is_whole()  # type: ignore[arg-type]


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn what the disk says (it is full, the cache was removed) into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot keep what is downloaded: {error}; make room, or set TAIA_CACHE to "
            "another folder, and run the command again"
        ) from error


def _shards(remote: Remote, index: bytes) -> dict[str, Stated]:
    """What is stated of the shards that an index names."""
    try:
        placed = parse_index(io.BytesIO(index).read, len(index), Path(INDEX))
    except CheckpointError as error:
        raise SourceError(f"{remote.text}: {error}") from error
    names = sorted(set(placed.values()))
    found = {n: s for n, s in find(remote, names).items() if n in set(names)}
    gone = [name for name in names if name not in found]
    if gone:
        raise SourceError(f"{remote.text}: named in {INDEX} and not on the server", gone)
    return found


def _place(remote: Remote, stated: Mapping[str, Stated]) -> Path:
    """Where in the cache a mirror is: by its address, then by what its files are."""
    cache = Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser().absolute()
    facts = json.dumps([remote.url, {n: asdict(s) for n, s in sorted(stated.items())}])
    readable = re.sub(r"[^\w.-]+", "-", remote.text)[-80:]
    return cache / "remote" / f"{readable}-{_short(remote.text)}" / _short(facts)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stands(mirror: Mirror) -> bool:
    """Whether the folder is there as it was made, with every weight file at its size."""
    files = {name: mirror.folder / name for name in mirror.weights}
    return (mirror.folder / MIRROR_MARKER).is_file() and all(
        file.is_file() and file.stat().st_size == mirror.weights[name].size
        for name, file in files.items()
    )


def _make(mirror: Mirror, content: Mapping[str, bytes]) -> None:
    """Write the folder in one step: small files, headers in sparse files, the marker."""
    remote = mirror.remote
    with mirror.locked(wait=600), ExitStack() as stack:
        if _stands(mirror):  # another process was first: the same files
            return
        folder = stack.enter_context(staged_folder(mirror.folder, overwrite=True))
        for name, text in content.items():
            (folder / name).write_bytes(text)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda it: _write_header(remote, folder, *it), mirror.weights.items()))
        weights = {name: asdict(stated) for name, stated in mirror.weights.items()}
        marker = {"url": remote.url, "weights": weights}
        atomic_write(folder / MIRROR_MARKER, json.dumps(marker, indent=1))
    for other in mirror.folder.parent.iterdir():  # versions that are no longer on the server
        if other != mirror.folder and (other / MIRROR_MARKER).is_file():
            with suppress(SourceError), Mirror(remote, other, {}).locked():
                shutil.rmtree(other, ignore_errors=True)


def _write_header(remote: Remote, folder: Path, name: str, stated: Stated) -> None:
    """Make a sparse file of a safetensors file's size that holds its header, as it arrives."""
    prefix = b"".join(read(remote, name, stated, 0, min(8, stated.size)))
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(stated.size - 8, MAX_SMALL_BYTES):
        raise SourceError(
            f"{remote.text}: {name}: not a safetensors file, or truncated: a header of "
            f"{length:,} bytes is stated, the file has {stated.size:,}"
        )
    with (folder / name).open("wb") as file:
        file.write(prefix)
        for chunk in read(remote, name, stated, 8, 8 + length):
            file.write(chunk)
        file.truncate(stated.size)


def _header_end(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
