"""Whether stored numbers are those of a sum of products, in whatever order it was summed.

The product of two factors is a sum of `rank` products, and another BLAS, or another number of
threads, sums them in another order: the last bit of a merged weight may differ from machine to
machine. A merge is therefore written with its digest, which tells whether its bytes were
altered, and compared with what is computed again up to such a difference.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from taia.arrays import DTYPES, widen
from taia.receipt import Entry

__all__ = ["nearly_equal"]

SUMS = 1e-5
"""Of the largest number of a chunk: far above the rounding of a sum of float32 products of any
rank in use, far below a delta that is worth to be kept."""


def nearly_equal(folder: Path, entry: Entry, dtype: str, chunks: Iterable[bytes]) -> bool:
    """Whether the numbers of an entry are those of `chunks`, but for the order of summation."""
    import ml_dtypes

    number = DTYPES[dtype]
    step = float(ml_dtypes.finfo(number).eps)  # one unit in the last place, of a number near 1
    left = entry.stop - entry.start
    with (folder / entry.file).open("rb") as file:
        file.seek(entry.start)
        for chunk in chunks:
            stored = file.read(len(chunk))
            if len(stored) != len(chunk):
                return False
            one, two = (widen(np.frombuffer(raw, number)) for raw in (stored, chunk))
            allowed = step * np.abs(two) + SUMS * float(np.abs(two).max(initial=0))
            if not bool((np.abs(one - two) <= allowed).all()):
                return False
            left -= len(chunk)
    return left == 0
