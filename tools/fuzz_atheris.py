"""Fuzz the readers of headers and indexes by coverage, with atheris.

    python tools/fuzz_atheris.py [-max_total_time=300] [CORPUS]

Options and corpus are libFuzzer's. A first byte below 128 makes a header of the rest, another
an index; both are held against a peer as in fuzz_checkpoint.py.
"""

from __future__ import annotations

import sys

import atheris

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


def main() -> None:
    """Fuzz until told to stop."""
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
