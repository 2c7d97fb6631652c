"""What the benchmarks share: a command timed with its peak memory, the state of the page cache."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

TAIA = str(Path(sys.executable).with_name("taia"))


def run(command: list[str], limit: float | None = None) -> tuple[float, float, str]:
    """Seconds, peak memory in MiB, and what was printed, of one command as a process of its own.

    One that is still running after `limit` seconds is killed, and has taken infinitely many.
    Exits with what the command said if it fails. Python may keep what it compiled, as it does
    for any user, whatever the variables of this process say.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    words = command if limit is None else ["timeout", "--signal=KILL", str(limit), *command]
    start = time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status and limit is not None and seconds >= limit:
        return math.inf, usage.ru_maxrss / 1024, said
    if status:
        raise SystemExit(f"failed: {' '.join(command)}\n{said[-2000:]}")
    return seconds, usage.ru_maxrss / 1024, said


def warm(folders: Iterable[Path]) -> None:
    """Have the files of these folders in the page cache, and nothing waiting to be written."""
    os.sync()
    for file in files_of(folders):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def cool(folders: Iterable[Path]) -> None:
    """Have none of the files of these folders in the page cache."""
    os.sync()
    for file in files_of(folders):
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(folders: Iterable[Path]) -> list[Path]:
    """Every file of these folders."""
    return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A Markdown table, one row a name."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(row.values()) + " |" for name, row in rows.items()]
    return "\n".join(lines)
