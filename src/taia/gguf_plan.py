"""What a splice of two GGUF files would do: a plan, as of two checkpoints.

Two models give a model: whole blocks of one or the other, type by type as they are stored.
A model and a LoRA adapter give a smaller adapter: of every kept pair, A is copied and B is
multiplied by the strength (llama.cpp adds alpha / rank * B A).

A tensor that base and tuned store in different types, and a blend of quantised tensors, are
faults, unless `requantize` allows unpacking and packing where the gguf library can do both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from taia.checkpoint import FLOATS, Tensor
from taia.configs import settings_note
from taia.errors import SourceError
from taia.gguf_header import GgufFile, open_gguf
from taia.gguf_kinds import classify_gguf
from taia.kinds import Address
from taia.plan import ENDS, Decision, Origin, Plan, strengths_of
from taia.selection import Selection
from taia.sources import Source

__all__ = ["plan_gguf"]

SHAPING = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "expert_count", "expert_used_count", "ssm.state_size", "ssm.inner_size",
)  # fmt: skip
"""Fields of an architecture that say how the numbers of a tensor are read. The others (RoPE, the
epsilon of norms, windows) say what is computed with them, and differing is noted."""

TOKENS = "tokenizer.ggml.tokens"
SIDES = (".lora_a", ".lora_b")


def plan_gguf(
    base: Source, tuned: Source, selection: Selection, *, requantize: bool = False
) -> Plan:
    """Decide, for every tensor, where its blocks come from. Contradictions are `Plan.faults`.

    Raises a TaiaError for what cannot be read.
    """
    first, second = open_gguf(base), open_gguf(tuned)
    if first.is_adapter:
        raise SourceError(f"{first.text}: a LoRA adapter; the base is a model")
    faults = _architecture_faults(first, second)
    if faults:
        return Plan(selection, first, second, (), tuple(faults))
    if second.is_adapter:
        return _plan_adapter(first, second, selection)
    return _plan_models(first, second, selection, requantize)


def _architecture_faults(base: GgufFile, tuned: GgufFile) -> list[str]:
    one, other = base.model_type, tuned.model_type
    return [] if one == other else [f"architectures differ: base {one}, tuned {other}"]


def addresses_of(model: GgufFile) -> dict[str, Address]:
    """The address of every tensor of a model, layers behind the last one as `other`."""
    config, name = model.config, model.model_type
    blocks, extra = config.get(f"{name}.block_count"), config.get(f"{name}.nextn_predict_layers")
    layers = blocks - extra if isinstance(blocks, int) and isinstance(extra, int) else None
    return classify_gguf(model.tensors, name, layers=layers)


def _plan_models(base: GgufFile, tuned: GgufFile, selection: Selection, requantize: bool) -> Plan:
    addresses = addresses_of(base)
    strengths, parted, faults = strengths_of(base, addresses, selection)
    faults += [
        f"{name}: holds several projections in one tensor, which '{selection}' gives different "
        "strengths; in a GGUF file it is kept whole or not"
        for name, address in addresses.items()
        if address in parted
    ]
    faults += _field_faults(base, tuned) + _name_faults(base, tuned)
    faults += _vocabulary_faults(base, tuned, addresses, strengths)
    decisions, mixes = [], _Mixes(requantize)
    for name, tensor in ((name, base.tensors[name]) for name in tuned.tensors if name in addresses):
        address, other = addresses[name], tuned.tensors[name]
        strength = strengths.get(address, 0.0)
        if tensor.shape != other.shape:
            shapes = f"base {list(tensor.shape)}, tuned {list(other.shape)}"
            faults.append(f"{name}: shapes differ: {shapes}")
        same = tensor.dtype == other.dtype
        origin = Origin.BLEND
        if strength == 0:
            origin = Origin.BASE
        elif strength == 1 and same:
            origin = Origin.TUNED
        elif not same or tensor.dtype not in FLOATS:
            mixes.add(tensor, other, strength)
        decisions.append(Decision(name, address, origin, strength, tensor.bytes, tensor.parameters))
    mixed = any(decision.source is not Origin.TUNED for decision in decisions)
    notes = _setting_notes(base, tuned) if mixed else []
    faults += mixes.faults()
    return Plan(selection, base, tuned, tuple(decisions), tuple(faults), notes=tuple(notes))


def _setting_notes(base: GgufFile, tuned: GgufFile) -> list[str]:
    """A note on the fields of the architecture that differ, or that one file does not state.

    One that is not stated has a value in llama.cpp, and a scaling of RoPE is often in one only.
    """
    name = base.model_type
    elsewhere = {f"{name}.{key}" for key in (*SHAPING, "vocab_size")}
    keys = [key for key in dict.fromkeys([*base.fields, *tuned.fields])
            if key.startswith(f"{name}.") and key not in elsewhere]  # fmt: skip
    return settings_note(
        "the fields of base and tuned differ",
        [(k, _shown(base, k), _shown(tuned, k)) for k in keys if not _alike(base, tuned, k)],
    )


def _alike(base: GgufFile, tuned: GgufFile, key: str) -> bool:
    old, new = base.config.get(key), tuned.config.get(key)
    return (old is not None and old == new) or base.digest(key) == tuned.digest(key)


def _shown(model: GgufFile, key: str) -> str:
    if key not in model.fields:
        return "not stated"
    value = model.config.get(key, "a list")
    return f"{value:g}" if isinstance(value, float) else f"{value!s:.60}"


def _field_faults(base: GgufFile, tuned: GgufFile) -> list[str]:
    """Fields that say how tensors are read, and differ."""
    keys = [f"{base.model_type}.{key}" for key in SHAPING]
    if any(tensor.dtype not in FLOATS for tensor in base.tensors.values()):
        keys.append("general.quantization_version")
    return [
        f"{key} differs: base {base.config.get(key)}, tuned {tuned.config.get(key)}"
        for key in keys
        if base.digest(key) != tuned.digest(key)
    ]


def _name_faults(base: GgufFile, tuned: GgufFile) -> list[str]:
    faults = [f"{name}: in the base, not in the tuned model"
              for name in base.tensors if name not in tuned.tensors]  # fmt: skip
    return faults + [
        f"{name}: in the tuned model, not in the base"
        for name in tuned.tensors
        if name not in base.tensors
    ]


def _vocabulary_faults(
    base: GgufFile,
    tuned: GgufFile,
    addresses: Mapping[str, Address],
    strengths: Mapping[Address, float],
) -> list[str]:
    """Rows of the base under the words of the tuned model."""
    taken = [
        strengths.get(a, 0.0)
        for a in addresses.values()
        if a.kind in ENDS and a.tower == "language"
    ]
    if all(strength == 1 for strength in taken) or base.digest(TOKENS) == tuned.digest(TOKENS):
        return []
    return [
        f"the vocabularies differ ({TOKENS}), and the selection takes rows of the base for the "
        "tuned model's words; keep them too, with '+ embedding + head'"
    ]


@dataclass(frozen=True, slots=True)
class _Mix:
    base: str
    tuned: str
    whole: bool


class _Mixes:
    """What would have to be unpacked and packed again, told type by type, not 300 times."""

    def __init__(self, requantize: bool) -> None:
        self.requantize = requantize
        self.found: dict[_Mix, list[str]] = {}

    def add(self, base: Tensor, tuned: Tensor, strength: float) -> None:
        mix = _Mix(base.dtype, tuned.dtype, strength == 1)
        self.found.setdefault(mix, []).append(base.name)

    def faults(self) -> list[str]:
        return [fault for mix, names in self.found.items() if (fault := self._fault(mix, names))]

    def _fault(self, mix: _Mix, names: list[str]) -> str:
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        types = f"base {mix.base}, tuned {mix.tuned}"
        what = f"types differ: {types}" if mix.base != mix.tuned else f"{mix.base} is to be blended"
        if not self.requantize:
            return (
                f"{which}: {what}; bring both files to one type that fits, or let --requantize "
                "unpack and pack again, which rounds once more"
            )
        from taia.gguf_quants import can_pack, can_unpack

        read = [mix.tuned] if mix.whole else [mix.tuned, mix.base]
        unread = [name for name in read if not can_unpack(name)]
        if unread:
            return f"{which}: {what}, and the gguf library does not unpack {unread[0]}"
        if not can_pack(mix.base):
            return (
                f"{which}: {what}, and the gguf library does not pack {mix.base}; quantise both "
                "models alike with llama.cpp's llama-quantize"
            )
        return ""


def _plan_adapter(base: GgufFile, adapter: GgufFile, selection: Selection) -> Plan:
    faults = _adapter_faults(base, adapter)
    addresses = addresses_of(base)
    strengths = selection.strengths(list(dict.fromkeys(addresses.values())))
    decisions = []
    for name, tensor in adapter.tensors.items():
        target = _target(name)
        if target not in addresses:
            continue
        strength = strengths[addresses[target]]
        if strength == 0:
            continue
        origin = Origin.TUNED
        if strength != 1 and not name.endswith(SIDES[0]):
            origin = Origin.BLEND
            if not name.endswith(SIDES[1]):
                faults.append(f"{name}: a whole tensor is kept whole or not, not at {strength:g}")
            elif tensor.dtype not in FLOATS:
                faults.append(f"{name}: {tensor.dtype} is taken whole, not at {strength:g}")
        decisions.append(
            Decision(name, addresses[target], origin, strength, tensor.bytes, tensor.parameters)
        )
    if not decisions and not faults:
        kinds = sorted({addresses[_target(name)].kind.value for name in adapter.tensors})
        faults.append(
            f"nothing of the adapter is kept: it changes {', '.join(kinds) or 'nothing'}, and the "
            f"selection '{selection}' names other parts"
        )
    return Plan(selection, base, adapter, tuple(decisions), tuple(faults))


def _target(name: str) -> str:
    """The tensor of the base that an adapter's tensor changes."""
    return name[: -len(SIDES[0])] if name.endswith(SIDES) else name


