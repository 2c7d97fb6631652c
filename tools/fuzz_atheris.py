"""Fuzz the readers of headers and indexes by coverage, with atheris.

    python tools/fuzz_atheris.py [-max_total_time=300] [CORPUS]

Options and corpus are libFuzzer's; an empty corpus is filled with 500 cases of fuzz_cases.py.
A first byte below 128 makes a header of the rest, another
an index; both are held against a peer as in fuzz_checkpoint.py.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris
from fuzz_cases import header_case, index_case

with atheris.instrument_imports(include=["taia"]):
    from fuzz_checkpoint import check_header, check_index


def one(data: bytes) -> None:
    """One case. Whatever it raises, atheris reports with the bytes."""
    if data[:1] < b"\x80":
        text = data[1:]
        check_header(len(text).to_bytes(8, "little") + text)
        check_header(text)
    else:
        check_index(data[1:])


def fill(corpus: Path) -> None:
    """Cases to begin with: coverage alone never finds a whole header."""
    for number in range(500):
        chance = random.Random(number)
        case = b"\x80" + index_case(chance) if number % 3 == 2 else b"\0" + header_case(chance)[8:]
        (corpus / f"seed{number}").write_bytes(case)


def main() -> None:
    """Fuzz until told to stop."""
    for word in sys.argv[1:]:
        if not word.startswith("-") and Path(word).is_dir() and not any(Path(word).iterdir()):
            fill(Path(word))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
