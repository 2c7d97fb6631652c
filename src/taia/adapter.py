"""PEFT LoRA adapters as what they are: deltas, one a module, in factored form.

A LoRA module holds A (rank x in) and B (out x rank); its delta is `scale * B @ A`, with
scale = alpha / rank, or alpha / sqrt(rank) under rsLoRA (Hu et al. 2021, arXiv 2106.09685;
Kalajdzievski 2023, arXiv 2312.03732), where alpha may differ by module. DoRA rescales the
rows of base + delta to trained magnitudes (Liu et al. 2024, arXiv 2402.09353), so its delta
needs the base weight. Beside factors an adapter can hold whole tensors: biases,
`modules_to_save`, saved embeddings.

Only headers are read here, weights when a delta is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.checkpoint import Tensor, read_header
from taia.errors import CheckpointError, MismatchError, SelectionError, SourceError
from taia.files import read_json
from taia.kinds import Address, classify_all, classify_by_agreement
from taia.lora import (
    CONV1D_NAMES,
    CONV1D_TYPES,
    LoraModule,
    LoraSettings,
    make_module,
    module_fault,
    refuse_other_methods,
    sorted_tensors,
)
from taia.selection import Selection
from taia.sources import Form, Source, resolve

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = [
    "WEIGHTS",
    "Adapter",
    "addresses_of",
    "architecture_of",
    "kept_strengths",
    "read_adapter",
]

WEIGHTS = "adapter_model.safetensors"
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What families call their number of layers in config.json."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter folder: its configuration, LoRA modules, and whole tensors by weight name."""

    text: str
    path: Path
    config: Mapping[str, Any]
    settings: LoraSettings
    modules: Mapping[str, LoraModule]
    whole: Mapping[str, Tensor]

    def of(self, model_type: str | None) -> Adapter:
        """The adapter on a model of one type, which tells the orientation of its weights.

        PEFT stores one `fan_in_fan_out` for all modules, whatever each of them is.
        """
        if model_type is None:
            return self
        modules = {
            name: replace(
                module,
                transposed=model_type in CONV1D_TYPES
                and name.rpartition(".")[2] in CONV1D_NAMES
                and not module.embedding,
            )
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def factors(self, module: LoraModule) -> tuple[Array, Array]:
        """A (rank x in) and B (out x rank), float32 (float64 if stored so), unscaled."""
        from taia.arrays import read_array, widen  # numpy only when weights are read

        return (
            widen(read_array(self.path, module.a)),
            widen(read_array(self.path, module.b)),
        )

    def tuned_weight(self, module: LoraModule, base: Array, strength: float) -> Array:
        """The weight of a module with `strength` of its delta, in float32, in the shape of `base`.

        Raises CheckpointError if the delta does not have the shape of `base`.
        """
        import numpy as np

        from taia.arrays import read_array, widen

        if base.shape != module.shape:
            raise CheckpointError(
                f"{module.weight}: the adapter changes a weight of shape {list(module.shape)}, "
                f"the base has {list(base.shape)}"
            )
        a, b = self.factors(module)
        wide = widen(base)
        product = np.float32(module.scale) * (b @ a)
        if module.embedding or module.transposed:
            product = product.T
        if module.magnitude is None:
            tuned: Array = wide + np.float32(strength) * product
            return tuned
        rows = (wide + product).T if module.transposed else wide + product
        magnitude = widen(read_array(self.path, module.magnitude)).reshape(-1, 1)
        rescaled = magnitude / np.linalg.norm(rows, axis=1, keepdims=True) * rows
        full = rescaled.T if module.transposed else rescaled
        blended: Array = wide + np.float32(strength) * (full - wide)
        return blended


def read_adapter(source: str | Path | Source) -> Adapter:
    """Open a PEFT adapter folder.

    Raises SourceError for another kind of adapter or one that only has pickles, and
    CheckpointError for a broken file or a tensor that no rule of LoRA explains.
    """
    found = resolve(source)
    if found.form is not Form.ADAPTER:
        raise SourceError(f"{found.text}: a PEFT adapter is needed, this is a {found.form}")
    config = read_json(found.path / "adapter_config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{found.path / 'adapter_config.json'}: not a JSON object")
    refuse_other_methods(found.path, config)
    settings = LoraSettings.read(found.path / "adapter_config.json", config)
    _require_weights(found.path)
    parts, whole, faults = sorted_tensors(read_header(found.path / WEIGHTS))
    modules = {}
    for name, of_module in parts.items():
        fault = module_fault(name, of_module)
        if fault:
            faults.append(fault)
        else:
            modules[name] = make_module(name, of_module, settings)
    if not faults and not modules and not whole:
        faults = ["holds no tensors"]
    if faults:
        raise CheckpointError(f"{found.path / WEIGHTS}: not a readable adapter", faults)
    return Adapter(found.text, found.path, config, settings, modules, whole)


def _require_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise SourceError(
            f"{folder}: its weights are a pickle, which can run code when loaded and is not read; "
            "save it again with PEFT's save_pretrained, which writes safetensors"
        )
    raise SourceError(f"{folder}: no {WEIGHTS} in it")


def architecture_of(
    adapter: Adapter, base: str | Path | Source | None = None
) -> tuple[str | None, int | None]:
    """Model type and number of layers of the model that an adapter belongs to, where known.

    They are those of `base`, else of the base model that the adapter itself names, where that
    is a folder on this disk. Nothing is downloaded for it.
    """
    if base is None:
        named = adapter.settings.base_model_name_or_path
        folder = Path(named) if named else Path()
        try:
            if not named or not (folder / "config.json").is_file():
                return None, None
        except OSError:  # a name that no file can have
            return None, None
    else:
        found = resolve(base)
        if found.form is Form.GGUF:
            return None, _gguf_depth(found.path)
        folder = found.path
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return None, None
    text = config.get("text_config")
    depths = config | text if isinstance(text, dict) else config
    layers = next((depths[key] for key in DEPTH_KEYS if isinstance(depths.get(key), int)), None)
    return config["model_type"], layers


def _gguf_depth(path: Path) -> int | None:
    """The number of layers that a GGUF file states; None without the gguf package."""
    try:
        from gguf import GGUFReader
    except ImportError:
        return None
    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from error
    counts = [field for name, field in fields.items() if name.endswith(".block_count")]
    return int(counts[0].contents()) if counts else None


def addresses_of(adapter: Adapter, model_type: str | None) -> dict[str, Address]:
    """The address of every weight that the adapter changes, by the weight's name.

    Without a model type a name counts if every architecture that has it agrees on it.
    Raises KindError for a name that this does not settle.
    """
    names = [module.weight for module in adapter.modules.values()] + list(adapter.whole)
    if model_type is None:
        return {name: classify_by_agreement(name) for name in names}
    return classify_all(names, model_type)


def kept_strengths(
    adapter: Adapter,
    addresses: Mapping[str, Address],
    selection: Selection,
    layers: int | None = None,
) -> dict[str, float]:
    """The strength of every changed weight, by name, where the adapter stays an adapter.

    Raises SelectionError for a term without a match, and MismatchError where DoRA or a whole
    tensor would have a strength other than 0 and 1: neither scales like a product of factors.
    """
    if layers is None and selection.needs_depth:
        raise SelectionError(
            f"{adapter.text}: '{selection}' counts layers from the end, and the adapter does not "
            "tell how many its model has; name the base model"
        )
    try:
        by_address = selection.strengths(addresses.values(), layers)
    except SelectionError as error:
        raise SelectionError(f"{adapter.text}: {error.args[0]}") from None
    strengths = {name: by_address[address] for name, address in addresses.items()}
    dora = {m.weight for m in adapter.modules.values() if m.magnitude is not None}
    faults = [
        f"{name}: {'DoRA' if name in dora else 'a whole tensor'} at strength {strength:g}"
        for name, strength in strengths.items()
        if strength not in (0, 1) and (name in dora or name in adapter.whole)
    ]
    if faults:
        raise MismatchError(
            f"{adapter.text}: these are kept whole or not at all; --merge writes a checkpoint "
            "with any strength",
            faults,
        )
    return strengths
