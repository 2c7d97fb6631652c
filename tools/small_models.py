"""A model of each family that is small enough to run, with its layer types kept apart.

Numbers of a default config are replaced by small ones under whatever name the family gives
them. The sizes differ from one another, so that a wrong axis or a wrong count does not fit.
"""

from __future__ import annotations

import warnings
from typing import Any

from taia.derivation.models import OVERRIDES

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 3),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 4),
    "shared_intermediate_size": 12,
    "vocab_size": 48,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "image_size": 16,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")


def small(model_type: str, **changes: Any) -> Any:
    """A random causal language model of this type. Raises what its code raises."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[model_type](**OVERRIDES.get(model_type, {}))
        _shrink(config)
        for name, value in changes.items():
            if hasattr(config, name):
                setattr(config, name, value)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.set_experts_implementation("eager")
        return model


def _shrink(config: Any) -> None:
    for name, size in SIZES.items():
        if getattr(config, name, None) is not None or (
            name == "num_key_value_heads" and hasattr(config, name)
        ):
            _set(config, name, size)
    for name in LISTS:
        types = getattr(config, name, None)
        if isinstance(types, list):
            kinds = list(dict.fromkeys(types))
            _set(config, name, [*kinds, *kinds][:2])
    for name in dir(config):
        if name.endswith("_config") and hasattr(getattr(config, name, None), "to_dict"):
            _shrink(getattr(config, name))


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except AttributeError:  # computed from other settings
        return