def _adapter_faults(base: GgufFile, adapter: GgufFile) -> list[str]:
    """What llama.cpp refuses on loading, and what it would ignore."""
    faults = []
    kind = adapter.config.get("adapter.type")
    if kind != "lora":
        faults.append(f"adapter.type is {kind!r}, taia knows 'lora'")
    if not isinstance(adapter.config.get("adapter.lora.alpha"), float):
        faults.append("adapter.lora.alpha is missing")
    for name in adapter.tensors:
        if _target(name) not in base.tensors:
            faults.append(f"{name}: changed by the adapter, not stored in the base")
    targets = dict.fromkeys(_target(name) for name in adapter.tensors if name.endswith(SIDES))
    return faults + list(_pair_faults(base, adapter, [t for t in targets if t in base.tensors]))


def _pair_faults(base: GgufFile, adapter: GgufFile, targets: Iterable[str]) -> Iterable[str]:
    """A is (rank, in) and B is (out, rank).

    Of an embedding A is (words, rank), as llama.cpp looks its rows up, and B is (width, rank).
    """
    for target in targets:
        a, b = (adapter.tensors.get(target + side) for side in SIDES)
        if a is None or b is None:
            yield f"{target}: only one of {SIDES[0]} and {SIDES[1]}"
            continue
        shape = base.tensors[target].shape
        out, into = shape[-2:] if len(shape) > 1 else (0, 0)
        across = a.shape
        if target == "token_embd.weight":
            out, into, across = into, out, a.shape[::-1]
        if len(a.shape) < 2 or (across[-1], b.shape[-2:]) != (into, (out, across[-2])):
            shapes = f"A {list(a.shape)}, B {list(b.shape)}"
            yield f"{target}: {shapes} do not fit the base's {list(shape)}"
