"""A LoRA adapter that holds only what a selection keeps, in a form that every tool reads.

PEFT knows ranks and alphas by module, rsLoRA and fractional scales; vLLM knows one rank and
one alpha and ignores patterns; llama.cpp's converter reads one alpha and divides it by each
tensor's own rank. All three read the same delta when every module has the same rank r, alpha
is r, and whatever scale there was is multiplied into B. So: B <- scale * strength * B, ranks
padded with zeros to the largest one, patterns gone.

A DoRA module is not linear in its strength and is kept whole or not at all; whole tensors
(biases, `modules_to_save`) too, as an adapter has no base to blend them with. For strengths
between, merge into a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from taia.adapter import (
    CONFIG,
    WEIGHTS,
    Adapter,
    addresses_of,
    architecture_of,
    kept_strengths,
    read_adapter,
)
from taia.card import card
from taia.changes import Change, Sliced, stored
from taia.checkpoint import Checkpoint, open_checkpoint
from taia.companions import TOKENIZER_FILES, copy_companions, files_in
from taia.errors import MismatchError
from taia.experts import Experts
from taia.files import (
    atomic_write,
    refuse_existing,
    refuse_gguf_name,
    refuse_overlap,
    staged_folder,
)
from taia.fused import Parts
from taia.hashing import with_digests
from taia.holes import MIRROR_MARKER
from taia.kinds import Address
from taia.lora import LoraBias, LoraModule
from taia.peft_config import matches
from taia.plan import Origin
from taia.receipt import ALGORITHM, RECEIPT, Entry, Receipt, digest_of
from taia.selection import Selection
from taia.sources import Form, Source, resolve
from taia.stacked import StackedModule
from taia.stored_names import StoredNames
from taia.unstack import unstack
from taia.vectors import Ia3Vector, TokenRows
from taia.writing import (
    header_digest,
    header_of,
    record_of,
)

__all__ = ["portable_config", "slice_adapter", "sliced_tensors"]

BASE_CONFIG = "config.json"


def slice_adapter(
    adapter: str | Path | Source,
    out: str | Path,
    keep: str | Selection = "attention",
    *,
    base: str | Path | Source | None = None,
    hash: bool = False,  # noqa: A002
    overwrite: bool = False,
) -> Receipt:
    """Write the adapter that keeps `keep` of `adapter`.

    `base` tells the architecture; without it the base model named in the adapter is used
    where it lies on this disk, else names that all architectures agree on. Raises a
    TaiaError, and leaves nothing at `out`.
    """
    destination = Path(out)
    selection = Selection.parse(keep)
    refuse_gguf_name(destination)
    refuse_existing(destination, overwrite=overwrite)
    whole = read_adapter(adapter)
    base = resolve(base, headers_only=True) if base else None
    refuse_overlap(destination, whole.path, *([base.path] if base else []))
    whole, addresses, strengths = _decided(whole, selection, base)
    kept = _kept_tensors(whole, strengths)
    with staged_folder(destination, overwrite=overwrite) as folder:
        entries = _write_weights(folder, kept)
        remote = any((source.path / MIRROR_MARKER).is_file() for source in (whole, base) if source)
        if hash or remote:  # a remote one may be gone tomorrow
            entries = with_digests(folder, entries)
        config = portable_config(whole, strengths)
        atomic_write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_companions(whole.path, folder, TOKENIZER_FILES)
        named = whole.settings.base_model_name_or_path or None
        text = card(
            destination.name,
            base=base.text if base else named,
            tuned=whole.text,
            selection=str(selection),
            body=_body(whole, addresses, strengths),
        )
        atomic_write(folder / "README.md", text)
        receipt = _receipt(folder, whole, base, selection, entries)
        whole.refuse_changed()
        receipt.write(folder)
    return receipt


def sliced_tensors(
    adapter: Adapter, keep: str | Selection, base: str | Path | Source | None = None
) -> Sliced:
    """What a slice holds: key -> the tensor as it is written, and its bytes."""
    adapter, _, strengths = _decided(adapter, Selection.parse(keep), base)
    return _kept_tensors(adapter, strengths)


def _decided(
    adapter: Adapter, selection: Selection, base: str | Path | Source | None
) -> tuple[Adapter, dict[str, Address], dict[str, float]]:
    """The adapter on its base; addresses and strengths of the weights that it changes, by name."""
    model_type, layers, config = architecture_of(adapter, base)
    adapter = adapter.of(model_type)
    checkpoint = None
    if base is not None and resolve(base, headers_only=True).form is Form.CHECKPOINT:
        checkpoint = open_checkpoint(base)
        named = StoredNames(checkpoint)
        adapter = adapter.of(model_type, named.shapes)
        _refuse_misfit(unstack(checkpoint, adapter), checkpoint, named)
    addresses = addresses_of(adapter, model_type, config)
    rows: dict[str, Parts] = {}
    strengths = kept_strengths(adapter, addresses, selection, layers, rows=rows)
    if rows:
        from taia.factor_rows import by_rows

        adapter = by_rows(adapter, addresses, rows, checkpoint)
    if not any(strengths[weight] for weight in adapter.modules):
        kinds = ", ".join(sorted({address.kind.value for address in addresses.values()}))
        raise MismatchError(
            f"{adapter.text}: '{selection}' keeps no {adapter.method} module of it; it changes "
            f"{kinds}. Nothing kept is the base model, without an adapter; whole tensors alone "
            "need --merge"
        )
    return adapter, addresses, strengths


def _refuse_misfit(adapter: Adapter, base: Checkpoint, named: StoredNames) -> None:
    """Raise MismatchError for an adapter whose weights do not have the shapes of the base's."""
    changed = {name: change.shape for name, change in adapter.modules.items()}
    changed |= {name: tensor.shape for name, tensor in adapter.whole.items()}
    places = {name: named.shapes(name) for name in changed}
    faults = [
        f"{name}: the base has {list(place)}, the adapter {list(changed[name])}"
        for name, place in places.items()
        if place is not None and place != changed[name]
    ]
    if not any(named.has(name) for name in changed):
        faults.append("the base stores none of the weights that the adapter changes")
    if faults:
        raise MismatchError(f"{adapter.text}: was made for another model than {base.text}", faults)


