"""What PEFT stores of LoRA: its settings, and the tensors of each module.

Everything in an adapter comes from outside: the types of its settings are checked, every
tensor must be explained, and settings under which the delta is another than
`scale * B @ A` are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taia.checkpoint import FLOATS, Tensor
from taia.errors import CheckpointError, SourceError

__all__ = [
    "CONV1D_NAMES",
    "CONV1D_TYPES",
    "PREFIX",
    "LoraModule",
    "LoraSettings",
    "make_module",
    "module_fault",
    "refuse_other_methods",
    "sorted_tensors",
]

PREFIX = "base_model.model."

FACTOR = re.compile(
    r"^(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$"
)
PARTS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
         "lora_magnitude_vector": "magnitude"}  # fmt: skip

OTHER_DELTAS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of LoRA under which `scale * B @ A` is not the delta."""

MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights; PEFT can convert them when saving."""


CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Where transformers keeps a linear weight as (in, out): its Conv1D."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The fields of adapter_config.json that are read here, as PEFT writes them."""

    lora_alpha: float = 8
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    alpha_pattern: dict[str, float] | None = None
    rank_pattern: dict[str, int] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any]) -> LoraSettings:
        """Check the types of the fields. Raises CheckpointError with every fault."""
        from pydantic import TypeAdapter, ValidationError

        known = {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config}
        try:
            settings = TypeAdapter(cls).validate_python(known)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise CheckpointError(f"{path}: not a LoRA configuration", faults) from error
        alphas = {"lora_alpha": settings.lora_alpha, **(settings.alpha_pattern or {})}
        faults = [f"alpha of {k}: {a} is no finite number" for k, a in alphas.items()
                  if not math.isfinite(a)]  # fmt: skip
        for pattern in settings.alpha_pattern or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"alpha_pattern: {pattern!r} is no regular expression: {error}")
        if faults:
            raise CheckpointError(f"{path}: not a LoRA configuration", faults)
        return settings


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


_NOTHING = Tensor("", "F32", (), "", 0, 0)


def sorted_tensors(
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
        elif ".original_module." not in name:  # the base's own, saved along with a copy
            plain = re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)
            if plain in whole:
                faults.append(f"{key}: stands for {plain}, as {whole[plain].name} does")
            whole[plain] = tensor
    for module in parts:  # beside its factors, a target's weight is the base's, saved along
        if whole.get(f"{module}.weight", _NOTHING).name.endswith(".base_layer.weight"):
            del whole[f"{module}.weight"]
        elif f"{module}.weight" in whole:
            faults.append(f"{module}: has factors and a whole weight")
    return parts, whole, faults


def refuse_other_methods(path: Path, config: Mapping[str, Any]) -> None:
    """Raise SourceError where the delta is not `scale * B @ A` over the base's own weights."""
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


def module_fault(name: str, parts: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the tensors of one module; None where they are factors of a delta."""
    roles = {PARTS[part] for part in parts}
    if not {"a", "b"} <= roles:
        return f"{name}: has {', '.join(sorted(parts))} but not both factors"
    embedding = "lora_embedding_A" in parts
    a = parts["lora_embedding_A" if embedding else "lora_A"]
    b = parts.get("lora_embedding_B" if embedding else "lora_B")
    if b is None or len(a.shape) != 2 or len(b.shape) != 2 or not 0 < a.shape[0] == b.shape[1]:
        shapes = f"{list(a.shape)} and {list(b.shape) if b else 'nothing'}"
        return f"{name}: factors of shapes {shapes} have no product"
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and (embedding or magnitude.parameters != b.shape[0]):
        return f"{name}: a magnitude of shape {list(magnitude.shape)} for {b.shape[0]} rows"
    return None


def make_module(name: str, parts: Mapping[str, Tensor], settings: LoraSettings) -> LoraModule:
    """A module without fault, with its scale."""
    embedding = "lora_embedding_A" in parts
    a = parts["lora_embedding_A" if embedding else "lora_A"]
    return LoraModule(
        name=name,
        a=a,
        b=parts["lora_embedding_B" if embedding else "lora_B"],
        magnitude=parts.get("lora_magnitude_vector"),
        scale=_scale(name, a.shape[0], settings),
        transposed=settings.fan_in_fan_out and not embedding,
        embedding=embedding,
    )


def _scale(module: str, rank: int, settings: LoraSettings) -> float:
    """Alpha / rank, or alpha / sqrt(rank) under rsLoRA; patterns match as PEFT matches them."""
    patterns = settings.alpha_pattern or {}
    alpha = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        settings.lora_alpha,
    )
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)
