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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from taia.adapter import (
    WEIGHTS,
    Adapter,
    addresses_of,
    architecture_of,
    kept_strengths,
    read_adapter,
)
from taia.card import card
from taia.checkpoint import Checkpoint, Tensor, open_checkpoint
from taia.errors import MismatchError
from taia.files import atomic_write, refuse_existing, refuse_overlap, staged_folder
from taia.kinds import Address
from taia.lora import LoraModule
from taia.plan import Origin, stored_name
from taia.receipt import RECEIPT, Entry, Receipt, digest_of
from taia.selection import Selection
from taia.sources import Form, Source, resolve
from taia.writing import (
    TOKENIZER_FILES,
    copy_companions,
    header_digest,
    header_of,
    record_of,
    tensor_digest,
)

__all__ = ["portable_config", "slice_adapter", "sliced_tensors"]

CONFIG = "adapter_config.json"


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
    refuse_existing(destination, overwrite=overwrite)
    whole = read_adapter(adapter)
    refuse_overlap(destination, whole.path, *([resolve(base).path] if base else []))
    addresses, strengths = _decided(whole, selection, base)
    kept = _kept_tensors(whole, strengths)
    with staged_folder(destination, overwrite=overwrite) as folder:
        entries = _write_weights(folder, kept)
        if hash:
            entries = [replace(entry, digest=tensor_digest(folder, entry)) for entry in entries]
        config = portable_config(whole, strengths)
        atomic_write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_companions(whole.path, folder, TOKENIZER_FILES)
        named = whole.settings.base_model_name_or_path or None
        text = card(
            destination.name,
            base=resolve(base).text if base else named,
            tuned=whole.text,
            selection=str(selection),
            body=_body(addresses, strengths),
        )
        atomic_write(folder / "README.md", text)
        receipt = _receipt(folder, whole, base, selection, entries)
        receipt.write(folder)
    return receipt


def sliced_tensors(
    adapter: Adapter, keep: str | Selection, base: str | Path | Source | None = None
) -> dict[str, tuple[Tensor, bytes]]:
    """What a slice holds: key -> the tensor as it is written, and its bytes."""
    _, strengths = _decided(adapter, Selection.parse(keep), base)
    return _kept_tensors(adapter, strengths)


def _decided(
    adapter: Adapter, selection: Selection, base: str | Path | Source | None
) -> tuple[dict[str, Address], dict[str, float]]:
    """Addresses and strengths of the weights that the adapter changes, by name."""
    model_type, layers = architecture_of(adapter, base)
    if base is not None and resolve(base).form is Form.CHECKPOINT:
        _refuse_misfit(adapter.of(model_type), open_checkpoint(base))
    addresses = addresses_of(adapter, model_type)
    strengths = kept_strengths(adapter, addresses, selection, layers)
    if not any(strengths[module.weight] for module in adapter.modules.values()):
        kinds = ", ".join(sorted({address.kind.value for address in addresses.values()}))
        raise MismatchError(
            f"{adapter.text}: '{selection}' keeps no LoRA module of it; it changes {kinds}. "
            "Nothing kept is the base model, without an adapter; whole tensors alone need --merge"
        )
    return addresses, strengths


def _refuse_misfit(adapter: Adapter, base: Checkpoint) -> None:
    """Raise MismatchError for an adapter whose weights do not have the shapes of the base's."""
    changed: dict[str, tuple[int, ...]] = {
        module.weight: module.shape for module in adapter.modules.values()
    }
    changed |= {name: tensor.shape for name, tensor in adapter.whole.items()}
    places = {name: base.tensors.get(stored_name(base, name)) for name in changed}
    faults = [
        f"{name}: the base has {list(place.shape)}, the adapter {list(changed[name])}"
        for name, place in places.items()
        if place is not None and place.shape != changed[name]
    ]
    if not any(places.values()):
        faults.append("the base stores none of the weights that the adapter changes")
    if faults:
        raise MismatchError(f"{adapter.text}: was made for another model than {base.text}", faults)


