"""PEFT adapters as what they are: deltas, one a weight, in a small form.

An adapter folder holds a configuration and tensors that belong to modules of a base model.
What a module's tensors do to its weights is the matter of one class a method: `lora.py`,
`stacked.py`, `low_rank.py`, `vectors.py`, all of the form of `changes.py`. Beside those an
adapter can hold whole tensors: biases, `modules_to_save`, saved embeddings.

Only headers are read here, weights when a delta is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from taia.changes import PREFIX, Change, Shapes
from taia.checkpoint import FLOATS, Tensor, read_header, refuse_changed, stamp
from taia.errors import CheckpointError, MismatchError, SelectionError, SourceError
from taia.experts import EXPERTS_PARTS, expert_changes
from taia.files import read_json
from taia.fused import Parts, part_strengths
from taia.gguf_header import read_gguf
from taia.kinds import Address, classify_all, classify_by_agreement
from taia.lora import LORA_PARTS, LoraModule, lora_changes
from taia.low_rank import LOHA_PARTS, LOKR_PARTS, low_rank_changes
from taia.peft_config import METHODS, Settings, read_settings
from taia.selection import Selection
from taia.sources import Form, Source, resolve
from taia.stacked import NESTED, stacked_changes, targeted
from taia.vectors import IA3_PARTS, ROWS, ia3_changes, token_rows

if TYPE_CHECKING:
    from taia.arrays import Array

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "addresses_of",
    "architecture_of",
    "kept_strengths",
    "read_adapter",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What families call their number of layers in config.json."""

PARTS = {"LORA": LORA_PARTS, "LOHA": LOHA_PARTS, "LOKR": LOKR_PARTS, "IA3": IA3_PARTS,
         "MOLORA": EXPERTS_PARTS}  # fmt: skip
MARKS = re.compile(r"(^|\.)(lora_|hada_|lokr_|ia3_)")
TRAINING_ONLY = ".lora_velora_embed"
MAKERS: dict[str, Any] = {
    "LORA": lora_changes, "LOHA": low_rank_changes, "LOKR": low_rank_changes, "IA3": ia3_changes,
    "MOLORA": expert_changes,
}  # fmt: skip
"""By method: the names of a module's tensors, and what makes changes of them. MARKS are what
the names of all their tensors have."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder: its configuration, its changes, and whole tensors, by weight name.

    `stamps` holds the size and the modification time of its files before they were read.
    """

    text: str
    path: Path
    config: Mapping[str, Any]
    settings: Settings
    modules: Mapping[str, Change]
    whole: Mapping[str, Tensor]
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How the method is written: LoRA, MoLoRA, LoHa, LoKr or IA3."""
        return METHODS[self.settings.peft_type]

    def of(self, model_type: str | None, shapes: Shapes | None = None) -> Adapter:
        """The adapter on a base of one type, whose weights have `shapes`, where known.

        This settles what the adapter does not tell: the orientation of a weight, and whether
        a layer has a bias to multiply.
        """
        bound = {name: change.on(model_type, shapes) for name, change in self.modules.items()}
        return replace(self, modules={n: c for n, c in bound.items() if c is not None})

    def refuse_changed(self) -> None:
        """Raise CheckpointError if a file of it is no longer the one that was read."""
        refuse_changed(self.path, self.stamps)

    def factors(self, module: LoraModule) -> tuple[Array, Array]:
        """A (rank x in) and B (out x rank), float32 (float64 if stored so), unscaled."""
        return module.factors(self.path)

    def tuned_weight(self, module: Change, base: Array, strength: float) -> Array:
        """The weight of a change with `strength` of it, in float32, in the shape of `base`.

        Raises CheckpointError if the change does not have the shape of `base`.
        """
        return module.tuned(self.path, base, strength)


def read_adapter(source: str | Path | Source) -> Adapter:
    """Open a PEFT adapter folder.

    Raises SourceError for a method or setting that is not read here and for an adapter that
    only has pickles, CheckpointError for a broken file or a tensor that no rule explains.
    """
    found = resolve(source)
    if found.form is not Form.ADAPTER:
        raise SourceError(f"{found.text}: a PEFT adapter is needed, this is a {found.form}")
    stamps = {name: stamp(found.path / name) for name in (CONFIG, WEIGHTS)}
    config = read_json(found.path / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{found.path / CONFIG}: not a JSON object")
    settings = read_settings(found.path / CONFIG, config)
    _require_weights(found.path)
    parts, whole, faults = _sorted_tensors(read_header(found.path / WEIGHTS), settings)
    changes, more = _changes(parts, settings)
    modules = {change.weight: change for change in changes}
    faults += more
    if not faults and len(modules) < len(changes):
        faults = ["two of its modules change one weight"]
    if not faults and not modules and not whole:
        faults = ["holds no tensors"]
    if faults:
        raise CheckpointError(f"{found.path / WEIGHTS}: not a readable adapter", faults)
    return Adapter(found.text, found.path, config, settings, modules, whole, stamps)


_NOTHING = Tensor("", "F32", (), "", 0, 0)


def _sorted_tensors(
    stored: Mapping[str, Tensor], settings: Settings
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Tensors by module and part, whole tensors by weight name, and a fault for anything else."""
    method = METHODS[settings.peft_type]
    known = re.compile(rf"^(?P<module>.+?)\.(?P<part>{PARTS[settings.peft_type]})$")
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    faults: list[str] = []
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        match = known.match(name)
        if tensor.dtype not in FLOATS:
            faults.append(f"{key}: a delta of dtype {tensor.dtype}")
        elif not key.startswith(PREFIX) or _is_unknown(name, match is not None):
            faults.append(f"{key}: not a tensor of a {method} adapter")
        elif match is not None:
            parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
        elif name.endswith(TRAINING_ONLY):
            continue
        elif name.endswith(ROWS):
            parts[name] = {"rows": tensor}
        elif ".original_module." not in name:  # the base's own, saved along with a copy
            plain = re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)
            if plain in whole:
                faults.append(f"{key}: stands for {plain}, as {whole[plain].name} does")
            whole[plain] = tensor
    return parts, whole, faults + _doubled(parts, whole)


