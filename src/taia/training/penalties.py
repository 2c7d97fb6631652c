"""What holds a fine-tune near its base: the size of its deltas, plain or weighted, and KL.

    l2    sum over weights of delta^2
    ewc   sum over weights of F * delta^2, F the diagonal Fisher information of the base
          (Kirkpatrick et al. 2017, arXiv 1612.00796); see `taia.training.fisher`
    kl    mean over the assistant's tokens of KL(tuned || base), in nats

Each is multiplied by its strength and added to the loss; there is no further factor (EWC is
often written with one half). The delta of LoRA is `scale * B @ A`. Its L2 needs no product:
||B A||^2 = sum of (B^T B) * (A A^T), two matrices of rank x rank. For EWC, DoRA and full
fine-tuning one matrix at a time is made, and made again on the way back, so that the memory is
that of the largest matrix. A mixture of LoRAs has no delta; each of its experts counts by its own.

The reference of KL is the model itself with the adapter switched off, in evaluation mode: no
second copy. Full fine-tuning has nothing to switch off, so KL is refused there, and L2 and EWC
keep a frozen copy of what is trained, in the dtype that the base is stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taia.training.spans import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Delta", "deltas", "ewc", "factored_square", "frozen_copy", "kl", "l2", "without_adapter",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Delta:
    """How one weight is changed: a function of the parameters that are trained.

    `value(*parameters)` is the delta in the shape of the weight. `factors` is A (rank x in),
    B (out x rank) and the scale where the delta is their product.
    """

    weight: str
    parameters: tuple[Tensor, ...]
    value: Callable[..., Tensor]
    factors: tuple[Tensor, Tensor, float] | None = None


def deltas(model: nn.Module, copy: Mapping[str, Tensor] | None = None) -> Iterator[Delta]:
    """The deltas of a model with LoRA, DoRA or MoLoRA, or from `copy` of its former weights.

    An expert of a mixture is a delta of its own; several then have one weight's name.
    """
    if copy is not None:
        yield from _full_deltas(model, copy)
        return
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    from taia.molora import MoLoraLinear

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        transposed = isinstance(module.get_base_layer(), Conv1D)
        for adapter in module.active_adapters:
            scale = module.scaling.get(adapter)
            if isinstance(module, MoLoraLinear):
                factors = module.expert_factors(adapter)
            elif adapter in module.lora_A:
                factors = [(module.lora_A[adapter].weight, module.lora_B[adapter].weight)]
            else:
                continue
            if adapter in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector[adapter].weight
                value = _dora(module.get_base_layer().weight, scale, transposed)
                yield Delta(weight, (*factors[0], magnitude), value)
            else:
                for a, b in factors:
                    yield Delta(weight, (a, b), _product(scale, transposed), (a, b, scale))


def factored_square(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||scale * B @ A||^2 without the product; A (rank, in), B (out, rank)."""
    return ((b.T @ b) * (a @ a.T)).sum() * scale**2


def l2(changes: Iterator[Delta]) -> Tensor:
    """The squared size of all deltas, a scalar with gradients."""
    return _total(
        factored_square(*change.factors)
        if change.factors is not None
        else _again(lambda *p, value=change.value: value(*p).square().sum(), change)
        for change in changes
    )


def ewc(changes: Iterator[Delta], fisher: Callable[[str], Tensor]) -> Tensor:
    """The squared deltas weighted by `fisher(weight)`, in the weight's shape; a scalar."""

    def weighted(change: Delta) -> Tensor:
        def one(*parameters: Tensor) -> Tensor:
            delta = change.value(*parameters)
            return (fisher(change.weight).to(delta.device) * delta.square()).sum()

        return _again(one, change)

    return _total(weighted(change) for change in changes)


def kl(tuned: Tensor, base: Tensor, following: Tensor) -> Tensor:
    """KL(tuned || base), summed over the places that have to predict a label; a scalar.

    Logits are (examples, places, vocabulary), `following` (examples, places): the label that the
    logits of that place predict. One example at a time is widened to float32.
    """
    from torch.utils.checkpoint import checkpoint

    return _total(
        checkpoint(_kl_of_one, *row, use_reentrant=False, preserve_rng_state=False)
        for row in zip(tuned, base, following != IGNORED, strict=True)
    )


def _kl_of_one(tuned: Tensor, base: Tensor, counts: Tensor) -> Tensor:
    ours = tuned[counts].float().log_softmax(dim=-1)
    theirs = base[counts].float().log_softmax(dim=-1)
    return (ours.exp() * (ours - theirs)).sum()


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base model, in evaluation mode, inside the block.

    PEFT's own switch also moves requires_grad, which an optimizer and DDP would notice.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before, training = [layer._disable_adapters for layer in layers], model.training
    for layer in layers:
        layer._disable_adapters = True
    model.eval()
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag
        model.train(training)


def frozen_copy(model: nn.Module, dtype: Any) -> dict[str, Tensor]:
    """The trainable parameters as they are now, in `dtype`, by name."""
    return {
        name: parameter.detach().clone().to(dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _full_deltas(model: nn.Module, copy: Mapping[str, Tensor]) -> Iterator[Delta]:
    for name, parameter in model.named_parameters():
        if name in copy:
            yield Delta(name, (parameter,), lambda now, was=copy[name]: now - was.to(now))


def _product(scale: float, transposed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: scale * ((b @ a).T if transposed else b @ a)


def _dora(base: Tensor, scale: float, transposed: bool) -> Callable[..., Tensor]:
    """DoRA's delta, m / ||W + s B A|| * (W + s B A) - W, row by row of the output."""

    def value(a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        before = base.detach().to(a)
        rows = (before.T if transposed else before) + scale * (b @ a)
        tuned = magnitude.reshape(-1, 1) / rows.norm(dim=1, keepdim=True) * rows
        return (tuned.T if transposed else tuned) - before

    return value


def _again(function: Callable[..., Tensor], change: Delta) -> Tensor:
    """A scalar of a delta that is made again for the gradients rather than kept."""
    from torch.utils.checkpoint import checkpoint

    scalar: Tensor = checkpoint(
        function, *change.parameters, use_reentrant=False, preserve_rng_state=False
    )
    return scalar


def _total(scalars: Iterator[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(scalars)).sum()
