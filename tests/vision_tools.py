"""Tiny vision-language models, saved in the layout of their first release, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {**SMALL, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
        "vision_end_token_id": 63}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
QWEN3_TOWER = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2,
               "intermediate_size": 24, "patch_size": 4, "num_position_embeddings": 16,
               "deepstack_visual_indexes": [0]}  # fmt: skip
QWEN3_5 = {
    "text_config": {**TEXT, "head_dim": 8, "rope_parameters": ROPE, "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4,
                    "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "vision_config": QWEN3_TOWER,
    **QWEN,
}  # fmt: skip
"""A type of two classes: with its towers, and the language model alone under other names."""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
                          "mlp_ratio": 2, "patch_size": 4},
        **QWEN,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2,
                          "intermediate_size": 24, "patch_size": 4, "fullatt_block_indexes": [1]},
        **QWEN,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **TOWER, "projection_dim": 16},
        "image_token_index": 60,
    },
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 8},
        "vision_config": {**TOWER, "vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "projection_dim": 32,
                          "vision_use_head": False},
        "image_token_index": 60, "projection_dim": 32, "hidden_size": 32,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 8},
        "image_token_index": 60, "spatial_merge_size": 2,
    },
    "internvl": {  # a language model of another type than its default one, with experts
        "text_config": {"model_type": "qwen3_moe", **TEXT, **MOE},
        "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [8, 8]},
        "image_token_id": 60,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": ROPE},
        "vision_config": QWEN3_TOWER,
        **QWEN,
    },
}  # fmt: skip
"""Model type -> the fields of a config that make it tiny."""


def build(model_type: str, seed: int, **changes: Any) -> Any:
    """A random model, biases and norms included, on the CPU."""
    fields = {**FAMILIES, "qwen3_5": QWEN3_5}[model_type]
    config = AutoConfig.for_model(model_type, **(fields | changes))
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def load(folder: Path) -> Any:
    """The model that transformers loads, with nothing missing."""
    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """What the model says to a text; no image is needed to reach its language model."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(3, 60, (2, 12))).logits


def language_linears(model: Any, kinds: tuple[str, ...]) -> list[str]:
    """The whole live names of the language model's linear layers in modules of these names."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(part in name.split(".") for part in ("language_model", "text_model"))
        and any(kind in name.split(".") for kind in kinds)
    ]


def train(model: Any, targets: Any, out: Path, seed: int = 3, **settings: Any) -> Any:
    """A LoRA with random factors on `model`, saved at `out`; the PEFT model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | settings)
    peft = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.save_pretrained(out)
    return peft.eval()
