"""What a splice would do: a selection resolved against two concrete models.

Data in: two checkpoints, or a checkpoint and an adapter, read by their headers, and a
selection. Data out: a frozen Plan, one Decision a tensor of the base, and every fault
that forbids carrying it out. Nothing is written here and no weight is read.

A tied output head is stored once, as the embedding, and has one strength: a selection
that would give the two different ones is a fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from taia.checkpoint import FLOATS, Checkpoint, Tensor, open_checkpoint
from taia.configs import config_notes
from taia.decisions import WHOLE, Decision, Origin, Plan
from taia.ends import is_buffer, left_over, text_config, tie_setting, unsettled, untie
from taia.errors import SourceError
from taia.folded import folded_faults
from taia.fused import Parts, cut_of, part_strengths
from taia.kinds import Address, Kind, classify_all
from taia.layouts import align
from taia.quantised import format_faults, is_quantised, is_text, module_faults
from taia.selection import Selection
from taia.sources import Form, Source, resolve
from taia.stored_names import StoredNames
from taia.ties import stated_tie

if TYPE_CHECKING:  # what reads adapters is loaded for adapters only
    from taia.adapter import Adapter

__all__ = ["Decision", "Origin", "Plan", "plan", "strengths_of"]


COMPUTED = 0.5
"""Any strength that is neither 0 nor 1: some of the values are computed."""

ENDS = (Kind.EMBEDDING, Kind.HEAD)
"""What has a row for every word of the vocabulary."""


def plan(
    base: str | Path | Source,
    tuned: str | Path | Source,
    keep: str | Selection = "attention",
    *,
    requantize: bool = False,
) -> Plan:
    """Decide, for every tensor of `base`, how much of the delta to `tuned` is kept.

    `tuned` is a checkpoint of the same architecture or a LoRA adapter. Two GGUF files are
    planned as they are stored; `requantize` lets their types differ. Raises a TaiaError for
    what cannot be read or parsed; contradictions between the two are `Plan.faults`.
    """
    selection = Selection.parse(keep)
    start, found = resolve(base, headers_only=True), resolve(tuned, headers_only=True)
    if start.form is found.form is Form.GGUF:
        from taia.gguf_plan import plan_gguf

        return plan_gguf(start, found, selection, requantize=requantize)
    if requantize:
        raise SourceError(f"{start.text} and {found.text}: --requantize is for two GGUF files")
    first = _open(start)
    if found.form is Form.ADAPTER:
        from taia.adapter import read_adapter
        from taia.unstack import unstack

        adapter = read_adapter(found).of(first.model_type, StoredNames(first).shapes)
        adapter = unstack(first, adapter)
        return _plan_merge(first, adapter, selection)
    return _plan_pair(first, _open(found), selection)


def _open(source: str | Path | Source) -> Checkpoint:
    """A checkpoint; one in a GGUF file is first unpacked into the cache, once."""
    found = resolve(source, headers_only=True)
    if found.form is not Form.GGUF:
        return open_checkpoint(found)
    from taia.load import materialise

    return dataclasses.replace(open_checkpoint(materialise(found)), text=found.text)


def _plan_pair(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> Plan:
    if base.model_type != tuned.model_type:
        return Plan(selection, base, tuned, (), (
            f"model types differ: base {base.model_type}, tuned {tuned.model_type}",
        ))  # fmt: skip
    faults = format_faults(base, tuned)
    base, tuned, crossed = align(base, tuned)
    base, tuned, notes, headless = untie(base, tuned)
    changed = bool(notes)
    tuned, told, missing = left_over(base, tuned)
    faults += crossed + headless + missing
    addresses = classify_all(base.tensors, base.model_type, base.config)
    strengths, parted, tie_faults = strengths_of(base, addresses, selection)
    wanted = {name: strengths.get(address) for name, address in addresses.items()}
    if is_quantised(base):
        faults += module_faults(base.tensors, wanted)
        faults += folded_faults(base, tuned, addresses, wanted)
    decisions = []
    for name, strength in wanted.items():
        tensor, other, address = base.tensors[name], tuned.tensors.get(name), addresses[name]
        if other is None or (strength != 1 and is_buffer(tensor)):
            # transformers does not load it, or it is one of the faults; no mask is half of two
            decisions.append(_decision(tensor, address, Origin.BASE, 0.0))
        elif strength is None:
            decision, found = _parted(base, tensor, address, parted[address])
            decisions.append(decision)
            faults += found + _tensor_faults(tensor, other, address, COMPUTED)
        else:
            origin = WHOLE.get(strength, Origin.BLEND)
            alike = tensor.shape == other.shape and tensor.dtype == other.dtype
            if origin is Origin.BLEND or not alike:
                faults += _tensor_faults(tensor, other, address, strength)
            stored = other if origin is Origin.TUNED else tensor
            decisions.append(_decision(stored, address, origin, strength))
    ends = [address for address in strengths if address.kind in ENDS]
    changed = changed or len({strengths[address] for address in ends}) > 1
    changed = changed or stated_tie(base.config) != stated_tie(tuned.config)
    if any(decision.source is not Origin.TUNED for decision in decisions):
        told += config_notes(base, tuned)
    untied = changed and has_head(addresses.values())
    faults += unsettled(base, tuned, addresses, wanted) if untied else []
    return Plan(
        selection, base, tuned, tuple(decisions), tuple(faults + tie_faults),
        notes=tuple(notes + told), config=tie_setting(tuned, untied=untied),
    )  # fmt: skip


def _plan_merge(base: Checkpoint, adapter: Adapter, selection: Selection) -> Plan:
    """Tensors that the adapter does not touch are the base's at any strength."""
    from taia.experts import NO_DELTA, Experts
    from taia.vectors import TokenRows

    addresses = classify_all(base.tensors, base.model_type, base.config)
    strengths, parted, tie_faults = strengths_of(base, addresses, selection)
    named = StoredNames(base)
    lora = {named(m.weight): m for m in adapter.modules.values()}
    whole = {named(name): tensor for name, tensor in adapter.whole.items()}
    faults = [_unplaced(name, named) for name in [*lora, *whole] if name not in base.tensors]
    decisions = []
    for name, address in addresses.items():
        tensor, strength = base.tensors[name], strengths.get(address, 0.0)
        if address in parted and (name in lora or name in whole):
            decision, found = _parted(base, tensor, address, parted[address])
            decisions.append(decision)
            shape = lora[name].shape if name in lora else whole[name].shape
            faults += found + _merge_faults(base, tensor, shape, address, tied=False)
            continue
        origin = Origin.BASE
        if name in lora or name in whole:
            shape = lora[name].shape if name in lora else whole[name].shape
            if strength != 0 or (shape != tensor.shape and address.kind in ENDS):
                tied = not isinstance(lora.get(name), TokenRows)  # those change both ends
                tied = tied and _is_tied(base, tensor, addresses.values())
                faults += _merge_faults(base, tensor, shape, address, tied=tied)
        if strength != 0 and isinstance(lora.get(name), Experts):
            faults.append(f"{name}: {NO_DELTA}")
        if strength != 0 and (name in lora or name in whole):
            exact = name in whole and strength == 1 and whole[name].dtype == tensor.dtype
            origin = Origin.TUNED if exact else Origin.BLEND
        decisions.append(_decision(tensor, address, origin, strength))
    kept = any(decision.source is not Origin.BASE for decision in decisions)
    if (parted or any(strengths.values())) and not kept and not faults:
        kinds = sorted({addresses[name].kind.value for name in [*lora, *whole]})
        faults.append(
            f"nothing of the adapter is kept: it changes {', '.join(kinds)}, the selection "
            f"'{selection}' names other parts, and the result would be the base model"
        )
    return Plan(selection, base, adapter, tuple(decisions), tuple(faults + tie_faults))


