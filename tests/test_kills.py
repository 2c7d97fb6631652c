"""A splice that is killed, or whose disk is full, leaves what was there, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "gguf"), [(20, False), (8, True)], ids=["folder", "gguf"])
def test_kills(tmp_path, kills, gguf):
    from kill_splices import kill_splices

    found, wrong = kill_splices(tmp_path, kills=kills, seed=1, megabytes=16, gguf=gguf)
    assert wrong == 0, found


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of two megabytes."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("aware", [True, False], ids=["refused beforehand", "while writing"])
def test_a_full_disk(small_disk, tmp_path, aware):
    """Exit code 2, one message, nothing left; also when the disk fills up while it is written."""
    from kill_splices import make_pair

    make_pair(tmp_path, 8)
    line = [sys.executable, "-c"]
    unaware = "" if aware else "import taia.files; taia.files._free = lambda _: 1 << 60\n"
    line += [f"{unaware}import sys; from taia.cli import main; main()"]
    out = small_disk / "out"
    done = subprocess.run(
        [*line, "splice", str(tmp_path / "base"), str(tmp_path / "tuned"), str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert ("are free" if aware else "nothing is left") in done.stderr
    assert list(small_disk.iterdir()) == []
