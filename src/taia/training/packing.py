"""Several examples in one row, none of which sees another: less padding for the same batch.

The examples of a part of a batch are laid into rows one after another, and the positions start
again with each. Given positions and no attention mask, transformers finds the borders: eager,
sdpa and flex attention get a mask that keeps to one example, FlashAttention gets the lengths.
What ends a row stands as an example of its own without labels. The first token of an example has
no label, or the last one of its neighbour would have to predict it.

Which examples make up a step, and so its loss, is not touched. How many rows there are depends
on what a row costs: attention under a mask works out all pairs of a row, so that one long row
can be dearer than the padding of several; a row of L tokens of a model of width d is taken to
cost L * (1 + L / 6d), the sums of products of a layer with a network of four times its width.
FlashAttention leaves the pairs of different examples out, so there all stand in one row.

Limits: models that keep a state along the row (Mamba, linear attention) or number positions by
themselves (ALiBi) cannot be packed; `require_packing` finds out by running the model.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError
from taia.slots import parameters_of, unwrapped
from taia.training.data import Example
from taia.training.penalties import without_adapter
from taia.training.spans import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["IS_TOKEN", "Packing", "collate_packed", "packing_for", "require_packing"]

IS_TOKEN = "is_token"  # noqa: S105  (the name of a tensor)
"""In a packed batch: which places are no filling. It is not for the model, but for routers."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows are made: for a model of `width`, or all examples in one row."""

    width: int
    one_row: bool = False

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """The numbers of the examples in each row, of `lengths` tokens."""
        if self.one_row:
            return [list(range(len(lengths)))]
        whole, longest = sum(lengths), max(lengths)
        best = _spread(lengths, len(lengths))
        least = self._cost(len(lengths), longest)
        for count in range(len(lengths) - 1, 0, -1):
            if self._cost(count, max(longest, whole / count)) >= least:
                continue  # dearer even without any filling
            rows = _spread(lengths, count)
            cost = self._cost(count, _longest(lengths, rows))
            if cost < least:
                best, least = rows, cost
        return best

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that go through the model for examples of `lengths`, filling counted."""
        rows = self.rows(lengths)
        return len(rows) * _longest(lengths, rows)

    def _cost(self, rows: int, longest: float) -> float:
        return rows * longest * (1 + longest / (6 * self.width))


def packing_for(config: PretrainedConfig) -> Packing:
    """The packing for a model with this config, by its width and its attention."""
    attention = str(getattr(config, "_attn_implementation", None))
    return Packing(config.get_text_config().hidden_size, one_row="flash" in attention)


def collate_packed(
    examples: Sequence[Example], padding: int, packing: Packing
) -> dict[str, torch.Tensor]:
    """Tensors (rows, longest): input_ids, position_ids and labels, int64, and IS_TOKEN, bool."""
    import torch

    lengths = [len(example["input_ids"]) for example in examples]
    rows = packing.rows(lengths)
    longest = _longest(lengths, rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
    real = []
    for row in rows:
        held = [examples[number] for number in row]
        missing = longest - sum(lengths[number] for number in row)
        ids = [token for example in held for token in example["input_ids"]]
        labels = [label for one in held for label in (IGNORED, *one["labels"][1:])]
        places = [at for number in row for at in range(lengths[number])]
        batch["input_ids"].append(ids + [padding] * missing)
        batch["labels"].append(labels + [IGNORED] * missing)
        batch["position_ids"].append(places + list(range(missing)))
        real.append([True] * len(ids) + [False] * missing)
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    return tensors | {IS_TOKEN: torch.tensor(real)}


def require_packing(model: PreTrainedModel) -> None:
    """Raise RecipeError where an example of this model would see its neighbour in a row.

    Two examples in one row go through the model, and the second is differentiated by the
    embeddings of both: where a mask lies between them, the first gets zeros, bit for bit.
    """
    import torch

    name = model.config.model_type
    if "position_ids" not in parameters_of(unwrapped(model)):
        raise RecipeError(f"packing: {name} numbers positions by itself. {_WITHOUT}")
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    ids = torch.arange(1, 2 * _PROBE + 1, device=model.device).unsqueeze(0)
    places = torch.arange(_PROBE, device=model.device).repeat(2).unsqueeze(0)
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with without_adapter(model):
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, _PROBE:].float().square().sum(), seen)
    if gradient[:, :_PROBE].any():
        raise RecipeError(
            f"packing: in a row, {name} with {model.config._attn_implementation} attention lets an "
            f"example see the one before it. {_WITHOUT}"
        )


_PROBE = 4
_WITHOUT = "Train it without packing: batches of like lengths have little padding too"


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The examples over `count` rows, the longest first, each into the shortest row so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, at) for at in range(count)]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        tokens, at = filled[0]
        rows[at].append(number)
        heapq.heapreplace(filled, (tokens + lengths[number], at))
    return rows


def _longest(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[number] for number in row) for row in rows)