def _unplaced(name: str, named: StoredNames) -> str:
    """The fault of a changed weight that the base does not store."""
    if name.rpartition(".")[0].endswith(("lm_head", "embed_out")):
        return f"{name}: the base's head is tied to its embedding; untie it before merging"
    if name.endswith(".bias"):
        return f"{name}: changed by the adapter, and the base has no such bias; slice or attach it"
    return f"{name}: changed by the adapter, {named.refusal(name)}"


def _is_tied(base: Checkpoint, tensor: Tensor, addresses: Collection[Address]) -> bool:
    """Whether `tensor` is the token embedding of a base that stores no head of its own."""
    words = base.config.get("vocab_size", text_config(base.config).get("vocab_size", 0))
    return not has_head(addresses) and tensor.shape[:1] == (words,)


def has_head(addresses: Iterable[Address]) -> bool:
    """Whether an output head of the language model is stored."""
    return any(a.kind is Kind.HEAD and a.tower == "language" for a in addresses)


def strengths_of(
    base: Checkpoint, addresses: Mapping[str, Address], selection: Selection
) -> tuple[dict[Address, float], dict[Address, Parts], list[str]]:
    """Strengths as `part_strengths` gives them, and the fault of a tied head with two.

    A head that is not stored is tied to the embedding, and takes part under its own name.
    """
    there = list(dict.fromkeys(addresses.values()))
    embedding = next((a for a in there if a.kind is Kind.EMBEDDING and a.tower == "language"), None)
    tied = not has_head(there)
    if embedding is None or not tied:
        return (*part_strengths(selection, there), [])
    head = dataclasses.replace(embedding, kind=Kind.HEAD)
    strengths, parted = part_strengths(selection, [*there, head])
    if strengths[head] == strengths[embedding]:
        return strengths, parted, []
    fault = (
        f"{base.text}: the output head is tied to the embedding, one tensor for both, and the "
        "selection gives it two strengths; name both alike, as in 'all - embedding - head'"
    )
    return strengths, parted, [fault]