def _is_unknown(name: str, matched: bool) -> bool:
    """Whether a name has the marks of an adapter's tensor and is none that is known."""
    return not matched and bool(MARKS.search(name)) and not name.endswith(TRAINING_ONLY)


def _doubled(parts: Mapping[str, Mapping[str, Tensor]], whole: dict[str, Tensor]) -> list[str]:
    """Drop the base weights saved along with factors; the fault of any other whole weight."""
    faults = []
    for module in parts:  # beside its factors, a target's weight is the base's, saved along
        if whole.get(f"{module}.weight", _NOTHING).name.endswith(".base_layer.weight"):
            del whole[f"{module}.weight"]
        elif f"{module}.weight" in whole:
            faults.append(f"{module}: has factors and a whole weight")
    return faults


def _changes(
    parts: Mapping[str, Mapping[str, Tensor]], settings: Settings
) -> tuple[list[Change], list[str]]:
    """What the tensors of all modules change, and what is wrong with them."""
    changes: list[Change] = []
    faults: list[str] = []
    stacks: dict[str, dict[int, Mapping[str, Tensor]]] = {}

    def take(made: tuple[Sequence[Change], str | None]) -> None:
        changes.extend(made[0])
        faults.extend([made[1]] if made[1] else [])

    for name, of_module in parts.items():
        plain = re.sub(rf"({re.escape(NESTED)})+$", "", name)
        if name.endswith(ROWS):
            take(token_rows(name.removesuffix(ROWS), of_module["rows"], settings))
        elif targeted(plain, settings):
            depth = (len(name) - len(plain)) // len(NESTED)
            stacks.setdefault(plain, {})[depth] = of_module
        else:
            take(MAKERS[settings.peft_type](name, of_module, settings))
    for name, wrappers in stacks.items():
        take(stacked_changes(name, wrappers, settings))
    return changes, faults


def _require_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise SourceError(
            f"{folder}: its weights are a pickle, which can run code when loaded and is not read; "
            "save it again with PEFT's save_pretrained, which writes safetensors"
        )
    raise SourceError(f"{folder}: no {WEIGHTS} in it")


