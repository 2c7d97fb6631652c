"""Which weights of a model are trained.

A selection names them in the same language that says what is kept at inference:
`all` is the paper's setting, `attention` is train-only-attention (TOA), `ffn` is
train-only-FFN (TOF). Whatever has a strength other than 0 is trained.

LoRA goes onto linear layers, never onto the head; `method="full"` trains every
selected parameter. Limits: feed-forward experts that are stacked in one tensor
(most mixtures of experts) are no linear layers: LoRA on them is refused by name
rather than left out in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from taia.kinds import Address

__all__ = ["add_lora", "freeze_rest", "linear_targets", "trained_weights"]


def linear_targets(model: PreTrainedModel, train: str) -> list[str]:
    """Full names of the linear layers that `train` selects, the head left out.

    Raises RecipeError when there is none, or when selected experts are out of reach.
    """
    linear = _linear_modules(model)
    stacked = _stacked_experts(model)
    kept = _selected(model, [f"{name}.weight" for name in linear] + stacked, train)
    unreached = [name for name in stacked if name in kept]
    if unreached:
        raise RecipeError(
            f"train {train!r}: this model keeps its experts stacked in one tensor, where LoRA on "
            "linear layers does not reach. Train less (such as `attention`) or use method full",
            unreached,
        )
    targets = [name for name in linear if f"{name}.weight" in kept]
    if not targets:
        raise RecipeError(f"train {train!r}: selects no linear layer of this model")
    return targets


def add_lora(
    model: PreTrainedModel,
    train: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    dora: bool = False,
    mixture: Mapping[str, Any] | None = None,
) -> PeftModel:
    """The model with fresh LoRA factors (float32) on what `train` selects.

    With `dora` each has a trained magnitude; with `mixture` (the settings of
    `taia.molora.MoLoraConfig`) routed experts take the place of LoRA in the FFN.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = linear_targets(model, train)
    modules = dict(model.named_modules())
    options: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _short_names(targets, list(modules)),
        "fan_in_fan_out": isinstance(modules[targets[0]], Conv1D),
        "task_type": "CAUSAL_LM",
    }
    if mixture is None:
        config = LoraConfig(**options, use_dora=dora)
    else:
        from taia.molora import MoLoraConfig, register

        register()
        experts = _expert_targets(model, targets, train)
        config = MoLoraConfig(**options, **mixture, expert_modules=experts)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped = get_peft_model(model, config)
    # A name here makes PEFT look it up on the hub at every checkpoint; the end writes it.
    wrapped.peft_config["default"].base_model_name_or_path = ""
    return wrapped


def trained_weights(model: PreTrainedModel, train: str, method: str) -> list[str]:
    """The names of the weights that a method changes, before it is set up."""
    if method != "full":
        return [f"{name}.weight" for name in linear_targets(model, train)]
    names = [name for name, _ in model.named_parameters()]
    kept = _selected(model, names, train)
    return [name for name in names if name in kept]


def freeze_rest(model: PreTrainedModel, train: str) -> None:
    """Leave only the parameters that `train` selects trainable."""
    kept = _selected(model, [name for name, _ in model.named_parameters()], train)
    if not kept:
        raise RecipeError(f"train {train!r}: selects no parameter of this model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)


def _selected(model: PreTrainedModel, names: list[str], train: str) -> set[str]:
    """The parameter names with a strength other than 0."""
    if train == "all":
        return set(names)  # needs no table of kinds, so it works for any model
    from taia.selection import Selection

    every = _addresses(model)
    addresses = {name: every[name] for name in names}
    strengths = Selection.parse(train).strengths(addresses.values())
    return {name for name, address in addresses.items() if strengths[address] != 0}


def _addresses(model: PreTrainedModel) -> dict[str, Address]:
    """The addresses of all parameters: a hybrid's layers are told apart by what else they hold."""
    from taia.kinds import classify_all

    names = [name for name, _ in model.named_parameters()]
    return classify_all(names, model.config.model_type, model.config.to_dict())


def _expert_targets(model: PreTrainedModel, targets: list[str], train: str) -> list[str]:
    """Those of the targets that are of the feed-forward network, in full or by short names."""
    from taia.kinds import Kind

    addresses = _addresses(model)
    found = [name for name in targets if addresses[f"{name}.weight"].kind is Kind.FFN]
    if not found:
        raise RecipeError(
            f"train {train!r}: selects no feed-forward layer, where the experts of method molora "
            "go; train those too, or use method lora"
        )
    return _short_names(found, targets)


def _linear_modules(model: PreTrainedModel) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _stacked_experts(model: PreTrainedModel) -> list[str]:
    """Parameters of three axes that are no convolution's: one matrix for every expert."""
    from torch import nn

    def owner(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not isinstance(owner(name), nn.Conv1d | nn.Conv2d)
    ]


def _short_names(targets: list[str], modules: list[str]) -> list[str]:
    """Last parts of the names where these mean the same modules (loaders know them), else all."""
    short = {name.rpartition(".")[2] for name in targets}
    meant = {name for name in modules if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(targets) else targets
