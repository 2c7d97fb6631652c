"""Weights laid out as oneDNN multiplies by them, while texts are written on a processor.

A step of writing multiplies a few rows by every weight of the model. torch lays a bfloat16 weight
out anew for each product; here that is done once, for a second copy. The factors of a plain LoRA
layer become further columns of its weight, so that what they add costs one more small product and
not three passes over the output. The numbers are those of the layers, up to the rounding of
bfloat16.

Limits: bfloat16 on a CPU, where torch has oneDNN and the copy takes no more than `ROOM`; elsewhere
nothing changes, nor for layers with hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["packed"]

ROOM = 2 * 2**30
"""Bytes that the copy may take."""

ROWS = 32
"""Rows that the layout is made for; it serves any number of them."""


@contextmanager
def packed(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, linear layers compute from a copy of their weights as they are now."""
    changed: list[Any] = []
    try:
        for layer, forward in _forwards(model):
            layer.forward = forward
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _forwards(model: torch.nn.Module) -> list[tuple[Any, Callable[..., torch.Tensor]]]:
    """The layers that are packed, and what they compute then; none where it does not pay."""
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    inside: set[Any] = set()
    found = []
    for layer in model.modules():  # a wrapper before what it wraps
        weights = None if layer in inside else _weights(layer)
        if weights is not None:
            inside.update(layer.modules())
            found.append((layer, weights))
    if sum(2 * part.numel() for _, weights in found for part in weights if part is not None) > ROOM:
        return []
    return [(layer, _forward(*weights)) for layer, weights in found]


Weights = tuple["torch.Tensor", "torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None"]
"""Weight (out, in), bias (out), and of LoRA A (rank, in) and B (out, rank), scaled."""


def _weights(layer: Any) -> Weights | None:
    """What a layer multiplies by; None for one that is not packed."""
    import torch

    base = layer
    a = b = None
    if hasattr(layer, "lora_variant"):
        from peft.tuners.lora import Linear

        if type(layer) is not Linear:  # a mixture, an embedding, ...; what is in it may be packed
            return None
        base = layer.base_layer
        active = (
            []
            if layer.disable_adapters
            else [n for n in layer.active_adapters if n in layer.lora_A]
        )
        if layer.merged or len(active) > 1:
            return None
        for name in active:
            if not getattr(layer.lora_variant.get(name), "is_plain", False):
                return None
            a = layer.lora_A[name].weight
            b = (layer.lora_B[name].weight.float() * layer.scaling[name]).to(torch.bfloat16)
    if type(base) is not torch.nn.Linear or any(map(_has_hooks, layer.modules())):
        return None
    parts = [base.weight, *(part for part in (base.bias, a) if part is not None)]
    if any(part.dtype != torch.bfloat16 or part.device.type != "cpu" for part in parts):
        return None
    return base.weight, base.bias, a, b


def _has_hooks(layer: Any) -> bool:
    """Whether something else watches a layer, or has put itself in place of its forward."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _forward(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
) -> Callable[..., torch.Tensor]:
    import torch

    if b is not None:
        weight = torch.cat((weight, b), dim=1)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if a is not None:
            x = torch.cat((x, torch.nn.functional.linear(x, a)), dim=-1)
        done: torch.Tensor = multiply(x, laid_out, bias, "none", [], "")
        return done

    return forward
