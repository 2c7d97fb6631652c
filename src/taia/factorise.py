"""The nearest matrix of a low rank, as two factors: a truncated singular value decomposition.

Exact by LAPACK where the rank is a good part of the matrix, else by random projection with
power iterations (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), which
reads the matrix ten times and is many times faster: docs/adapters.md has the figures. The
random numbers have a fixed seed, so that the same matrix gives the same factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = ["factorise"]

OVERSAMPLED = 16
"""Directions beyond the rank: the more, the nearer to the exact result."""
ITERATIONS = 4
"""Powers of the matrix: they part the singular values that a delta has close together."""
EXACT = 4
"""A rank above one part in so many of the matrix is taken from the whole decomposition."""


def factorise(matrix: Array, rank: int) -> tuple[Array, Array]:
    """A (rank x columns) and B (rows x rank), with B @ A the nearest matrix of that rank.

    `matrix` is rows x columns, float32 or float64. Where it has fewer rows or columns than
    `rank`, what is missing is zeros. Both factors carry the square roots of the singular
    values, so that neither is much larger than the other.
    """
    rows, columns = matrix.shape
    wanted = min(rank, rows, columns)
    if EXACT * (wanted + OVERSAMPLED) >= min(rows, columns):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = _projected(matrix, wanted + OVERSAMPLED)
    roots = np.sqrt(values[:wanted])
    a = np.zeros((rank, columns), matrix.dtype)
    b = np.zeros((rows, rank), matrix.dtype)
    a[:wanted] = roots[:, None] * right[:wanted]
    b[:, :wanted] = left[:, :wanted] * roots
    return a, b


def _projected(matrix: Array, width: int) -> tuple[Array, Array, Array]:
    """The leading singular triples, found within the space that `width` random vectors span."""
    random = np.random.default_rng(0)
    start = random.standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(ITERATIONS):
        other, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ other)
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
