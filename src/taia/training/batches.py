"""The order of training, fixed before it starts, and how a batch is put together.

The whole order, over all epochs, is one list of example numbers made from the
seed. So a run can stop anywhere and go on with the very same batches, the tokens
seen by any step are known, and no random state is needed to say what came when.

Examples of like length share a batch, which spares padding: each epoch is shuffled,
cut into stretches of some batches, sorted by length within a stretch, cut into
batches, and the batches are shuffled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from taia.training.data import Example
from taia.training.spans import IGNORED

if TYPE_CHECKING:
    import torch

__all__ = ["collate", "longest_row", "micro_batch", "training_order"]

STRETCH = 50
"""Batches in which lengths are sorted; more spares more padding and shuffles less."""

LOGITS = 2**27
"""Logits at once, length x vocabulary x examples: 0.5 GiB in float32, several times over."""


def training_order(lengths: Sequence[int], batch_size: int, total: int, seed: int) -> list[int]:
    """Example numbers in the order of training, `total` of them.

    Every example comes once an epoch; epochs follow each other without a break, so
    a batch may hold the end of one and the start of the next.
    """
    generator = random.Random(seed)  # noqa: S311  (an order, not a secret)
    stream: list[int] = []
    while len(stream) < total:
        epoch = list(range(len(lengths)))
        generator.shuffle(epoch)
        stream += epoch
    del stream[total:]
    # A stretch stays well within an epoch, so that no batch is one example many times.
    stretch = batch_size * max(1, min(STRETCH, len(lengths) // (4 * batch_size)))
    order: list[int] = []
    for start in range(0, total, stretch):
        part = sorted(stream[start : start + stretch], key=lambda number: lengths[number])
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        rest = [batches.pop()] if len(batches[-1]) < batch_size else []
        generator.shuffle(batches)
        order += [number for batch in batches + rest for number in batch]
    return order


def longest_row(examples: Sequence[Example]) -> int:
    """The tokens of the longest example."""
    return max(len(example["input_ids"]) for example in examples)


def micro_batch(batch_size: int, longest: int, vocabulary: int) -> int:
    """How many examples go through the model at once: the largest divisor that fits LOGITS."""
    room = max(1, LOGITS // (longest * vocabulary))
    return max(size for size in range(1, min(batch_size, room) + 1) if batch_size % size == 0)


def collate(examples: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """Tensors (examples, longest), int64, padded on the right; padding has no label."""
    import torch

    longest = longest_row(examples)

    def rows(values: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

    return {
        "input_ids": rows([example["input_ids"] for example in examples], padding),
        "attention_mask": rows([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": rows([example["labels"] for example in examples], IGNORED),
    }
