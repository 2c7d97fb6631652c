"""LoRA adapters with random factors on the tiny models, and how their outputs are compared."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r".*\.0\..*": 2, r".*\.1\..*": 8},
        "alpha_pattern": {r".*\.1\..*": 3, r".*\.2\..*": 20},
    },
}


def linear_names(model) -> list[str]:
    """The last names of all linear layers but the head."""
    from transformers.pytorch_utils import Conv1D

    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name not in ("lm_head", "embed_out")
    }
    return sorted(names)


def save_adapter(base: Path, out: Path, seed: int = 3, **settings: object) -> Path:
    """A LoRA adapter with random factors on every linear layer of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    fan = {"fan_in_fan_out": True} if model.config.model_type == "gpt2" else {}
    return save_peft(
        base, out, LoraConfig(**{"target_modules": linear_names(model)} | fan | settings), seed
    )


def save_peft(base: Path, out: Path, config: PeftConfig, seed: int = 3) -> Path:
    """An adapter of any method with random tensors, on a saved model."""
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(out)
    return out


def logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randint(3, 60, (2, 12))).logits


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)