def _kept_tensors(adapter: Adapter, strengths: Mapping[str, float]) -> Sliced:
    """Key -> the tensor as it will be written and its bytes, for everything that is kept.

    LoRA factors are padded with zeros to the largest rank kept.
    """
    changes = [change for weight, change in adapter.modules.items() if strengths[weight] != 0]
    rank = _rank(changes)
    kept: Sliced = {}
    depths: dict[str, int] = {}  # PEFT nests the wrappers of a module's parameters
    for change in changes:
        strength = strengths[change.weight]
        if isinstance(change, StackedModule):  # told from the outermost wrapper inwards
            depth = depths[change.name] = depths.get(change.name, -1) + 1
            kept |= change.nested(adapter.path, strength, rank, depth)
        else:
            kept |= change.sliced(adapter.path, strength, rank)
    for name, tensor in adapter.whole.items():
        if strengths[name] != 0:
            kept[tensor.name] = stored(adapter.path, tensor)
    return kept


def _rank(changes: Iterable[Change]) -> int:
    ranked = (c for c in changes if isinstance(c, LoraModule | StackedModule | Experts))
    return max((change.rank for change in ranked), default=1)


def portable_config(adapter: Adapter, strengths: Mapping[str, float]) -> dict[str, Any]:
    """The configuration of the sliced adapter: only what is kept, no narrowing, no dropout.

    Of LoRA also alpha = rank and no patterns. LoHa and LoKr keep rank and alpha, from which
    PEFT derives the shapes of their factors; their strength is in the tensors.
    """
    changes = [change for weight, change in adapter.modules.items() if strengths[weight] != 0]
    whole = [name for name in adapter.whole if strengths[name] != 0]
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    dropouts = ("lora_dropout", "rank_dropout", "module_dropout", "expert_dropout")
    targets = _targets(adapter, changes)
    config = dict(adapter.config) | {
        "inference_mode": True,
        "modules_to_save": _modules_to_save(adapter, whole),
        "target_modules": targets,
    }
    config |= {key: None for key in narrowing if key in config}
    config |= {key: 0.0 for key in dropouts if key in config}
    for key in ("rank_pattern", "alpha_pattern"):  # PEFT warns of one that matches nothing
        patterns = config.get(key) or {}
        if patterns:
            config[key] = {p: value for p, value in patterns.items() if _matches(p, changes)}
    if adapter.settings.peft_type in ("LORA", "MOLORA"):
        config |= _lora_config(adapter, changes, whole)
    if not any(isinstance(change, Experts) for change in changes):
        config = _without_experts(config)
    if adapter.settings.peft_type == "IA3":  # PEFT wants these to be targets themselves
        inputs = {c.name for c in changes if isinstance(c, Ia3Vector) and c.inputs}
        config["feedforward_modules"] = [
            name for name in targets
            if any(module == name or module.endswith(f".{name}") for module in inputs)
        ]  # fmt: skip
    return config


def _without_experts(config: dict[str, Any]) -> dict[str, Any]:
    """A MoLoRA adapter of which no mixture is left is plain LoRA."""
    if config["peft_type"] != "MOLORA":
        return config
    own = ("experts", "experts_per_token", "expert_modules", "expert_dropout")
    return {key: value for key, value in config.items() if key not in own} | {"peft_type": "LORA"}


