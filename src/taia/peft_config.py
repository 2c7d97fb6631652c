"""What adapter_config.json may say: every setting read, known to be inert, or refused by name.

PEFT writes all its settings into every adapter, so a setting that nobody reads is a delta
that may silently be another one. Here each field of PEFT's LoRA, LoHa, LoKr and IA3
configurations stands in a table; what stands in none and is set is refused. The reference is
PEFT 0.21.2; a test compares the tables with the fields of the installed one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import regex

from taia.errors import CheckpointError, SourceError

__all__ = [
    "INERT",
    "METHODS",
    "OTHER_METHODS",
    "READ",
    "REFUSED",
    "Settings",
    "matches",
    "read_settings",
]

MATCHING_SECONDS = 1.0
"""What one pattern of an adapter may take, on all names that it is slow on."""

SLOW_SECONDS = 0.01
"""A match that takes longer counts; an honest one takes some microseconds."""

_slow: dict[str, float] = {}

MOST_PATTERNS = 100
"""Patterns of an adapter that are no plain names."""

MAX_COUNT = 1_000_000
"""The largest rank, and the most experts: no weight has so many, and a float holds them."""

METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "IA3", "MOLORA": "MoLoRA"}
"""The methods whose deltas are computed here, and how they are written."""

READ = {
    "LORA": {
        "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha",
        "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules",
        "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
    },
    "LOHA": {"alpha", "alpha_pattern", "modules_to_save", "r", "rank_pattern", "target_modules"},
    "LOKR": {"alpha", "alpha_pattern", "modules_to_save", "r", "rank_pattern", "target_modules"},
    "IA3": {"fan_in_fan_out", "feedforward_modules", "modules_to_save", "target_modules"},
}  # fmt: skip
READ["MOLORA"] = READ["LORA"] - {"lora_bias", "use_dora"} | {
    "experts", "experts_per_token", "expert_modules",
}  # fmt: skip
"""Settings by method that say what the delta is, or where."""

INERT = {
    # the base of every configuration
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type",
    # which modules were trained: the names in the file say it
    "exclude_modules", "layers_pattern", "layers_to_transform",
    # training only
    "expert_dropout", "lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout",
    "runtime_config", "velora_config",
    # how the factors began; the ways that also change the base are refused by init_lora_weights
    "corda_config", "eva_config", "init_ia3_weights", "init_weights", "loftq_config",
    "lora_ga_config",
    # of a setting that is refused itself
    "megatron_core", "qalora_group_size",
    # the shapes in the file say it; convolutions are refused
    "decompose_both", "decompose_factor", "use_effective_conv2d",
}  # fmt: skip
"""Settings that do not change the delta of the tensors in the file."""

REFUSED = {
    "alora_invocation_tokens": "it acts only after certain tokens, which no weight can hold",
    "arrow_config": "a router chooses among adapters for every token",
    "ensure_weight_tying": "one delta is meant for the embedding and for the head",
    "kasa_config": "it also cut the smallest singular values off the base weights",
    "layer_replication": "it builds a deeper model, whose layers the base does not have",
    "megatron_config": "it was trained on Megatron's own layers",
    "monteclora_config": "its factors are drawn at random",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it acts on pooled inputs, beside a quantised weight",
}
"""Settings of LoRA under which the stored factors are not the delta, and why."""

MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights; PEFT can convert them when saving."""