def _kept_tensors(
    adapter: Adapter, strengths: Mapping[str, float]
) -> dict[str, tuple[Tensor, bytes]]:
    """Key -> the tensor as it will be written and its bytes, for everything that is kept.

    A is padded with zero rows and B with zero columns to the largest rank kept.
    """
    import numpy as np

    from taia.arrays import encode

    modules = [m for m in adapter.modules.values() if strengths[m.weight] != 0]
    rank = max((module.rank for module in modules), default=0)
    kept: dict[str, tuple[Tensor, bytes]] = {}
    for module in modules:
        a, b = adapter.factors(module)
        missing = rank - module.rank
        scaled = b * b.dtype.type(module.scale * strengths[module.weight])
        for tensor, values in (
            (module.a, np.pad(a, ((0, missing), (0, 0)))),
            (module.b, np.pad(scaled, ((0, 0), (0, missing)))),
        ):
            raw = encode(values, tensor.dtype)
            kept[tensor.name] = (
                Tensor(tensor.name, tensor.dtype, values.shape, WEIGHTS, 0, len(raw)),
                raw,
            )
        if module.magnitude is not None:
            kept[module.magnitude.name] = _as_stored(adapter, module.magnitude)
    for name, tensor in adapter.whole.items():
        if strengths[name] != 0:
            kept[tensor.name] = _as_stored(adapter, tensor)
    return kept


def portable_config(adapter: Adapter, strengths: Mapping[str, float]) -> dict[str, Any]:
    """The configuration of the sliced adapter: alpha = rank, no patterns, only what is kept."""
    modules = [m for m in adapter.modules.values() if strengths[m.weight] != 0]
    rank = max((module.rank for module in modules), default=1)
    whole = [name for name in adapter.whole if strengths[name] != 0]
    biases = [name for name in whole if name.endswith(".bias")]
    targets = _targets(adapter, modules)
    return dict(adapter.config) | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "bias": adapter.settings.bias if biases else "none",
        "modules_to_save": _modules_to_save(adapter, whole),
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _targets(adapter: Adapter, modules: list[LoraModule]) -> list[str]:
    """Names that PEFT resolves to the kept modules and to no others.

    Last parts of names (`q_proj`) where the adapter was made by them and every module of
    that name is kept; the whole names of the modules otherwise.
    """
    kept = {module.name for module in modules}
    shorts = {name.rpartition(".")[2] for name in kept}
    lost = {name.rpartition(".")[2] for name in adapter.modules if name not in kept}
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


def _as_stored(adapter: Adapter, tensor: Tensor) -> tuple[Tensor, bytes]:
    with (adapter.path / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        return tensor, file.read(tensor.bytes)


def _write_weights(folder: Path, kept: Mapping[str, tuple[Tensor, bytes]]) -> list[Entry]:
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


def _body(addresses: Mapping[str, Address], strengths: Mapping[str, float]) -> str:
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
    note = "Scales are part of the weights: alpha equals the rank."
    return "\n".join([*head, *rows, "", note])


def _receipt(
    folder: Path,
    adapter: Adapter,
    base: str | Path | Source | None,
    selection: Selection,
    entries: list[Entry],
) -> Receipt:
    others = [f.name for f in sorted(folder.iterdir()) if f.name not in (WEIGHTS, RECEIPT)]
    named = adapter.settings.base_model_name_or_path
    if base is None and architecture_of(adapter) != (None, None):
        base = named  # relative to where it was named; the receipt makes it absolute
    found = None if base is None else resolve(base)
    return Receipt(
        form="adapter",
        selection=str(selection),
        base=None if found is None else record_of(found.text, found.path, []),
        tuned=record_of(adapter.text, adapter.path, [WEIGHTS, CONFIG]),
        tensors=entries,
        headers={WEIGHTS: header_digest(folder / WEIGHTS)},
        files={name: digest_of(folder / name) for name in others},
    )
