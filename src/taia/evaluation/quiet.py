"""lm-eval without its noise: neither its log nor its progress bars.

Limits: what it says of prompts that it cuts to the model's length still comes through.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

__all__ = ["quiet_lm_eval"]


CUT = ("maximum length", "Left truncation applied")
"""What lm-eval says of a prompt that it cuts: before choices, and before a text."""


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Only errors and cut prompts are told inside the block; all as before after it."""
    import lm_eval.api.task as lm_eval_task

    logger = logging.getLogger("lm_eval")
    cut = logging.getLogger("lm_eval.models.huggingface")
    levels, bar = (logger.level, cut.level), lm_eval_task.tqdm

    def only_cuts(record: logging.LogRecord) -> bool:
        told = record.getMessage()
        return record.levelno > logging.WARNING or any(mark in told for mark in CUT)

    logger.setLevel(logging.ERROR)
    cut.setLevel(logging.WARNING)
    cut.addFilter(only_cuts)
    lm_eval_task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = bar
        cut.removeFilter(only_cuts)
        logger.setLevel(levels[0])
        cut.setLevel(levels[1])
