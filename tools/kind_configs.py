"""Models on the meta device, from default configs.

`OVERRIDES` states what a default config lacks; a value is added only where the default
one does not build, so that layer patterns stay those of the real models. `VARIANTS`
states options of published models that add or rename modules: a family is built again
with each of them that its config knows. Experts are cut to four, because they share
their names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8}},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {"is_decoder": True},
}

VARIANTS: tuple[tuple[str, Any], ...] = (
    ("q_lora_rank", None),
    ("q_lora_rank", 64),
    ("use_qk_norm", True),
    ("qk_layernorm", True),
    ("qk_norm", True),
    ("new_decoder_architecture", True),
    ("parallel_attn", False),
    ("mlp_only_layers", [0]),
    ("moe_layer_start_index", 1),
    ("first_k_dense_replace", 1),
    ("word_embed_proj_dim", 32),
    ("shared_intermediate_size", 64),
    ("n_shared_experts", 1),
    ("num_shared_experts", 1),
)

SET_BY_DEFAULT = {"q_lora_rank", "parallel_attn", "word_embed_proj_dim"}
"""Options that are worth changing where a default config sets them."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS = 4


def model_types() -> list[str]:
    """Every model type of the installed transformers that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, **options: Any) -> Any:
    """A causal language model of this type on the meta device. Raises what its code raises."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        values = {**OVERRIDES.get(model_type, {}), **options}
        config = transformers.CONFIG_MAPPING[model_type](**values)
        _cut_experts(config.get_text_config())
        return transformers.AutoModelForCausalLM.from_config(config)


def variants(model_type: str, model: Any) -> Iterator[Any]:
    """The same family with each option of VARIANTS that its config has and leaves unset.

    An option that does not build for this family is passed over: it is none of its own.
    """
    for option, value in VARIANTS:
        if not hasattr(model.config, option):
            continue
        default = getattr(model.config, option)
        if default == value or (default and option not in SET_BY_DEFAULT):
            continue
        try:
            yield build(model_type, **{option: value})
        except Exception:
            continue


def _cut_experts(config: Any) -> None:
    for count in EXPERT_COUNTS:
        if isinstance(getattr(config, count, None), int) and getattr(config, count) > EXPERTS:
            setattr(config, count, EXPERTS)
