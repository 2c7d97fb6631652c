"""Checkpoints whose weights are quantised on disk, and what may be done with two of them.

A quantiser stores several tensors for one weight: packed integers, scales, zero points, an
order of columns. They mean something together only, so the tensors of one module are taken
from one side, whole: strength 0 or 1. Base and tuned must be quantised alike, as integers of
one format under scales of another are noise.

Known by their names on disk: bitsandbytes (4 and 8 bit), GPTQ, AWQ, block-wise and per-tensor
FP8, compressed-tensors, MXFP4. The names are those that the quantisers of transformers read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from taia.checkpoint import Checkpoint, Tensor

__all__ = ["format_faults", "is_quantised", "is_text", "module_faults", "modules", "settings_of"]

COMPANION = re.compile(
    r"^(?P<module>.+?)(?:"
    r"\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)"
    r"|\.(?:SCB|weight_format)"  # bitsandbytes
    r"|\.(?:qweight|qzeros|scales|g_idx)"  # GPTQ, AWQ
    r"|\.weight_(?:scale_inv|scale_2|scale|packed|shape|zero_point|g_idx|global_scale)"
    r"|\.(?:input|output)_(?:scale|zero_point|global_scale)|\.activation_scale"
    r"|(?P<parameter>_proj)_(?:blocks|scales|scale_inv|scale)"  # one parameter for all experts
    r")$"
)
"""A tensor that stands beside a quantised weight, or in its place."""

STATE = re.compile(r"\.quant_state\.\w+$")
"""Settings of one weight as JSON text, whose length says nothing."""

ENDINGS = ("absmax", "SCB", "qweight", "weight_scale_inv", "weight_scale", "weight_packed",
           "_blocks", "_proj_scale_inv")  # fmt: skip
"""How at least one tensor of every quantised checkpoint ends."""

MEND = (
    "save both in one format: unquantised (from_pretrained, dequantize(), save_pretrained), "
    "or quantised with the same settings"
)
PASSING = ("modules_to_not_convert", "ignore")
"""Settings that are lists of names, whose order says nothing."""


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The quantisation settings of a config, comparable; empty for an unquantised model.

    One that is null says what one that is not there says.
    """
    text = checkpoint.config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    found = checkpoint.config.get("quantization_config") or nested
    if not isinstance(found, dict):
        return {}
    settings = {key: value for key, value in found.items()
                if value is not None and not key.startswith("_")}  # fmt: skip
    for key in PASSING:
        if isinstance(settings.get(key), list):
            settings[key] = sorted(map(str, settings[key]))
    return settings


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether the config says so, or tensors stand there that only a quantiser stores."""
    if settings_of(checkpoint):
        return True
    return any(name.endswith(ENDINGS) for name in checkpoint.tensors)


def modules(names: Iterable[str]) -> dict[str, str]:
    """Stored name -> quantised module, for every tensor of a module with companions."""
    stems: dict[str, str] = {}
    listed = list(names)
    for name in listed:
        match = None if name.endswith(".weight") else COMPANION.match(name)
        if match is not None:
            stems[name] = match["module"] + (match["parameter"] or "")
    held = set(stems.values())
    for name in listed:
        stem = name.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias")
        if name not in stems and stem in held:
            stems[name] = stem
    return stems


def is_text(name: str) -> bool:
    """Whether a tensor is text, so that its length may differ between base and tuned."""
    return STATE.search(name) is not None


def format_faults(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Why weights of the two cannot stand in one checkpoint; nothing if they can."""
    both = is_quantised(base), is_quantised(tuned)
    ours, theirs = settings_of(base), settings_of(tuned)
    if both[0] != both[1]:
        which, other = ("base", "tuned model") if both[0] else ("tuned model", "base")
        method = _method(ours or theirs)
        return [f"the {which} is quantised ({method}), the {other} is not; {MEND}"]
    if not both[0] or ours == theirs:
        return []
    if _method(ours) != _method(theirs):
        return [f"quantised differently: base {_method(ours)}, tuned {_method(theirs)}; {MEND}"]
    different = sorted(
        key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
    )
    told = ", ".join(f"{key} {ours.get(key)!r} and {theirs.get(key)!r}" for key in different)
    return [f"both quantised with {_method(ours)}, with different settings: {told}; {MEND}"]


def _method(settings: Mapping[str, Any]) -> str:
    return str(settings.get("quant_method") or settings.get("quant_algo") or "by its tensors")


def module_faults(base: Mapping[str, Tensor], strengths: Mapping[str, float | None]) -> list[str]:
    """What a selection would tear apart: a module must have one strength, 0 or 1.

    strengths: by stored name; None where rows of one tensor have different ones.
    """
    wanted: dict[str, float | None] = {}
    faults: dict[str, str] = {}
    for name, module in modules(base).items():
        strength = strengths[name]
        if wanted.setdefault(module, strength) != strength or strength is None:
            faults[module] = (
                "its quantised tensors are taken together, and the selection tells them apart"
            )
        elif strength not in (0, 1):
            faults[module] = f"quantised weights are taken whole, not at {strength:g}"
    return [f"{module}: {fault}" for module, fault in faults.items()]
