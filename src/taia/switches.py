"""One switch a module of a live model: how much of an adapter it computes.

PEFT keeps what an adapter needs in layers of its own; each kind of layer is set to a strength
in another way, always exactly: a linear delta through its scale, DoRA through a blend of its
output with the base layer's (both are linear in the input), IA3 and token rows through the
small tensors that they are. At strength 0 a layer computes its base and nothing else.

PEFT's public switches also move `requires_grad`, so its flags are set directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from taia.errors import TaiaError
from taia.stacked import NESTED

__all__ = ["Switch", "find_switches", "is_merged", "match_dtype"]


class Switch(Protocol):
    """Sets how much of its delta a module computes."""

    def set(self, strength: float) -> None:
        """0 is the base, 1 the tuned module."""


def is_merged(switch: Switch) -> bool:
    """Whether PEFT has added the delta to the base's weights: then no switch can take it away."""
    return bool(getattr(getattr(switch, "layer", None), "merged", False))


@dataclass(slots=True)
class _Scaled:
    """LoRA, LoHa, LoKr: a delta behind a scale."""

    layer: Any
    adapter: str
    scale: float

    def set(self, strength: float) -> None:
        self.layer.scaling[self.adapter] = self.scale * strength
        self.layer._disable_adapters = strength == 0


@dataclass(slots=True)
class _Variant:
    """DoRA and its like: the variant computes the tuned output, this one what lies between."""

    layer: Any
    variant: Any
    strength: float = 1.0

    def set(self, strength: float) -> None:
        self.strength = strength
        self.layer._disable_adapters = strength == 0

    def forward(self, module: Any, active_adapter: str, x: Any, result: Any, **options: Any) -> Any:
        full = self.variant.forward(
            module, active_adapter=active_adapter, x=x, result=result, **options
        )
        return full if self.strength == 1 else result + self.strength * (full - result)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Any) -> Any:
        return self._whole().merge_safe(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Any) -> None:
        self._whole().merge_unsafe(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Any) -> Any:
        return self._whole().unmerge(module, active_adapter, orig_weight)

    def _whole(self) -> Any:
        if self.strength != 1:
            raise TaiaError(
                f"a DoRA module at strength {self.strength:g} cannot be merged by PEFT; "
                "`taia splice --merge` can, or merge within using('all')"
            )
        return self.variant


class _Added:
    """Plain LoRA in one pass over the output, in place of PEFT's three."""

    is_plain = True
    """What it adds is a product of the factors and nothing else (`taia.packed` asks)."""

    def forward(self, module: Any, active_adapter: str, x: Any, result: Any, **_: Any) -> Any:
        import torch

        scale = module.scaling[active_adapter]
        middle = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        b = module.lora_B[active_adapter].weight
        if result.dtype != b.dtype:  # a hook or a layer of another kind widened it
            return result + module.lora_B[active_adapter](middle) * scale
        rows = torch.addmm(
            result.reshape(-1, b.shape[0]),
            middle.reshape(-1, b.shape[1]),
            b.T,
            alpha=scale,
        )
        return rows.reshape(result.shape)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Any) -> Any:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Any) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Any) -> Any:
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


@dataclass(slots=True)
class _Ia3:
    """IA3: the vector, or 1 + strength * (vector - 1)."""

    layer: Any
    parameter: Any
    trained: Any

    def set(self, strength: float) -> None:
        vector = self.trained
        if strength not in (0, 1):
            wide = vector.float()
            vector = (1 + strength * (wide - 1)).to(vector.dtype)
        self.parameter.data.copy_(vector)
        self.layer._disable_adapters = strength == 0


@dataclass(slots=True)
class _Rows:
    """Rows of tokens: an embedding's wrapper, and those of the layers tied to it."""

    wrappers: list[Any]
    parameter: Any
    base: Any
    trained: Any

    def set(self, strength: float) -> None:
        rows = self.trained
        if strength not in (0, 1):
            wide = self.base.float()
            rows = (wide + strength * (rows.float() - wide)).to(rows.dtype)
        self.parameter.data.copy_(rows)
        for wrapper in self.wrappers:
            wrapper._disable_adapters = strength == 0
            wrapper.token_adapter._disable_adapters = strength == 0


def find_switches(model: Any, adapter: str) -> tuple[dict[str, Switch], dict[str, Any]]:
    """The switches of an adapter by the name of the weight, and `modules_to_save` by module."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lycoris_utils import LycorisLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper

    switches: dict[str, Switch] = {}
    wrappers, tokens = {}, {}
    for name, module in model.named_modules():
        plain = name
        while plain.endswith(NESTED):  # the wrappers of a module's parameters
            plain = plain.removesuffix(NESTED)
        weight = f"{plain}.{getattr(module, 'parameter_name', 'weight')}"
        if isinstance(module, LoraLayer) and adapter in module.lora_variant:
            switch = _Variant(module, module.lora_variant[adapter])
            module.lora_variant[adapter] = switches[weight] = switch
        elif isinstance(module, LoraLayer | LycorisLayer):
            switches[weight] = _Scaled(module, adapter, module.scaling[adapter])
        elif isinstance(module, IA3Layer):
            vector = module.ia3_l[adapter]
            switches[weight] = _Ia3(module, vector, vector.detach().clone())
        elif isinstance(module, TrainableTokensWrapper):
            tokens[weight] = module
        elif isinstance(module, ModulesToSaveWrapper):
            wrappers[name] = module
    tied = [w for w in tokens.values() if w.token_adapter.tied_adapter]
    for weight, wrapper in tokens.items():
        if wrapper not in tied:
            switches[weight] = _rows(wrapper, adapter, tied)
    return switches, wrappers


def match_dtype(model: Any, adapter: str) -> None:
    """Put the factors of plain LoRA in bfloat16 where the weights that they change are.

    bfloat16 alone: it has the range of float32, so that no small factor is lost. DoRA stays as
    PEFT keeps it, because it computes norms.
    """
    import torch
    from peft.tuners.lora import Linear, LoraLayer

    empty = torch.empty(0)  # stacked experts have parameters of other names
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter in layer.lora_variant:
            continue
        factors = [some[adapter] for some in (layer.lora_A, layer.lora_B) if adapter in some]
        if any(hasattr(factor, "_hf_hook") for factor in factors):
            continue  # accelerate keeps them elsewhere, in a dtype of its own
        if getattr(layer.get_base_layer(), "weight", empty).dtype == torch.bfloat16:
            for factor in factors:
                factor.to(torch.bfloat16)
            if type(layer) is Linear and layer.lora_B[adapter].bias is None:
                layer.lora_variant[adapter] = _Added()


def _rows(wrapper: Any, adapter: str, tied: list[Any]) -> _Rows:
    layer = wrapper.token_adapter
    parameter = layer.trainable_tokens_delta[adapter]
    base = layer.base_layer.weight[layer.token_indices[adapter]].detach().clone()
    with_it = [other for other in tied if other.token_adapter.tied_adapter is layer]
    return _Rows([wrapper, *with_it], parameter, base, parameter.detach().clone())
