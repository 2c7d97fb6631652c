"""Random projection beside the whole decomposition: seconds, and what is lost beside the best.

    python benchmarks/factorise.py [--size 1024] [--repeats 3]

Two square matrices: one of noise, whose singular values hardly fall (the worst case), and one
whose k-th singular value is k**-0.7. `lost` is the Frobenius norm of what the factors miss,
divided by that of the nearest matrix of the rank (Eckart and Young). Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from taia.factorise import factorise

RANKS = (16, 64, 256)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least of several times: the one that others disturbed least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def matrices(size: int) -> dict[str, np.ndarray]:
    """The two matrices by name."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((size, size)).astype(np.float32)
    left, _ = np.linalg.qr(noise)
    right, _ = np.linalg.qr(random.standard_normal((size, size)).astype(np.float32))
    return {
        "noise": noise,
        "k**-0.7": (left * np.arange(1, size + 1) ** -0.7 @ right).astype(np.float32),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| matrix | rank | whole decomposition, s | projection, s | lost, beside the best |")
    print("|---|---:|---:|---:|---:|")
    for name, matrix in matrices(options.size).items():
        whole = seconds(lambda m=matrix: np.linalg.svd(m, full_matrices=False), options.repeats)
        values = np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
        for rank in RANKS:
            spent = seconds(lambda m=matrix, r=rank: factorise(m, r), options.repeats)
            a, b = factorise(matrix, rank)
            lost = np.linalg.norm(matrix - b @ a) / np.linalg.norm(values[rank:])
            print(f"| {name} | {rank} | {whole:.2f} | {spent:.2f} | {lost:.4f} |")


if __name__ == "__main__":
    main()
