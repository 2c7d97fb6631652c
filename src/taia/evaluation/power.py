"""What a number of examples can show: the smallest difference, and how many one needs.

80% power, 5% two-sided, from the standard error that was observed: the smallest difference is
the sum of two quantiles of the t distribution in standard errors (Bloom 1995, Evaluation Review
19:547). That a table holds many comparisons is not taken into account: after a correction, more
is needed (`level` takes the corrected 5%).
"""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["LEVEL", "POWER", "examples_needed", "smallest_difference"]

LEVEL, POWER = 0.05, 0.8

MOST = 10_000_000
"""Examples beyond which a number of them is not told."""


def smallest_difference(standard_error: float, units: int, level: float = LEVEL) -> float:
    """The smallest true difference that `units` examples show in 80% of cases; at most 1.

    `standard_error`: of the mean difference over them. One example shows nothing: 1.
    """
    return min(1.0, _errors(units, level) * standard_error) if units > 1 else 1.0


def examples_needed(
    difference: float, standard_error: float, examples: int, level: float = LEVEL
) -> int | None:
    """How many examples show a true `difference` in 80% of cases, by the error of `examples`.

    By the normal approximation. None where no number does, or only one beyond ten million.
    """
    from statsmodels.stats.power import normal_sample_size_one_tail

    if difference == 0:
        return None
    spread = standard_error * math.sqrt(examples)
    needed = normal_sample_size_one_tail(abs(difference), POWER, level / 2, std_null=spread)
    return math.ceil(needed) if needed <= MOST else None


@lru_cache(maxsize=1024)
def _errors(units: int, level: float) -> float:
    """The smallest difference in standard errors."""
    from scipy.stats import t

    return float(t.ppf(1 - level / 2, units - 1) + t.ppf(POWER, units - 1))
