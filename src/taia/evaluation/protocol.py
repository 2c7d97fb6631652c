"""How a question is put to a model and its answer read; every table states it.

    chat    lm-eval's prompt as a user turn of the model's chat template
    plain   lm-eval's prompt as it is

Few-shot examples come from a split of their own, never from the examples that are scored.
"""

from __future__ import annotations

__all__ = ["MOST_SHOTS", "PROTOCOLS", "check_protocol"]

PROTOCOLS = ("chat", "plain")
"""The names that `--protocol` takes."""

MOST_SHOTS = 4
"""The paper's most; every task that has few-shot examples has at least as many."""


def check_protocol(protocol: str, shots: int) -> list[str]:
    """What is wrong with a protocol and a number of few-shot examples; empty when nothing is."""
    faults = []
    if protocol not in PROTOCOLS:
        faults.append(f"protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if not 0 <= shots <= MOST_SHOTS:
        faults.append(f"shots {shots}: from 0 to {MOST_SHOTS}")
    return faults
