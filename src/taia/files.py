"""Files that appear whole or not at all.

Everything is written beside its destination, flushed to the disk, and renamed.
Whatever interrupts (an error, a full disk, a signal turned into an exception)
removes the half-written part and leaves the destination as it was. What a killed
process or a power cut left behind is removed, or put back in its place, by the next one
that writes to the same destination.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from taia.errors import CheckpointError, OutputError
from taia.stopping import refuse_stopped
from taia.untrusted import open_regular
from taia.workers import MOST, on_all_cores

__all__ = [
    "atomic_write",
    "check_room",
    "read_json",
    "refuse_existing",
    "refuse_name",
    "refuse_overlap",
    "staged_files",
    "staged_folder",
]

MAX_JSON_BYTES = 16 * 1024 * 1024
"""The largest configuration that is read; known ones have less than 2 MB."""

MAX_JSON_VALUES = 500_000
"""The most values in one."""

TOKEN_BYTES = 4
KEPT = "old"
"""The name, inside its hidden folder, of an output that is being replaced."""


def atomic_write(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` in one step; readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{_token()}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well.

    An existing empty folder is replaced; a non-empty one only with `overwrite`, and
    then it stays untouched until the new one is complete. What an earlier process left
    half-written beside `out` is removed first. Raises OutputError.
    """
    out = out.absolute()
    refuse_name(out)
    _clear_litter(out)
    refuse_existing(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, owned = _own_folder(out, "partial")
    except OSError as error:
        raise OutputError(f"{out}: cannot be created: {error.strerror}") from error
    try:
        yield partial
        _sync_tree(partial)
        refuse_stopped()
        refuse_existing(out, overwrite=overwrite)  # another process may have been faster
        _swap(partial, out)
    except OSError as error:
        _remove(partial)
        raise OutputError(f"{out}: writing failed, nothing is left of it: {error}") from error
    except BaseException:
        _remove(partial)
        raise
    finally:
        _disown(owned)


@contextmanager
def staged_files(*outs: Path, overwrite: bool = False) -> Iterator[list[Path]]:
    """Yield a path for each of some files of one folder; they appear when the block ends well.

    They appear one right after the other, the last of `outs`, which is the output itself, last.
    It is replaced only with `overwrite`. Raises OutputError.
    """
    outs = tuple(out.absolute() for out in outs)
    out = outs[-1]
    refuse_name(out)
    _clear_litter(out)
    if out.is_dir() or (out.is_symlink() and not out.exists()):
        raise OutputError(f"{out}: is a folder, or a link that leads nowhere; name a file")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists; name another file or use --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial, owned = _own_folder(out, "partial")
    except OSError as error:
        raise OutputError(f"{out}: cannot be created: {error.strerror}") from error
    try:
        yield [partial / file.name for file in outs]
        _sync_tree(partial)
        refuse_stopped()
        for file in outs:
            (partial / file.name).replace(file)
        with suppress(OSError):
            _sync(out.parent)
    except OSError as error:
        raise OutputError(f"{out}: writing failed, nothing is left of it: {error}") from error
    finally:
        _remove(partial)
        _disown(owned)


def refuse_existing(out: Path, *, overwrite: bool = False) -> None:
    """Raise OutputError if `out` is a file, or a non-empty folder without `overwrite`.

    A folder that holds the current one, or the user's home, is never replaced.
    """
    refuse_name(out)
    resolved = out.resolve()
    for kept in (Path.cwd(), Path.home()):
        if resolved == kept or resolved in kept.parents:
            raise OutputError(f"{out}: is, or holds, the folder {kept}; name a new folder")
    if out.is_symlink() and not out.exists():
        raise OutputError(f"{out}: is a link that leads nowhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder")
    if os.path.ismount(out):
        raise OutputError(f"{out}: is a mounted file system, so it cannot be put in place as a "
                          "whole; name a folder inside it")  # fmt: skip
    if any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out}: exists and is not empty; name another folder or use --overwrite")


def refuse_name(out: Path) -> None:
    """Raise OutputError for what no file can be called, and what no receipt can state."""
    try:
        str(out.absolute()).encode()
        out.exists()
    except (OSError, ValueError) as error:
        raise OutputError(f"{str(out)[:200]}: not a name for a file or folder: {error}") from error