_PROMPT = "it adds to the input or to the cache and changes no weight: there is nothing to splice"
_TURN = "it turns or reflects the base weights, and is no sum of base and delta"
_SHARED = "its deltas are made from tensors that all layers share, or from a seed"
_ROUTED = "a router mixes several adapters for every token"
_OTHER = "its delta has a form that is not read here"
OTHER_METHODS = {
    **dict.fromkeys(
        ("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING",
         "PREFIX_TUNING", "PROMPT_TUNING"), _PROMPT),
    **dict.fromkeys(("BOFT", "HRA", "OFT", "PSOFT", "ROAD"), _TURN),
    **dict.fromkeys(
        ("FROD", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA"), _SHARED),
    **dict.fromkeys(("POLY", "XLORA"), _ROUTED),
    **dict.fromkeys(
        ("ADALORA", "ADAMSS", "BEFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA",
         "HIRA", "LILY", "LN_TUNING", "MISS", "OSF", "PEANUT", "SHADOW", "SHIRA", "SUPERTUNING",
         "TRAINABLE_TOKENS", "WAVEFT"), _OTHER),
}  # fmt: skip
"""PEFT's other methods, and why they are not taken."""

MEND = "merge it with PEFT's merge_and_unload and use the checkpoint"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that are read, as PEFT writes them, for every method alike."""

    peft_type: str = "LORA"
    r: int = 8
    alpha: float = 8
    lora_alpha: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    alpha_pattern: dict[str, float] | None = None
    rank_pattern: dict[str, int] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    feedforward_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    experts: int = 1
    experts_per_token: int = 1
    expert_modules: list[str] | None = None
    base_model_name_or_path: str | None = None

    def scale(self, name: str, rank: int | None = None) -> float:
        """Alpha / rank of a module, or alpha / sqrt(rank) under rsLoRA.

        `name` is what PEFT matches its patterns with; `rank` is the stored one where the
        tensors tell it, else what the settings say.
        """
        fallback = self.alpha if self.lora_alpha is None else self.lora_alpha
        alpha = _matched(self.alpha_pattern, name, fallback)
        rank = self.rank(name) if rank is None else rank
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def experts_of(self, name: str) -> int:
        """How many routed experts a module has by the settings; 0 is plain LoRA."""
        modules = self.expert_modules or ()
        has = any(name == module or name.endswith(f".{module}") for module in modules)
        return self.experts if has else 0

    def rank(self, name: str) -> int:
        """The rank that the settings give a module."""
        return int(_matched(self.rank_pattern, name, self.r))


def _matched(patterns: Mapping[str, float] | None, name: str, fallback: float) -> float:
    """The first pattern that matches as PEFT matches: from a dot, or the start, to the end."""
    return next(
        (value for key, value in (patterns or {}).items() if matches(key, name)),
        fallback,
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern takes a module as PEFT matches: from a dot, or the start, to the end.

    Raises CheckpointError for one that takes too long: it comes with the adapter, and the
    time of an expression may double with every letter of a name.
    """
    start = perf_counter()
    try:
        found = regex.match(_whole(pattern), name, timeout=MATCHING_SECONDS)
        taken = perf_counter() - start
    except TimeoutError:
        found, taken = None, math.inf
    if taken > SLOW_SECONDS:
        _slow[pattern] = _slow.get(pattern, 0.0) + taken
        if _slow[pattern] > MATCHING_SECONDS:
            raise CheckpointError(
                f"adapter_config.json: the pattern {pattern!r} takes more than "
                f"{MATCHING_SECONDS} s on {name}; write it more simply, or the module's name itself"
            )
    return bool(found)


def _whole(pattern: str) -> str:
    """The expression that PEFT makes of a pattern."""
    return rf"(.*\.)?({pattern})$"


def read_settings(path: Path, config: Mapping[str, Any]) -> Settings:
    """The settings of a configuration whose every field is understood.

    Raises SourceError for another method or a setting that makes the delta another one,
    CheckpointError for values of a wrong type.
    """
    method = config.get("peft_type")
    _refuse_method(path.parent, method)
    _refuse_settings(path.parent, config, READ[str(method)] | INERT)
    from pydantic import TypeAdapter, ValidationError

    known = {f.name: config[f.name] for f in dataclasses.fields(Settings) if f.name in config}
    try:
        settings = TypeAdapter(Settings).validate_python(known)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    else:
        faults = _value_faults(settings, config)
    if faults:
        raise CheckpointError(f"{path}: not a {METHODS[str(method)]} configuration", faults)
    return settings


def _refuse_method(folder: Path, method: object) -> None:
    if isinstance(method, str) and method in METHODS:
        return
    known = ", ".join(METHODS.values())
    reason = OTHER_METHODS.get(str(method), "it is not known here")
    mend = "" if reason == _PROMPT else f". {MEND.capitalize()}"
    raise SourceError(f"{folder}: an adapter of type {method}: {reason}; read are {known}{mend}")


def _refuse_settings(folder: Path, config: Mapping[str, Any], known: set[str]) -> None:
    method = METHODS[str(config["peft_type"])]
    faults = [f"{name}: {reason}" for name, reason in REFUSED.items() if config.get(name)]
    faults += [
        f"{name}={config[name]!r}: not a setting of {method} that is known here; if it does not "
        "change what the adapter computes, remove it from adapter_config.json"
        for name in config
        if config[name] and name not in known | REFUSED.keys()
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MUTATING_INITS):
        faults.append(
            f"init_lora_weights={start!r}: it also changed the base weights, so the factors are "
            "not the delta from the base; convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if faults:
        raise SourceError(
            f"{folder}: its settings make the delta another than the tensors in it say. Mend them, "
            f"or {MEND}",
            faults,
        )


def _number(count: int) -> str:
    """A number as a message tells it; one that comes with an adapter may have 4,000 digits."""
    return str(count) if count <= MAX_COUNT else f"more than {MAX_COUNT:,}"


def _value_faults(settings: Settings, config: Mapping[str, Any]) -> list[str]:
    """Values of the right type that no adapter can have."""
    alphas = {"alpha": settings.alpha, **(settings.alpha_pattern or {})}
    if settings.lora_alpha is not None or "lora_alpha" in config:
        alphas["lora_alpha"] = math.nan if settings.lora_alpha is None else settings.lora_alpha
    faults = [f"{k}: {a} is no finite number" for k, a in alphas.items() if not math.isfinite(a)]
    ranks = {"r": settings.r, **(settings.rank_pattern or {})}
    faults += [f"{k}: a rank of {_number(rank)}" for k, rank in ranks.items()
               if not 1 <= rank <= MAX_COUNT]  # fmt: skip
    if settings.experts > MAX_COUNT:
        faults.append(f"experts: {_number(settings.experts)} of them")
    elif not 1 <= settings.experts_per_token <= settings.experts:
        told = f"{settings.experts_per_token} of {settings.experts} experts per token"
        faults.append(f"experts_per_token: {told} cannot be chosen")
    return faults + _pattern_faults("alpha", settings) + _pattern_faults("rank", settings)


def _pattern_faults(what: str, settings: Settings) -> list[str]:
    """Patterns that are no expressions, and too many that are no plain names."""
    name = f"{what}_pattern"
    patterns = getattr(settings, name) or {}
    faults = []
    for pattern in patterns:
        try:
            regex.compile(_whole(pattern))
        except (regex.error, ValueError) as error:
            faults.append(f"{name}: {pattern!r} is no regular expression: {error}")
    count = sum(regex.fullmatch(r"[\w.-]+", pattern) is None for pattern in patterns)
    if count > MOST_PATTERNS:
        faults.append(f"{name}: {count} expressions, where {MOST_PATTERNS} are the most")
    return faults