def _parted(
    base: Checkpoint, tensor: Tensor, address: Address, parts: Parts
) -> tuple[Decision, list[str]]:
    """The decision on a fused tensor whose parts have different strengths, and its faults."""
    strengths = dict(parts)
    cut = cut_of(tensor.name, tensor.shape, address, base.model_type, base.config)
    faults = []
    if cut is None:
        mean = sum(strengths.values()) / len(strengths)
        asked = ", ".join(f"{name} at {strength:g}" for name, strength in parts)
        faults.append(
            f"{tensor.name}: {asked}; which of its rows are whose is not known for "
            f"{base.model_type} with this config. Keep it as one, "
            f"as in '{address.kind}.{address.projection}'"
        )
    else:
        mean = cut.mean(strengths)
    decision = _decision(tensor, address, Origin.BLEND, mean)
    return dataclasses.replace(decision, cut=cut, parts=parts), faults


def _tensor_faults(base: Tensor, tuned: Tensor, address: Address, strength: float) -> list[str]:
    """What forbids to take `strength` of a delta between tensors that are not alike."""
    faults = []
    resized = address.kind in ENDS and base.shape[1:] == tuned.shape[1:]
    allowed = (resized and strength == 1) or (is_text(base.name) and strength in (0, 1))
    if base.shape != tuned.shape and not allowed:
        faults.append(
            f"{base.name}: shapes differ: base {list(base.shape)}, tuned {list(tuned.shape)}"
        )
        if resized:
            faults[-1] += (
                "; the vocabulary was resized, and its new rows have no base. Keep all of it, as "
                "in 'attention + embedding + head', or resize the base's alike"
            )
    if base.dtype != tuned.dtype:
        faults.append(
            f"{base.name}: dtypes differ: base {base.dtype}, tuned {tuned.dtype}; "
            "save both in one dtype"
        )
    elif strength not in (0, 1) and base.dtype not in FLOATS:
        faults.append(f"{base.name}: dtype {base.dtype} is taken whole, not at {strength:g}")
    return faults


def _merge_faults(
    base: Checkpoint, tensor: Tensor, shape: tuple[int, ...], address: Address, *, tied: bool
) -> list[str]:
    faults = []
    if shape != tensor.shape:
        faults.append(
            f"{tensor.name}: shapes differ: base {list(tensor.shape)}, adapter {list(shape)}"
        )
    if tensor.dtype not in FLOATS or base.config.get("quantization_config"):
        faults.append(
            f"{tensor.name}: a delta cannot be added to quantised weights, dtype {tensor.dtype}"
        )
    if address.kind is Kind.EMBEDDING and tied:
        faults.append(
            f"{tensor.name}: input and output share this tensor, the adapter changes one of them; "
            "untie them before merging"
        )
    return faults


def _decision(tensor: Tensor, address: Address, origin: Origin, strength: float) -> Decision:
    return Decision(tensor.name, address, origin, strength, tensor.bytes, tensor.parameters)
