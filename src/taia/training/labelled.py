"""Logits only where the loss is taken, and inputs of LoRA in the dtype in which it computes.

The loss counts the assistant's tokens. The head (width x vocabulary) and the softmax over all
words are most of what a small model costs, so they are computed at the places of a batch where
some example has a label: on chats with long prompts a fraction of all. The loss is the same.

PEFT widens the input of every LoRA to the dtype of its factors, float32; autocast narrows it
again for the product. Without the detour the product is the same and two copies are spared;
dropout then scales in the narrow dtype.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from taia.slots import unwrapped
from taia.training.spans import IGNORED

if TYPE_CHECKING:
    from torch import nn

__all__ = ["at_labels", "can_choose_places", "keep_input_dtype"]


def can_choose_places(model: nn.Module) -> bool:
    """Whether the model computes logits at chosen places and takes labels that are shifted."""
    inner = unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    takes_more = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return "logits_to_keep" in parameters and takes_more and _usual_loss(inner)


def at_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of a model with `labels` (examples, length), for the places that are needed.

    The result has `logits_to_keep` (places,) int64, ascending: where any example has to predict
    a label; `shift_labels` (examples, places): those labels. A batch without labels keeps one
    place, so that there are logits.
    """
    import torch

    following = inputs["labels"][:, 1:]
    places = (following != IGNORED).any(dim=0).nonzero().flatten()
    if not len(places):
        places = torch.zeros(1, dtype=torch.int64, device=following.device)
    chosen = following[:, places]
    return inputs | {"logits_to_keep": places, "shift_labels": chosen, "labels": chosen}


def keep_input_dtype(model: nn.Module) -> None:
    """Leave inputs of LoRA as they are; for a model that runs under autocast alone."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def _usual_loss(model: nn.Module) -> bool:
    """Whether the model's loss is the usual one, which takes shifted labels."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return getattr(model, "loss_function", None) is ForCausalLMLoss