def _matches(pattern: str, changes: Iterable[Change]) -> bool:
    return any(matches(pattern, change.name) for change in changes)


def _lora_config(adapter: Adapter, changes: list[Change], whole: list[str]) -> dict[str, Any]:
    rank = _rank(changes)
    biases = any(name.endswith(".bias") for name in whole)
    rows = {c.name: list(c.tokens) for c in changes if isinstance(c, TokenRows)}
    return {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "bias": adapter.settings.bias if biases else "none",
        "lora_bias": any(isinstance(change, LoraBias) for change in changes),
        "use_dora": any(isinstance(c, LoraModule) and c.magnitude is not None for c in changes),
        "target_parameters": sorted(c.weight for c in changes if isinstance(c, StackedModule))
        or None,
        "trainable_token_indices": rows or None,
        "velora_config": None,
    }


def _targets(adapter: Adapter, changes: list[Change]) -> list[str]:
    """Names that PEFT resolves to the kept modules and to no others.

    Last parts of names (`q_proj`) where the adapter was made by them and every module of
    that name is kept; the whole names of the modules otherwise.
    """
    kept, every = (
        {change.name for change in some if not isinstance(change, StackedModule | TokenRows)}
        for some in (changes, adapter.modules.values())
    )
    shorts, lost = ({name.rpartition(".")[2] for name in n} for n in (kept, every - kept))
    before = adapter.settings.target_modules
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    plain = isinstance(before, list) and not any(adapter.config.get(key) for key in narrowing)
    if plain and shorts <= set(before or ()) and not shorts & lost:
        return sorted(shorts)
    return sorted(kept)


def _modules_to_save(adapter: Adapter, whole: list[str]) -> list[str] | None:
    """The whole names of kept modules, as PEFT takes every module that a short name ends."""
    if not adapter.settings.modules_to_save:
        return None
    saved = {
        name.rpartition(".")[0]
        for name in whole
        if any(f".{name}".rpartition(".")[0].endswith(m) for m in adapter.settings.modules_to_save)
    }
    return sorted(saved) or None


def _write_weights(folder: Path, kept: Sliced) -> list[Entry]:
    """Write the kept tensors; B is computed, so an entry names no byte range of its source."""
    header = header_of(tensor for tensor, _ in kept.values())
    entries, position = [], len(header)
    with (folder / WEIGHTS).open("wb") as target:
        target.write(header)
        for key, (tensor, raw) in kept.items():
            target.write(raw)
            stop = position + len(raw)
            entries.append(Entry(key, WEIGHTS, position, stop, Origin.TUNED.value, 1.0, WEIGHTS))
            position = stop
            assert tensor.bytes == len(raw)
    return entries


def _body(
    adapter: Adapter, addresses: Mapping[str, Address], strengths: Mapping[str, float]
) -> str:
    kept: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for name, address in addresses.items():
        count = kept if strengths[name] != 0 else dropped
        count[address.kind.value] = count.get(address.kind.value, 0) + 1
    rows = [
        f"| {kind} | {kept.get(kind, 0)} | {dropped.get(kind, 0)} |"
        for kind in sorted(kept.keys() | dropped.keys())
    ]
    head = ["| kind | modules kept | modules dropped |", "|---|---:|---:|"]
    note = f"A {adapter.method} adapter for PEFT; its strengths are part of the tensors."
    if adapter.settings.peft_type in ("LORA", "MOLORA"):
        note = "Scales are part of the weights: alpha equals the rank."
    return "\n".join([*head, *rows, "", note])


def _receipt(
    folder: Path,
    adapter: Adapter,
    base: str | Path | Source | None,
    selection: Selection,
    entries: list[Entry],
) -> Receipt:
    others = files_in(folder, (WEIGHTS, RECEIPT))
    named = adapter.settings.base_model_name_or_path
    if base is None and architecture_of(adapter).model_type is not None:
        base = named  # relative to where it was named; the receipt makes it absolute
    found = None if base is None else resolve(base, headers_only=True)
    return Receipt(
        form="adapter",
        selection=str(selection),
        base=None if found is None else record_of(found.text, found.path, _told_by(found)),
        tuned=record_of(adapter.text, adapter.path, [WEIGHTS, CONFIG]),
        tensors=entries,
        headers={WEIGHTS: header_digest(folder / WEIGHTS)},
        files={name: digest_of(folder / name) for name in others},
        algorithm=ALGORITHM,
    )


def _told_by(base: Source) -> list[str]:
    """The file of a base that says what it is, so that its absence and its change are seen."""
    return [BASE_CONFIG] if (base.path / BASE_CONFIG).is_file() else []
