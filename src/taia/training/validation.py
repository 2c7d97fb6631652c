"""The loss on chats that are not trained on, between steps.

The mean negative log-likelihood of the assistant's tokens (nats), without penalties or dropout.
It is summed over tokens, so it does not depend on how the examples are cut into batches or shared
out over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from taia.training.batches import collate
from taia.training.data import Example
from taia.training.ranks import rank, total_of, world
from taia.training.spans import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

__all__ = ["LOSS", "make_validating", "validation_loss"]

LOSS = "eval_loss"
"""What the Trainer calls the number by which it picks the best checkpoint."""


def validation_loss(
    logits: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    examples: Sequence[Example],
    *,
    batch_size: int,
    padding: int,
    device: torch.device,
) -> float:
    """The loss of a model given by its `logits`: a batch -> (examples, length, vocabulary)."""
    import torch

    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    cuts = range(0, len(ordered), batch_size)
    batches = [ordered[at : at + batch_size] for at in cuts]
    total = tokens = 0.0
    with torch.no_grad():
        # Processes that share out weights have to run equally often, so some run without counting.
        for start in range(0, len(batches), world()):
            number = start + rank()
            batch = collate(batches[number % len(batches)], padding)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            scores = logits(batch)[:, :-1].float().transpose(1, 2)
            if number < len(batches):
                total += float(
                    torch.nn.functional.cross_entropy(
                        scores, labels, ignore_index=IGNORED, reduction="sum"
                    )
                )
                tokens += float((labels != IGNORED).sum())
    total, tokens = total_of([total, tokens])
    return total / tokens


def make_validating(
    parent: type[Trainer], examples: Sequence[Example], padding: int
) -> type[Trainer]:
    """A Trainer like `parent` that evaluates by `validation_loss` on `examples`."""

    class Validating(parent):  # type: ignore[misc]
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            shared = self.is_fsdp_enabled or self.is_deepspeed_enabled
            model = self.model_wrapped if shared else self.accelerator.unwrap_model(self.model)
            autocast: Callable[[], AbstractContextManager[Any]] = self.compute_loss_context_manager

            def logits(batch: dict[str, Any]) -> Any:
                self.objective.expect(batch["attention_mask"])
                with autocast():
                    return model(**batch, use_cache=False).logits

            model.eval()
            try:
                loss = validation_loss(
                    logits,
                    examples,
                    batch_size=self.args.per_device_train_batch_size,
                    padding=padding,
                    device=self.args.device,
                )
            finally:
                model.train()
            metrics = {LOSS: loss}
            self.log(metrics)
            self.control: Any = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    return Validating
