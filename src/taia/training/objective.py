"""The loss of training: the task's, and what is added to it, each logged by itself.

transformers' Trainer, with its loss taken as the task's. Added are the penalties that hold the
fine-tune near its base (`taia.training.penalties`) and the balance loss of routed experts, each
with its strength. What depends on the parameters alone is computed once a step. The task's loss
and KL are sums over tokens, so that a step has the same gradients however its batch is cut into
parts and over processes. The balance loss is the mean over the parts, each balanced by itself.

log.jsonl then has, for each step, task_loss and the plain value of every addition (loss is all
of it together), and of routed experts router_entropy (nats), router_load_0, router_load_1, ...
(the share of tokens of each expert, averaged over the expert layers) and router_load_max (the
share of the busiest expert, averaged likewise: 1 where every router always takes the same one).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError
from taia.routing import Routing, balance_loss
from taia.training.labelled import at_labels, can_choose_places
from taia.training.packing import IS_TOKEN
from taia.training.penalties import deltas, ewc, kl, l2, without_adapter
from taia.training.spans import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

__all__ = ["Additions", "Objective", "Part", "make_trainer_class"]


@dataclass(frozen=True, slots=True)
class Additions:
    """What is added to the loss: strengths by name, and what the terms need."""

    penalty: Mapping[str, float] = field(default_factory=dict)
    balance: float = 0.0
    copy: Mapping[str, Tensor] | None = None
    fisher: Callable[[str], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a step's batch, and how the Trainer counts it.

    `items`: the labelled tokens of the whole step, over all processes, if the task's loss is a
    sum divided by them; None if it is the part's own mean, which the Trainer then divides by
    the number of `parts`. `processes`: what the Trainer multiplies a share of `items` with,
    as gradients are averaged over processes.
    """

    step: int
    parts: int
    items: Any
    processes: int

    @property
    def divisor(self) -> int:
        """What the Trainer still divides this part's loss by."""
        return self.parts if self.items is None else 1


class Objective:
    """The loss of a step put together, and its parts kept for the log."""

    def __init__(self, model: Any, added: Additions) -> None:
        self.model, self.added = model, added
        self.layers = _expert_layers(model)
        self.values: dict[str, Tensor] = {}
        self.last_step = -1

    def expect(self, mask: Tensor | None) -> None:
        """Tell the routers which tokens (examples, length) of the next batch are no padding."""
        for layer in self.layers:
            layer.mask = mask

    def total(self, loss: Tensor, outputs: Any, inputs: Mapping[str, Any], part: Part) -> Tensor:
        """The task's loss of one part of a batch with what is added to it."""
        if not self.model.training or not (self.added.penalty or self.layers):
            return loss  # an evaluation in between is of the task alone
        self._note("task_loss", loss / part.divisor)
        if "kl" in self.added.penalty:
            value = self._kl(outputs, inputs, part)
            loss = loss + self.added.penalty["kl"] * value
            self._note("kl", value / part.divisor)
        if part.step != self.last_step:  # once a step is enough for what needs no batch
            self.last_step = part.step
            for name, value in _of_parameters(self.model, self.added).items():
                loss = loss + self.added.penalty[name] * value * part.divisor
                self._note(name, value)
        seen = [layer.seen for layer in self.layers if layer.seen is not None]
        if seen:
            statistics = _statistics(seen)
            if self.added.balance:
                _refuse_lost_gradients(statistics["balance"])
                share = part.divisor / part.parts
                loss = loss + self.added.balance * statistics["balance"] * share
            for name, value in statistics.items():
                self._note(name, value / part.parts)
        return loss

    def values_of_step(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The plain values since the last call; `mean` averages a tensor over the processes."""
        import torch

        if not self.values:
            return {}
        every = mean(torch.stack([value.reshape(()) for value in self.values.values()]))
        told = dict(zip(self.values, every.tolist(), strict=True))
        self.values = {}
        return told

    def _kl(self, outputs: Any, inputs: Mapping[str, Any], part: Part) -> Tensor:
        import torch

        reference = {key: value for key, value in inputs.items() if "labels" not in key}
        with torch.no_grad(), without_adapter(self.model):
            base = self.model(**reference).logits
        tuned, following = outputs.logits, inputs.get("shift_labels")
        if following is None:  # logits are there for all places, the last of which predicts nothing
            tuned, base, following = tuned[:, :-1], base[:, :-1], inputs["labels"][:, 1:]
        value = kl(tuned, base, following)
        if part.items is None:
            return value / (following != IGNORED).sum()
        return value / part.items * part.processes

    def _note(self, name: str, value: Tensor) -> None:
        self.values[name] = self.values.get(name, 0.0) + value.detach().float()


def make_trainer_class(added: Additions) -> type[Trainer]:
    """A Trainer whose loss has `added` on top."""
    from transformers import Trainer

    class WithAdditions(Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            inner = self.accelerator.unwrap_model(self.model)
            self.objective = Objective(inner, added)
            # The kernels of liger-kernel fuse head and loss, and so never make these logits.
            self.chooses = can_choose_places(inner) and not self.args.use_liger_kernel

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            self.objective.expect(inputs.pop(IS_TOKEN, inputs.get("attention_mask")))
            if self.chooses and model.training:
                inputs = at_labels(inputs)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            shared = self.args.average_tokens_across_devices
            part = Part(
                step=self.state.global_step,
                parts=self.current_gradient_accumulation_steps,
                items=num_items_in_batch if self.model_accepts_loss_kwargs else None,
                processes=self.accelerator.num_processes if shared else 1,
            )
            loss = self.objective.total(loss, outputs, inputs, part)
            return (loss, outputs) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                mean = functools.partial(self.accelerator.reduce, reduction="mean")
                logs |= self.objective.values_of_step(mean)
            super().log(logs, start_time)

    return WithAdditions


def _expert_layers(model: Any) -> list[Any]:
    """The layers with a mixture; PEFT is not imported where nothing can be one."""
    import sys

    if "taia.molora" not in sys.modules:
        return []
    from taia.molora import mixtures

    return [layer for _, layer in mixtures(model)]


def _of_parameters(model: Any, added: Additions) -> dict[str, Tensor]:
    """The penalties that the parameters alone decide, by name."""
    values = {}
    if "l2" in added.penalty:
        values["l2"] = l2(deltas(model, added.copy))
    if "ewc" in added.penalty:
        assert added.fisher is not None
        values["ewc"] = ewc(deltas(model, added.copy), added.fisher)
    return values


def _refuse_lost_gradients(balance: Tensor) -> None:
    """Reentrant gradient checkpointing runs the forward pass without gradients."""
    if not balance.requires_grad:
        raise RecipeError(
            "the balance loss has no gradients under reentrant gradient checkpointing; switch "
            "it on with use_reentrant=False"
        )


def _statistics(seen: list[Routing]) -> dict[str, Tensor]:
    import torch

    loads = torch.stack([one.load / one.load.sum() for one in seen])
    shares = {f"router_load_{number}": share for number, share in enumerate(loads.mean(dim=0))}
    return {
        "balance": torch.stack([balance_loss(one) for one in seen]).mean(),
        "router_entropy": torch.stack([one.entropy for one in seen]).mean(),
        **shares,
        "router_load_max": loads.amax(dim=1).mean(),
    }
