"""Deltas on a live model, switched in place: one set of weights, every variant.

    live = taia.attach(model, "adapter/")
    with live.using("attention"):
        model(...)                      # TAIA
    with live.using("all*0.5"):
        model(...)

PEFT puts the adapter's tensors beside the weights; a selection then sets a switch at each
module (`switches.py`), which at strength 0 computes its base layer and nothing else. No
weight is written and none is copied, except for biases that the adapter replaces: both of
their states are kept. Outside of `using` the model is the base model; `close` gives it back
its own modules. On a model in bfloat16 the factors of LoRA are in bfloat16 too, as servers hold
them, which loses less than a merge into such a model does: in float32, PEFT's choice, they take
longer than the whole model does on a processor.

Limits: whole tensors (`modules_to_save`, biases) are on or off. Blocks of `using` may nest,
not interleave.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.adapter import Adapter, addresses_of, kept_strengths, read_adapter
from taia.errors import MismatchError, TaiaError
from taia.experts import Experts
from taia.lora import LoraBias
from taia.selection import Selection
from taia.sources import Source
from taia.switches import Switch, find_switches, is_merged, match_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Live", "attach"]

NAME = "taia"
"""The name under which PEFT knows the attached adapter."""

MARKS = ("lora_", "hada_", "lokr_", "ia3_l", "trainable_tokens_delta")
"""What the parameters of adapters are called."""


def attach(model: PreTrainedModel, adapter: str | Path | Source | Adapter) -> Live:
    """Put an adapter on a transformers model, switched off.

    `model` stays the object to call. Raises a TaiaError, and leaves the model as it is, for
    an adapter that cannot be read or was made for another model.
    """
    opened = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    opened = opened.of(model.config.model_type, shapes.get)
    _refuse_misfit(model, opened, shapes)
    return Live(model, opened)


class Live:
    """A transformers model with an adapter whose parts switch on and off.

    `model` is the model to call, the very object that was given to `attach`.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        self.model = model
        self._adapter = adapter
        self._addresses = addresses_of(adapter, model.config.model_type, model.config.to_dict())
        self._depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        self._before = _Before(model)
        biases = [name for name in adapter.whole if name.endswith(".bias")]
        base = {name: model.get_parameter(name).detach().clone() for name in biases}
        try:
            self._switches, self._wrappers = _inject(model, adapter)
        except BaseException:
            self._before.restore(model)
            _write_biases(model, base)
            raise
        self._before.restore_flags()
        self._biases_base = base
        self._biases_tuned = {name: _bias(model, name).detach().clone() for name in biases}
        self._off = dict.fromkeys(self._addresses, 0.0)
        self._closed = False
        self._apply(self._off)

    @contextmanager
    def using(self, keep: str | Selection) -> Iterator[PreTrainedModel]:
        """Within the block the model keeps `keep` of the adapter; after it, what it had before.

        Raises SelectionError for a term that matches nothing of the adapter, MismatchError
        for a strength that a module cannot have.
        """
        if self._closed:
            raise TaiaError(f"{self._adapter.text}: was taken off by close(); attach it again")
        selection = Selection.parse(keep)
        strengths = self._off
        if selection.terms:
            strengths = kept_strengths(
                self._adapter, self._addresses, selection, self._depth, divided=True
            )
            self._refuse_halves(strengths)
        before = self._current
        self._apply(strengths)
        try:
            yield self.model
        finally:
            self._apply(before)

    def close(self) -> None:
        """Take the adapter off: the model has its own modules and flags again."""
        if self._closed:
            return
        self._apply(self._off)
        self._before.restore(self.model)
        self._closed = True

    def _apply(self, strengths: dict[str, float]) -> None:
        merged = [w for w, switch in self._switches.items() if is_merged(switch)]
        if merged:
            raise TaiaError(
                f"{self._adapter.text}: merged into the weights of {len(merged)} modules "
                f"({merged[0]}, ...), which can then not be switched; unmerge them first"
            )
        # PEFT's public switches also move requires_grad, so its flags are set directly
        for weight, switch in self._switches.items():
            switch.set(strengths[weight])
        for name, wrapper in self._wrappers.items():
            wrapper._disable_adapters = not any(strengths[w] for w in self._within(name))
        chosen = {n: self._biases_tuned if strengths[n] else self._biases_base
                  for n in self._biases_base}  # fmt: skip
        _write_biases(self.model, {name: states[name] for name, states in chosen.items()})
        self._current = strengths

    def _within(self, wrapper: str) -> list[str]:
        """The changed weights under a wrapped module."""
        return [weight for weight in self._addresses if weight.startswith(f"{wrapper}.")]

    def _refuse_halves(self, strengths: dict[str, float]) -> None:
        """A wrapped module switches as one, whatever kinds of weights are in it."""
        faults = [
            f"{name}: holds weights that are kept and weights that are not"
            for name in self._wrappers
            if len({strengths[weight] != 0 for weight in self._within(name)}) > 1
        ]
        if faults:
            raise MismatchError(
                f"{self._adapter.text}: a module of modules_to_save is on or off as a whole on a "
                "live model; --merge writes a checkpoint that tells its weights apart",
                faults,
            )


