"""Seconds until `taia --help` is printed, beside a bare interpreter and `import torch`.

python benchmarks/startup.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

TAIA = str(Path(sys.executable).with_name("taia"))

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "taia --help": [TAIA, "--help"],
    "python -c 'import taia'": [sys.executable, "-c", "import taia"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def seconds(command: list[str], repeats: int) -> float:
    """The median over fresh processes, the first one not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print("| | seconds |\n|---|---:|")
    for name, command in COMMANDS.items():
        print(f"| `{name}` | {seconds(command, repeats):.2f} |")


if __name__ == "__main__":
    main()
