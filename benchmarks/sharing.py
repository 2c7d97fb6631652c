"""Bytes that a splice takes on a file system that shares blocks between files.

    python benchmarks/sharing.py [--folder DIR] [--layers 1]

DIR lies on the file system in question, such as XFS or btrfs. A base and a tuned model are made
there, spliced and verified, and what the disk has less afterwards is printed beside the size of
the output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import large
from measuring import TAIA, files_of, run, table


def free(folder: Path) -> int:
    """Bytes free where `folder` lies, with nothing waiting to be written."""
    os.sync()
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def main() -> None:
    """Make, splice, verify, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a folder of the file system; a temporary one")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", help=argparse.SUPPRESS)  # as every benchmark has it
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        models = [str(folder / "base"), str(folder / "tuned")]
        for seed, model in enumerate(models):
            words = [str(Path(large.__file__)), "--make", model, str(options.layers), str(seed)]
            subprocess.run([sys.executable, *words], check=True)
        before = free(folder)
        seconds, _, _ = run([TAIA, "splice", *models, str(folder / "out")])
        taken = before - free(folder)
        run([TAIA, "verify", str(folder / "out")])
        size = sum(file.stat().st_size for file in files_of([folder / "out"]))
    row = {
        "bytes of the output": f"{size:,}",
        "bytes taken": f"{taken:,}",
        "seconds": f"{seconds:.2f}",
    }
    print(table({"taia splice": row}))


if __name__ == "__main__":
    main()
