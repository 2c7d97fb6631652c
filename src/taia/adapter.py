"""PEFT LoRA adapters as what they are: deltas, one a module, in factored form.

A LoRA module holds A (rank x in) and B (out x rank); its delta is `scale * B @ A`, with
scale = alpha / rank, or alpha / sqrt(rank) under rsLoRA (Hu et al. 2021, arXiv 2106.09685;
Kalajdzievski 2023, arXiv 2312.03732), where alpha may differ by module. DoRA rescales the
rows of base + delta to trained magnitudes (Liu et al. 2024, arXiv 2402.09353), so its delta
needs the base weight. Beside factors an adapter can hold whole tensors: biases,
`modules_to_save`, saved embeddings.

Only headers are read here, weights when a delta is asked for. Settings that change the
delta in ways not computed here are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.checkpoint import FLOATS, Tensor, read_header
from taia.errors import CheckpointError, MismatchError, SelectionError, SourceError
from taia.files import read_json
from taia.kinds import Address, classify_all, classify_by_agreement
from taia.selection import Selection
from taia.sources import Form, Source, resolve

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = [
    "PREFIX",
    "WEIGHTS",
    "Adapter",
    "LoraModule",
    "addresses_of",
    "architecture_of",
    "kept_strengths",
    "read_adapter",
]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

FACTOR = re.compile(
    r"^(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$"
)
PARTS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
         "lora_magnitude_vector": "magnitude"}  # fmt: skip

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What families call their number of layers in config.json."""

OTHER_DELTAS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of LoRA under which `scale * B @ A` is not the delta."""

MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights; PEFT can convert them when saving."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The factors of one module, as stored. Embeddings store theirs under other names."""

    name: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float
    transposed: bool  # Conv1D stores its weight as (in, out), and the delta likewise
    embedding: bool

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.a.shape[0]

    @property
    def weight(self) -> str:
        """The name of the weight that the delta belongs to."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that the delta belongs to."""
        if self.embedding:
            return self.a.shape[1], self.b.shape[0]
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter folder: its configuration, LoRA modules, and whole tensors by weight name."""

    text: str
    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, LoraModule]
    whole: Mapping[str, Tensor]

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
    _refuse_other_methods(found.path, config)
    _require_weights(found.path)
    parts, whole, faults = _sorted_tensors(read_header(found.path / WEIGHTS))
    modules = {}
    for name, of_module in parts.items():
        fault = _module_fault(name, of_module)
        if fault:
            faults.append(fault)
        else:
            modules[name] = _module(name, of_module, config)
    if not faults and not modules and not whole:
        faults = ["holds no tensors"]
    if faults:
        raise CheckpointError(f"{found.path / WEIGHTS}: not a readable adapter", faults)
    return Adapter(found.text, found.path, config, modules, whole)


def _require_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise SourceError(
            f"{folder}: its weights are a pickle, which can run code when loaded and is not read; "
            "save it again with PEFT's save_pretrained, which writes safetensors"
        )
    raise SourceError(f"{folder}: no {WEIGHTS} in it")


def _sorted_tensors(
    stored: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Factors by module and part, whole tensors by weight name, and a fault for anything else."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    faults: list[str] = []
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        match = FACTOR.match(name)
        if tensor.dtype not in FLOATS:
            faults.append(f"{key}: a delta of dtype {tensor.dtype}")
        elif not key.startswith(PREFIX) or (match is None and "lora_" in name):
            faults.append(f"{key}: not a tensor of a LoRA adapter that is known here")
        elif match is not None:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            whole[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = tensor
    return parts, whole, faults


def architecture_of(
    adapter: Adapter, base: str | Path | Source | None = None
) -> tuple[str | None, int | None]:
    """Model type and number of layers of the model that an adapter belongs to, where known.

    They are those of `base`, else of the base model that the adapter itself names, where that
    is a folder on this disk. Nothing is downloaded for it.
    """
    if base is None:
        named = adapter.config.get("base_model_name_or_path")
        if not isinstance(named, str) or not (Path(named) / "config.json").is_file():
            return None, None
        folder = Path(named)
    else:
        found = resolve(base)
        if found.form is not Form.CHECKPOINT:
            return None, None
        folder = found.path
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return None, None
    text = config.get("text_config")
    depths = config | text if isinstance(text, dict) else config
    layers = next((depths[key] for key in DEPTH_KEYS if isinstance(depths.get(key), int)), None)
    return config["model_type"], layers


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


def _refuse_other_methods(path: Path, config: Mapping[str, Any]) -> None:
    method = config.get("peft_type")
    if method != "LORA":
        raise SourceError(f"{path}: an adapter of type {method}; LoRA and DoRA are known here")
    active = [setting for setting in OTHER_DELTAS if config.get(setting)]
    if active:
        raise SourceError(
            f"{path}: its setting {', '.join(active)} makes its delta another than scale * B @ A, "
            "which is not supported. Merge it with PEFT's merge_and_unload and use the checkpoint"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MUTATING_INITS):
        raise SourceError(
            f"{path}: init_lora_weights={start!r} also changed the base weights, so its factors "
            "are not the delta from the base; convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _module_fault(name: str, parts: Mapping[str, Tensor]) -> str | None:
    roles = {PARTS[part] for part in parts}
    if not {"a", "b"} <= roles:
        return f"{name}: has {', '.join(sorted(parts))} but not both factors"
    embedding = "lora_embedding_A" in parts
    a = parts["lora_embedding_A" if embedding else "lora_A"]
    b = parts.get("lora_embedding_B" if embedding else "lora_B")
    if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        shapes = f"{list(a.shape)} and {list(b.shape) if b else 'nothing'}"
        return f"{name}: factors of shapes {shapes} have no product"
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and (embedding or magnitude.parameters != b.shape[0]):
        return f"{name}: a magnitude of shape {list(magnitude.shape)} for {b.shape[0]} rows"
    return None


def _module(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraModule:
    embedding = "lora_embedding_A" in parts
    a = parts["lora_embedding_A" if embedding else "lora_A"]
    return LoraModule(
        name=name,
        a=a,
        b=parts["lora_embedding_B" if embedding else "lora_B"],
        magnitude=parts.get("lora_magnitude_vector"),
        scale=_scale(name, a.shape[0], config),
        transposed=bool(config.get("fan_in_fan_out")) and not embedding,
        embedding=embedding,
    )


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Alpha / rank, or alpha / sqrt(rank) under rsLoRA; patterns match as PEFT matches them."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        config.get("lora_alpha", 8),
    )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
