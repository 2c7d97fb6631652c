"""MoLoRA as a PEFT method: LoRA on some linear layers, a routed mixture of LoRAs on others.

A plain target gets LoRA. A target that `expert_modules` names gets `experts` pairs of factors
A_e (rank x in) and B_e (out x rank) behind a linear router of its own: each token chooses
`experts_per_token` of them, and with gates g (a softmax over the chosen logits)

    y = W x + scale * sum over e of g_e(x) * B_e A_e x

(Jiang et al. 2024, arXiv 2405.20192, and the mixtures of LoRAs before it). There is no loop:
all A_e are one (experts * rank, in) matrix, the gates scale the middle, all B_e are one (out,
experts * rank) matrix, which is the same sum. The change depends on the input, so a mixture has
no delta of the weight and cannot be merged; TAIA drops it as a whole.

After `register()` PEFT knows the method: `PeftModel.from_pretrained` loads an adapter folder and
`save_pretrained` writes one, with peft_type MOLORA. Whatever in taia needs it registers it.

Limits: linear layers and Conv1D; all experts are computed for every token, as they are small; no
DoRA; no batch that mixes adapters. Dropout is on the input of the experts, not of the router.
This is the one module that imports torch and PEFT at its top: import it inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import register_peft_method
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from taia.errors import MismatchError, RecipeError
from taia.experts import NO_DELTA
from taia.routing import Routing, gates, routing

__all__ = ["MoLoraConfig", "MoLoraLinear", "MoLoraModel", "mixtures", "register"]

NAME = "MOLORA"


@dataclass
class MoLoraConfig(LoraConfig):  # type: ignore[misc]
    """LoRA's settings, of which rank and alpha also hold for each expert, and the mixture's."""

    experts: int = field(default=4, metadata={"help": "LoRA experts on each expert module."})
    experts_per_token: int = field(default=1, metadata={"help": "Experts that a token chooses."})
    expert_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Those of target_modules that get experts: names or ends of names."},
    )
    expert_dropout: float = field(
        default=0.0, metadata={"help": "How likely a token cannot choose an expert in training."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        faults = []
        if self.experts < 1 or self.experts_per_token < 1:
            faults.append("experts and experts_per_token must be at least 1")
        elif self.experts_per_token > self.experts:
            faults.append(
                f"{self.experts_per_token} experts per token are more than the {self.experts} "
                "experts there are"
            )
        if not 0 <= self.expert_dropout < 1:
            faults.append(f"expert_dropout {self.expert_dropout} is not in [0, 1)")
        if self.use_dora or self.lora_bias or self.init_lora_weights is not True:
            faults.append("use_dora, lora_bias and init_lora_weights are not known to a mixture")
        if faults:
            raise RecipeError("these MoLoRA settings cannot be used", faults)

    def has_experts(self, module: str) -> bool:
        """Whether a module, by its full name, gets experts rather than plain LoRA."""
        return any(
            module == name or module.endswith(f".{name}") for name in self.expert_modules or ()
        )


class MoLoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]
    """A linear layer with routed LoRA experts beside it."""

    adapter_layer_names = ("lora_experts_A", "lora_experts_B", "lora_router")
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "experts", "chosen", "expert_dropout",
    )  # fmt: skip

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, r: int, alpha: float, config: MoLoraConfig
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_experts_A = nn.ModuleDict()
        self.lora_experts_B = nn.ModuleDict()
        self.lora_router = nn.ModuleDict()
        self.experts: dict[str, int] = {}
        self.chosen: dict[str, int] = {}
        self.expert_dropout: dict[str, float] = {}
        self.mask: torch.Tensor | None = None
        """(batch, length): which tokens of the next batch count in the statistics."""
        self.seen: Routing | None = None
        """How the last batch in training was routed; None for one expert."""
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: MoLoraConfig, **_: Any
    ) -> None:
        """Add an adapter: A as in LoRA (Kaiming), B zero, the router as any linear layer."""
        if r < 1:
            raise RecipeError(f"rank {r}: at least 1 is needed")
        experts = config.experts
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.experts[adapter_name], self.chosen[adapter_name] = experts, config.experts_per_token
        self.expert_dropout[adapter_name] = config.expert_dropout
        self.lora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        a = nn.Linear(self.in_features, experts * r, bias=False)
        b = nn.Linear(experts * r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))  # by its fan-in, so for each A_e
        nn.init.zeros_(b.weight)
        self.lora_experts_A[adapter_name], self.lora_experts_B[adapter_name] = a, b
        if experts > 1:
            self.lora_router[adapter_name] = nn.Linear(self.in_features, experts)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) to (..., out), in the dtype of the base layer's result."""
        if kwargs.pop("adapter_names", None) is not None:
            raise MismatchError("a batch of several adapters is not known to MoLoRA")
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_experts_A:
                result = result + self._change(name, x)
        return result.to(dtype)

    def _change(self, name: str, x: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_experts_A[name], self.lora_experts_B[name]
        x = self._cast_input_dtype(x, a.weight.dtype)
        middle = a(self.lora_dropout[name](x))
        if self.experts[name] == 1:
            return b(middle) * self.scaling[name]
        weights = (self._gates(name, x) * self.scaling[name]).to(middle.dtype)
        shape = (self.experts[name], self.r[name])
        return b((middle.unflatten(-1, shape) * weights.unsqueeze(-1)).flatten(-2))

    def _gates(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(..., experts), float32: bfloat16 would turn near logits into ties."""
        with torch.autocast(x.device.type, enabled=False):
            router = self.lora_router[name]
            logits = router(x.to(router.weight.dtype)).float()
        dropout = self.expert_dropout[name] if self.training else 0.0
        weights = gates(logits, self.chosen[name], dropout)
        if self.training:
            fits = self.mask is not None and self.mask.shape == logits.shape[:-1]
            self.seen = routing(logits, weights, self.mask if fits else None)
        return weights

    def expert_factors(self, adapter: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A_e (rank x in) and B_e (out x rank) of each expert, as views."""
        r = self.r[adapter]
        a = self.lora_experts_A[adapter].weight.split(r, dim=0)
        b = self.lora_experts_B[adapter].weight.split(r, dim=1)
        return list(zip(a, b, strict=True))

    def merge(self, *_: Any, **__: Any) -> None:
        """Always refused: there is nothing to merge."""
        raise MismatchError(NO_DELTA)

    def unmerge(self) -> None:
        """Nothing to do, as nothing is ever merged."""


class MoLoraModel(LoraModel):  # type: ignore[misc]
    """A model with LoRA on its targets and experts on those that the configuration names."""

    def _create_and_replace(
        self,
        lora_config: MoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if not lora_config.has_experts(current_key):
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key,
                parameter_name=parameter_name,
            )  # fmt: skip
            return
        ranks, alphas = lora_config.rank_pattern, lora_config.alpha_pattern
        r = ranks.get(get_pattern_key(ranks.keys(), current_key), lora_config.r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), lora_config.lora_alpha)
        if isinstance(target, MoLoraLinear):
            target.update_layer(adapter_name, r, alpha, lora_config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise RecipeError(
                f"{current_key}: a {type(target).__name__}; experts go on linear layers only"
            )
        layer = MoLoraLinear(target, adapter_name, r, alpha, lora_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        """PEFT asks before it merges the first layer, so that no half-merged model is left."""
        raise MismatchError(NO_DELTA)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Always refused: routed experts of two adapters do not add up."""
        raise MismatchError("adapters with a mixture cannot be added up")


def mixtures(model: nn.Module) -> Iterator[tuple[str, MoLoraLinear]]:
    """The expert layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, MoLoraLinear):
            yield name, module


def register() -> None:
    """Make MoLoRA known to PEFT, for this process. A second call does nothing."""
    if _peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=MoLoraConfig, model_cls=MoLoraModel, prefix="lora_"
        )


def _peft_type() -> PeftType:
    """PEFT's name for the method; its enumeration is closed, so the member is put into it."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
    return PeftType[NAME]