class Architecture(NamedTuple):
    """What is known of a model: its type, its number of layers, its config.json."""

    model_type: str | None = None
    layers: int | None = None
    config: Mapping[str, Any] | None = None


def architecture_of(adapter: Adapter, base: str | Path | Source | None = None) -> Architecture:
    """What is known of the model that an adapter belongs to.

    They are those of `base`, else of the base model that the adapter itself names, where that
    is a folder on this disk. Nothing is downloaded for it.
    """
    if base is None:
        named = adapter.settings.base_model_name_or_path
        folder = Path(named) if named else Path()
        try:
            if not named or not (folder / "config.json").is_file():
                return Architecture()
        except OSError:  # a name that no file can have
            return Architecture()
    else:
        found = resolve(base, headers_only=True)
        if found.form is Form.GGUF:
            return Architecture(layers=_gguf_depth(found.path))
        folder = found.path
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return Architecture()
    text = config.get("text_config")
    depths = config | text if isinstance(text, dict) else config
    layers = next((depths[key] for key in DEPTH_KEYS if isinstance(depths.get(key), int)), None)
    return Architecture(config["model_type"], layers, config)


def _gguf_depth(path: Path) -> int | None:
    """The number of layers that a GGUF file states."""
    stated = (v for key, v in read_gguf(path).config.items() if key.endswith(".block_count"))
    return next((count for count in stated if isinstance(count, int)), None)


def addresses_of(
    adapter: Adapter, model_type: str | None, config: Mapping[str, Any] | None = None
) -> dict[str, Address]:
    """The address of every weight that the adapter changes, by the weight's name.

    `config`: the model's, as for `classify_all`. Without a model type a name counts if every
    architecture that has it agrees on it.
    Raises KindError for a name that this does not settle.
    """
    names = [*adapter.modules, *adapter.whole]
    if model_type is None:
        return {name: classify_by_agreement(name) for name in names}
    return classify_all(names, model_type, config)


def kept_strengths(
    adapter: Adapter,
    addresses: Mapping[str, Address],
    selection: Selection,
    layers: int | None = None,
    *,
    divided: bool = False,
    rows: dict[str, Parts] | None = None,
) -> dict[str, float]:
    """The strength of every changed weight, by name, where the adapter stays an adapter.

    Raises SelectionError for a term without a match, and MismatchError where DoRA or a whole
    tensor would have a strength other than 0 and 1: neither scales like a product of factors.
    With `divided` only whole tensors are held to that: the caller has the base weights.
    `rows` receives the weights of fused projections whose parts differ; for a caller that gives
    none they are an error. Their strength is told as 1: the rest is in their rows.
    """
    if layers is None and selection.needs_depth:
        raise SelectionError(
            f"{adapter.text}: '{selection}' counts layers from the end, and the adapter does not "
            "tell how many its model has; name the base model"
        )
    try:
        by_address, parted = part_strengths(selection, addresses.values(), layers)
    except SelectionError as error:
        raise SelectionError(f"{adapter.text}: {error.args[0]}") from None
    if parted and rows is None:
        raise MismatchError(
            f"{adapter.text}: parts of a fused projection at different strengths, which only a "
            "sliced adapter or a merged checkpoint can have",
            [name for name, address in addresses.items() if address in parted],
        )
    if rows is not None:
        rows |= {name: parted[address] for name, address in addresses.items() if address in parted}
    strengths = {name: by_address.get(address, 1.0) for name, address in addresses.items()}
    undivided = {
        name: change.divisible for name, change in adapter.modules.items() if not divided
    } | dict.fromkeys(adapter.whole, "a whole tensor")
    faults = [
        f"{name}: {undivided[name]} at strength {strength:g}"
        for name, strength in strengths.items()
        if strength not in (0, 1) and undivided.get(name)
    ]
    if faults:
        raise MismatchError(
            f"{adapter.text}: these are kept whole or not at all; --merge writes a checkpoint "
            "with any strength",
            faults,
        )
    return strengths
