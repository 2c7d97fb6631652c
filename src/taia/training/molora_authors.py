"""MoLoRA adapters as the paper's authors store them, converted to ours.

Their training writes a folder with

    adapter_config.json, adapter_model.safetensors (or .bin)    PEFT's LoRA, on attention
    non_lora_trainables.bin                                     the mixtures, a pickle
    config.json                                                 num_experts and the like

where a mixture is MODULE.experts.E.lora_A_E.weight, MODULE.experts.E.lora_B_E.weight and
MODULE.switch.weight and .bias. Pickles are read with torch's weights_only, which builds tensors
and runs nothing else, and only here, where a folder is named for it. The facts are those of
pixas/TAIA_LLM at 08794f2.

Limits: no shared expert and no identity experts; of experts that were sampled in training the
most likely are taken, as the authors do at inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.adapter import WEIGHTS, read_adapter
from taia.changes import PREFIX
from taia.errors import CheckpointError, SourceError
from taia.files import atomic_write, read_json, refuse_existing, staged_folder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert"]

PICKLE = "non_lora_trainables.bin"
EXPERT = re.compile(r"^(?P<module>.+)\.experts\.(?P<number>\d+)\.lora_(?P<side>[AB])_(?P=number)")
SWITCH = re.compile(r"^(?P<module>.+)\.switch\.(?P<part>weight|bias)$")
UNKNOWN = ("share_expert", "add_identity_mapping")


def convert(
    folder: str | Path,
    out: str | Path,
    *,
    experts_per_token: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter in `folder`, in the authors' layout, as a MoLoRA adapter at `out`.

    `experts_per_token` is needed where config.json does not state it. Raises SourceError for
    another layout, CheckpointError for tensors that are no whole mixture.
    """
    from safetensors.torch import save_file

    source, destination = Path(folder), Path(out)
    refuse_existing(destination, overwrite=overwrite)
    if not (source / PICKLE).is_file():
        raise SourceError(f"{source}: no {PICKLE} in it, so this is not the authors' layout")
    settings = _settings(source)
    if experts_per_token is None:
        experts_per_token = settings.get("num_experts_per_token")
    if not isinstance(experts_per_token, int):
        raise SourceError(
            f"{source}: config.json does not state num_experts_per_token; give experts_per_token"
        )
    lora = read_json(source / "adapter_config.json")
    mixtures = _mixtures(source, _unpickled(source / PICKLE))
    tensors = _attention(source)
    for module, parts in mixtures.items():
        tensors |= {f"{PREFIX}{module}.{name}": tensor for name, tensor in parts.items()}
    with staged_folder(destination, overwrite=overwrite) as staged:
        save_file(tensors, staged / WEIGHTS)
        config = _config(source, lora, settings, mixtures, tensors, experts_per_token)
        atomic_write(staged / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
        read_adapter(staged)  # what was just written must hold together
    return destination


def _settings(source: Path) -> dict[str, Any]:
    """The fields of config.json. Raises SourceError for a mixture of another kind than ours."""
    settings = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{source / 'config.json'}: not a JSON object")
    active = [name for name in UNKNOWN if settings.get(name)]
    if active:
        raise SourceError(f"{source}: its setting {', '.join(active)} is not known to MoLoRA here")
    return settings


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, which runs nothing; names as in the model."""
    import torch

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: holds other things than tensors: {first}") from error
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in stored.items()
    ):
        raise CheckpointError(f"{path}: not a table of named tensors")
    return {name.removeprefix(PREFIX): value.contiguous() for name, value in stored.items()}


def _mixtures(source: Path, stored: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module -> our tensors of its mixture, by the ends of their names."""
    import torch

    factors: dict[str, dict[str, dict[int, Tensor]]] = {}
    switches: dict[str, dict[str, Tensor]] = {}
    faults = []
    for name, tensor in stored.items():
        if match := EXPERT.match(name):
            sides = factors.setdefault(match["module"], {"A": {}, "B": {}})
            sides[match["side"]][int(match["number"])] = tensor
        elif match := SWITCH.match(name):
            switches.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            faults.append(f"{name}: neither an expert nor a switch")
    made: dict[str, dict[str, Tensor]] = {}
    for module, sides in factors.items():
        numbers = sorted(sides["A"])
        shapes = {side: {tuple(t.shape) for t in sides[side].values()} for side in sides}
        if numbers != list(range(len(numbers))) or sorted(sides["B"]) != numbers:
            faults.append(f"{module}: experts A {numbers}, B {sorted(sides['B'])}")
        elif any(len(found) != 1 or len(next(iter(found))) != 2 for found in shapes.values()):
            faults.append(f"{module}: its experts differ in shape")
        else:
            made[module] = {
                "lora_experts_A.weight": torch.cat([sides["A"][n] for n in numbers], dim=0),
                "lora_experts_B.weight": torch.cat([sides["B"][n] for n in numbers], dim=1),
            }
            switch = switches.pop(module, {})
            made[module] |= {f"lora_router.{part}": tensor for part, tensor in switch.items()}
    faults += [f"{module}: a switch without experts" for module in switches]
    if faults or not made:
        raise CheckpointError(f"{source / PICKLE}: not a readable mixture", faults)
    return made


def _attention(source: Path) -> dict[str, Tensor]:
    """The plain LoRA beside the mixtures."""
    from safetensors.torch import load_file

    if (source / WEIGHTS).is_file():
        tensors: dict[str, Tensor] = load_file(source / WEIGHTS)
        return tensors
    pickle = source / "adapter_model.bin"
    if pickle.is_file():
        return {f"{PREFIX}{name}": tensor for name, tensor in _unpickled(pickle).items()}
    raise SourceError(f"{source}: no {WEIGHTS} and no {pickle.name} in it")


def _config(
    source: Path,
    lora: Any,
    settings: Mapping[str, Any],
    mixtures: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Tensor],
    experts_per_token: int,
) -> dict[str, Any]:
    """Our configuration: theirs of LoRA, and of the experts with a rank and alpha of their own."""
    if not isinstance(lora, dict) or not isinstance(lora.get("r"), int):
        raise CheckpointError(f"{source / 'adapter_config.json'}: not a LoRA configuration")
    rank, alpha = settings.get("molora_r", lora["r"]), settings.get("molora_alpha")
    alpha = lora.get("lora_alpha") if alpha is None else alpha
    first = next(iter(mixtures.values()))
    experts = first["lora_router.weight"].shape[0] if "lora_router.weight" in first else 1
    if {parts["lora_experts_A.weight"].shape[0] for parts in mixtures.values()} != {experts * rank}:
        raise CheckpointError(f"{source}: its experts are not of rank {rank}, as config.json says")
    if not 1 <= experts_per_token <= experts:
        raise CheckpointError(
            f"{source}: {experts_per_token} experts per token are more than the {experts} experts "
            "there are, or none"
        )
    plain = {
        name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors if ".lora_A." in name
    }
    own = sorted(mixtures) if (rank, alpha) != (lora["r"], lora.get("lora_alpha")) else []
    return lora | {
        "peft_type": "MOLORA",
        "experts": experts,
        "experts_per_token": experts_per_token,
        "expert_modules": sorted(mixtures),
        "expert_dropout": 0.0,
        "target_modules": sorted(plain | set(mixtures)),
        "rank_pattern": (lora.get("rank_pattern") or {}) | dict.fromkeys(own, rank),
        "alpha_pattern": (lora.get("alpha_pattern") or {}) | dict.fromkeys(own, alpha),
        "inference_mode": True,
    }
