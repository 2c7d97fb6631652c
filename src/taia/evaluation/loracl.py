"""LoRACL: the model whose loss on the prompt is lower answers, base or tuned (arXiv 2405.20192).

Per prompt, the mean negative log-likelihood of its tokens (all but the first, chat template
included) is taken under both; a prompt that both find equally likely goes to the base. With an
adapter both are one set of weights, switched for a whole batch of prompts at a time.

Limits: an adapter only; two checkpoints would have to be in memory at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

__all__ = ["LORACL", "choosing", "prompt_losses"]

LORACL = "loracl"
"""The variant's name, which also stands where others have their selection."""

LOGITS = 2**27
"""Logits at once, prompts x length x vocabulary: 0.25 GiB in bfloat16."""


def prompt_losses(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: torch.device
) -> list[float]:
    """The mean negative log-likelihood (nats) of the tokens of each prompt after its first.

    Float32 over logits in the model's dtype. A prompt of one token has a loss of 0.
    """
    import torch

    from taia.evaluation.engine import padded

    losses = [0.0] * len(prompts)
    vocabulary = model.config.get_text_config().vocab_size
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    while order:
        rows = max(1, LOGITS // (len(prompts[order[-1]]) * vocabulary))
        batch, order = order[-rows:], order[:-rows]
        ids, mask = padded([prompts[number] for number in batch], device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, number in enumerate(batch):  # one by one: all in float32 are large
                length = len(prompts[number])
                if length > 1:
                    losses[number] = float(
                        torch.nn.functional.cross_entropy(
                            logits[row, : length - 1].float(), ids[row, 1:length]
                        )
                    )
    return losses


def choosing(using: Callable[[str], AbstractContextManager[Any]], usual: type[HFLM]) -> type[HFLM]:
    """A model wrapper like `usual` that switches by LoRACL; `using` is that of `taia.attach`."""

    class Choosing(usual):  # type: ignore[misc]
        def answer(
            self, requests: Sequence[Any], known: AbstractSet[int]
        ) -> Generator[dict[int, Any]]:
            tuned = self.tuned([prompt for _, prompt, _ in requests])
            for keep, wanted in (("none", False), ("all", True)):
                chosen = [index for index, one in enumerate(tuned) if one is wanted]
                asked = [requests[index] for index in chosen]
                there = {place for place, index in enumerate(chosen) if index in known}
                with using(keep):
                    for part in super().answer(asked, there):
                        yield {chosen[place]: one for place, one in part.items()}

        def write(
            self, requests: Sequence[Any], told: Callable[[int, str], None] | None = None
        ) -> list[str]:
            tuned = self.tuned([self.tok_encode(one.args[0]) for one in requests])
            texts: dict[int, str] = {}
            for keep, wanted in (("none", False), ("all", True)):
                chosen = [index for index, one in enumerate(tuned) if one is wanted]
                asked = [requests[index] for index in chosen]
                tell = functools.partial(_elsewhere, told, chosen) if told else None
                with using(keep):
                    texts.update(zip(chosen, super().write(asked, tell), strict=True))
            return [texts[index] for index in range(len(requests))]

        def tuned(self, asked: Sequence[Sequence[int]]) -> list[bool]:
            """Whether the tuned model answers each prompt, given as token ids."""
            prompts = list(dict.fromkeys(map(tuple, asked)))
            read = [prompt[-self.max_length :] for prompt in prompts]
            losses = []
            for keep in ("none", "all"):
                with using(keep):
                    losses.append(prompt_losses(self.model, read, self.device))
            better = {
                prompt: after < before
                for prompt, before, after in zip(prompts, *losses, strict=True)
            }
            return [better[tuple(prompt)] for prompt in asked]

    return Choosing


def _elsewhere(
    told: Callable[[int, str], None], places: Sequence[int], place: int, text: str
) -> None:
    """`told` for a part of the requests, which stand at `places` among all."""
    told(places[place], text)