class _Before:
    """Modules and flags of a model, as they were before PEFT changed them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = dict(model.named_modules())
        self.training = {module: module.training for module in self.modules.values()}
        self.gradients = {p: p.requires_grad for p in model.parameters()}
        self.attributes = set(vars(model))

    def restore_flags(self) -> None:
        for parameter, flag in self.gradients.items():
            parameter.requires_grad_(flag)
        for module, flag in self.training.items():
            module.training = flag

    def restore(self, model: PreTrainedModel) -> None:
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            if name and self.modules[parent]._modules.get(child) is not module:
                self.modules[parent]._modules[child] = module
        for attribute in set(vars(model)) - self.attributes:
            delattr(model, attribute)
        self.restore_flags()


def _inject(model: Any, adapter: Adapter) -> tuple[dict[str, Switch], dict[str, Any]]:
    """Switches by weight and wrapped whole modules by name, exactly those that the file holds."""
    from peft import PeftModel

    if any(isinstance(change, Experts) for change in adapter.modules.values()):
        from taia.molora import register

        register()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            peft = PeftModel.from_pretrained(model, adapter.path, adapter_name=NAME)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if "out of memory" in str(error):
            raise TaiaError(
                f"{adapter.text}: does not fit into the memory beside its model: {error}"
            ) from error
        raise MismatchError(
            f"{adapter.text}: PEFT cannot load it, its configuration and its weights disagree: "
            f"{str(error).splitlines()[0]}"
        ) from error
    peft.eval()
    switches, wrappers = find_switches(model, NAME)
    switched = {
        change.weight for change in adapter.modules.values() if not change.weight.endswith(".bias")
    }
    faults = [f"{name}: in the file, not a target of the configuration"
              for name in switched if name not in switches]  # fmt: skip
    faults += [f"{name}: a target of the configuration, not in the file"
               for name in switches if name not in switched]  # fmt: skip
    if faults:
        raise MismatchError(f"{adapter.text}: its configuration and weights disagree", faults)
    match_dtype(model, NAME)
    return switches, wrappers


def _refuse_misfit(
    model: PreTrainedModel, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """PEFT drops what it cannot place without a word; here everything must have its place."""
    expected = {
        name: change.shape
        for name, change in adapter.modules.items()
        if not isinstance(change, LoraBias)  # it acts on the output, bias or no bias
    }
    expected |= {name: tensor.shape for name, tensor in adapter.whole.items()}
    faults = []
    if any(f".{mark}" in name for name in shapes for mark in MARKS):
        faults.append("the model carries an adapter already; merge it or take it off first")
    for name, shape in expected.items():
        if name not in shapes:
            faults.append(f"{name}: the model has no such weight")
        elif shapes[name] != shape:
            faults.append(f"{name}: the model has {list(shapes[name])}, the adapter {list(shape)}")
    if faults:
        raise MismatchError(f"{adapter.text}: does not fit this {type(model).__name__}", faults)


def _bias(model: Any, name: str) -> Any:
    """A bias parameter by its name before PEFT wrapped its module."""
    module = model.get_submodule(name.rpartition(".")[0])
    return getattr(module, "base_layer", module).bias


def _write_biases(model: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        _bias(model, name).data.copy_(value)