def refuse_gguf_name(out: Path) -> None:
    """Raise OutputError for a folder that is to be called as a GGUF file is."""
    if out.suffix == ".gguf":
        raise OutputError(f"{out}: a GGUF file comes of two GGUF files; name a folder")


def refuse_overlap(out: Path, *sources: Path) -> None:
    """Raise OutputError if `out` is one of the sources, or holds one: it would replace it."""
    resolved = out.resolve()
    for source in sources:
        other = source.resolve()
        if resolved == other or resolved in other.parents:
            raise OutputError(
                f"{out}: is one of the two models, or holds one ({source}); write somewhere else"
            )


def check_room(out: Path, needed: int) -> None:
    """Raise OutputError if the file system of `out` has less than `needed` bytes free.

    What is at `out` does not matter: a new one is written beside it.
    """
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = _free(folder)
    if free < needed:
        raise OutputError(
            f"{out}: {needed:,} bytes are to be written and {free:,} are free there; "
            "make room or write elsewhere"
        )


def read_json(path: Path) -> Any:
    """A JSON file of a model. Raises CheckpointError with the file's name.

    What it may grow to in memory is bounded beforehand: every value costs a comma, a colon
    or a bracket.
    """
    with open_regular(path) as file:
        try:
            raw = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_JSON_BYTES or sum(map(raw.count, b",:[{")) > MAX_JSON_VALUES:
        raise CheckpointError(
            f"{path}: larger than {MAX_JSON_BYTES:,} bytes or {MAX_JSON_VALUES:,} values"
        )
    try:
        value = json.loads(raw.decode())
        if b"\\u" in raw:  # half a surrogate pair can be read, and never written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    return value


def _swap(partial: Path, out: Path) -> None:
    """Put `partial` at `out`, keeping what was there until the new one stands."""
    if not out.exists():
        partial.replace(out)
    else:
        retired, owned = _own_folder(out, "old")
        try:
            out.replace(retired / KEPT)
            partial.replace(out)
        except BaseException:
            if not out.exists():
                (retired / KEPT).replace(out)
            retired.rmdir()
            _disown(owned)
            raise
        (retired / KEPT).replace(retired / "removed")  # nobody puts back what is half removed
        _remove(retired)
        _disown(owned)
    with suppress(OSError):  # it stands; only some file systems let a folder be flushed
        _sync(out.parent)


def _own_folder(out: Path, suffix: str) -> tuple[Path, int | None]:
    """A new folder `.NAME.TOKEN.SUFFIX` beside `out`, and the lock that says it is in use.

    The system gives the lock back when the process ends, however it ends.
    """
    while True:
        folder = out.with_name(f".{out.name}.{_token()}.{suffix}")
        folder.mkdir()
        owned = _lock(folder, wait=True)
        if folder.exists():  # else another process took it for litter before it was locked
            return folder, owned
        _disown(owned)


def _clear_litter(out: Path) -> None:
    """Remove what dead processes left beside `out`; put `out` back if one was replacing it."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{{2 * TOKEN_BYTES}}}\.(partial|old)")
    try:
        litter = [folder for folder in out.parent.iterdir() if name.fullmatch(folder.name)]
    except OSError:  # the parent is not there yet
        return
    for folder in litter:
        owned = _lock(folder, wait=False)
        if owned is None:
            continue
        try:
            if (folder / KEPT).exists() and folder.suffix == ".old" and not out.exists():
                (folder / KEPT).replace(out)
            _remove(folder)
        except OSError as error:
            raise OutputError(
                f"{folder}: an interrupted run left it, and it cannot be put back as {out}: "
                f"{error.strerror}"
            ) from error
        finally:
            _disown(owned)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder; None if a live process holds it or the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _disown(descriptor)
        return None
    return descriptor


def _disown(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    import shutil  # slow to load, and rarely needed

    shutil.rmtree(folder, ignore_errors=True)


def _free(folder: Path) -> int:
    """Bytes that may still be written to the file system of `folder`."""
    if hasattr(os, "statvfs"):
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize
    import shutil

    return shutil.disk_usage(folder).free


def _sync_tree(folder: Path) -> None:
    """Flush every file; all at once, so that the file system's journal takes them together."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    on_all_cores([*files, folder], _sync, threads=min(MOST, 1 + len(files)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _token() -> str:
    """A name that no other process chooses."""
    return os.urandom(TOKEN_BYTES).hex()
