"""The processes of one run: which one this is, and what only the first of them does.

`accelerate launch` (or torchrun) starts the same program several times and tells each copy its
rank by RANK and WORLD_SIZE. Without these variables there is one process, and everything here
is a plain call. Folders are made, checked and published by the first process alone: two that
look whether a folder is free, while one of them makes it, do not agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from taia.errors import TaiaError

__all__ = ["any_of", "is_first", "on_first", "rank", "total_of", "world"]

Value = TypeVar("Value")


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def on_first(do: Callable[[], Value]) -> Value:
    """What `do` gives on the first process, or its error, on every one. All have to call it."""
    if world() == 1:
        return do()
    from torch import distributed

    _device()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = do()
        except (TaiaError, OSError) as error:
            told[1] = error
    distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    value: Value = told[0]
    return value


def any_of(flag: bool) -> bool:
    """Whether `flag` is set on any process. All have to call it."""
    return total_of([float(flag)])[0] > 0


def total_of(values: list[float]) -> list[float]:
    """The sums of `values` (float64) over the processes. All have to call it."""
    if world() == 1:
        return values
    import torch
    from torch import distributed

    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    distributed.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def _device() -> Any:
    """The device of this process, which is joined to the others."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available()).device
