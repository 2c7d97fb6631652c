"""Deltas on a live model, switched in place: one set of weights, every variant.

    live = taia.attach(model, "adapter/")
    with live.using("attention"):
        model(...)                      # TAIA
    with live.using("all*0.5"):
        model(...)

PEFT puts the factors beside the weights; a selection then sets the scale of each module, or
switches the module off at strength 0, where it computes its base layer and nothing else. No
weight is written and none is copied, except for biases that the adapter replaces: both of
their states are kept. Outside of `using` the model is the base model; `close` removes the
adapter.

Limits: whole tensors (`modules_to_save`, biases) and DoRA are on or off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.adapter import Adapter, addresses_of, kept_strengths, read_adapter
from taia.errors import MismatchError
from taia.selection import Selection
from taia.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Live", "attach"]

NAME = "taia"
"""The name under which PEFT knows the attached adapter."""


def attach(model: PreTrainedModel, adapter: str | Path | Source | Adapter) -> Live:
    """Put a LoRA adapter on a transformers model, switched off.

    `model` stays the object to call. Raises a TaiaError, and leaves the model as it is, for
    an adapter that cannot be read or was made for another model.
    """
    opened = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    _refuse_misfit(model, opened)
    return Live(model, opened)


class Live:
    """A transformers model with an adapter whose parts switch on and off.

    `model` is the model to call, the very object that was given to `attach`.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        from peft import PeftModel

        self.model = model
        self._adapter = adapter
        self._addresses = addresses_of(adapter, model.config.model_type)
        self._depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        training = model.training
        biases = [name for name in adapter.whole if name.endswith(".bias")]
        base = {name: model.get_parameter(name).detach().clone() for name in biases}
        self._peft = PeftModel.from_pretrained(model, adapter.path, adapter_name=NAME)
        model.train(training)
        self._modules, self._wrappers = _switches(model)
        self._scales = {name: layer.scaling[NAME] for name, layer in self._modules.items()}
        self._biases = {name: (_bias(model, name), base[name]) for name in biases}
        self._biases_tuned = {name: p.detach().clone() for name, (p, _) in self._biases.items()}
        self._off = dict.fromkeys(self._addresses, 0.0)
        self._current = self._off
        self._apply(self._off)

    @contextmanager
    def using(self, keep: str | Selection) -> Iterator[PreTrainedModel]:
        """Within the block the model keeps `keep` of the adapter; after it, what it had before.

        Raises SelectionError for a term that matches nothing of the adapter, MismatchError
        for a strength that a module cannot have.
        """
        selection = Selection.parse(keep)
        strengths = self._off
        if selection.terms:
            strengths = kept_strengths(self._adapter, self._addresses, selection, self._depth)
        before = self._current
        self._apply(strengths)
        try:
            yield self.model
        finally:
            self._apply(before)

    def close(self) -> None:
        """Take the adapter off; the model has its own modules again."""
        self._apply(self._off)
        self._peft.unload()
        self._modules, self._wrappers, self._biases = {}, {}, {}

    def _apply(self, strengths: dict[str, float]) -> None:
        for name, layer in self._modules.items():
            strength = strengths[f"{name}.weight"]
            layer.scaling[NAME] = self._scales[name] * strength
            layer._disable_adapters = strength == 0  # PEFT's own switch also moves requires_grad
        for name, wrapper in self._wrappers.items():
            wrapper.enable_adapters(
                any(strengths[weight] for weight in strengths if weight.startswith(f"{name}."))
            )
        for name, (parameter, base) in self._biases.items():
            parameter.data.copy_(self._biases_tuned[name] if strengths[name] else base)
        self._current = strengths


def _refuse_misfit(model: PreTrainedModel, adapter: Adapter) -> None:
    """PEFT drops what it cannot place without a word; here everything must have its place."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {m.weight: m.shape for m in adapter.modules.values()}
    expected |= {name: tensor.shape for name, tensor in adapter.whole.items()}
    faults = []
    if any(".lora_A." in name for name in shapes):
        faults.append("the model carries an adapter already; merge it or take it off first")
    for name, shape in expected.items():
        if name not in shapes:
            faults.append(f"{name}: the model has no such weight")
        elif shapes[name] != shape:
            faults.append(f"{name}: the model has {list(shapes[name])}, the adapter {list(shape)}")
    if faults:
        raise MismatchError(f"{adapter.text}: does not fit this {type(model).__name__}", faults)


def _switches(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The LoRA modules and the wrapped whole modules, by their names in the model."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    named = dict(model.named_modules())
    return (
        {name: module for name, module in named.items() if isinstance(module, LoraLayer)},
        {
            name: module
            for name, module in named.items()
            if isinstance(module, ModulesToSaveWrapper)
        },
    )


def _bias(model: Any, name: str) -> Any:
    """A bias parameter by its name before PEFT wrapped its module."""
    module = model.get_submodule(name.rpartition(".")[0])
    return getattr(module, "base_layer", module).bias
