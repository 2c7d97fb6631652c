"""Models on the meta device: every type with a text decoder, from default configs.

`OVERRIDES` states what a default config lacks; a value is added only where the default
one does not build, so that layer patterns stay those of the real models. `VARIANTS`
states options of published models that add or rename modules, `OWN_OPTIONS` those of one
family, and `PARTNERS` the towers that a multimodal family is published with: a family is built
again with each of them that its config knows. Experts are cut to four: they share their names.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
BOTH_ROPES = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
SMALL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", **SMALL_VISION}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": BOTH_ROPES},
    "cohere_compass_text": BOTH_ROPES,
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_ocr2": {
        "text_config": {"num_hidden_layers": 4, "mlp_layer_types": ["dense", *["sparse"] * 3]}
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "emu3": {"vocabulary_map": {"<image>": 151851}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 6,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
        }
    },
    "gemma4_unified_assistant": {
        "text_config": {
            "model_type": "gemma4_unified_text",
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 6,
        }
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/4",
        "use_spatial_sampling": True,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 16},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "moshi": {"audio_vocab_size": 2048},
    "nemotron": {"num_key_value_heads": 8},
    "qwen3_omni_moe": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 64}},
    },
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {"is_decoder": True},
}

DECODER_OF = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Where the causal language model of a type takes a part of its config."""

FOREIGN = {
    "fast_vlm": "model.vision_tower",
    "gemma3n": "model.vision_tower",
    "perception_lm": "model.vision_tower",
}
"""Vision towers that timm computes; which of its models is up to each checkpoint. A small
tower is built in its place and not looked into."""

AFTERWARDS: dict[str, dict[str, Any]] = {
    # its own check asks for layers that all share their keys, which its code cannot build
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
}
"""Values set on a config that is already made and checked."""

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
    ("feed_forward_proj", "gated-gelu"),
    ("feed_forward_proj", "relu"),
)

SET_BY_DEFAULT = {"q_lora_rank", "parallel_attn", "word_embed_proj_dim", "feed_forward_proj"}
"""Options that are worth changing where a default config sets them."""

SMALL_TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SMALL_T5 = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
            "num_heads": 4, "feed_forward_proj": "gated-gelu"}  # fmt: skip
PARTNERS: dict[str, tuple[dict[str, Any], ...]] = {
    "text_config": (
        {"model_type": "llama", **SMALL_TEXT},  # mistral, qwen2 and gemma have its names
        {"model_type": "qwen3", **SMALL_TEXT},
        {"model_type": "gemma2", **SMALL_TEXT},
        {"model_type": "phi3", **SMALL_TEXT},
        {"model_type": "qwen3_moe", **SMALL_TEXT, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "vision_config": (
        {"model_type": "clip_vision_model", **SMALL_VISION},
        {"model_type": "siglip_vision_model", **SMALL_VISION},
        {"model_type": "pixtral", **SMALL_VISION},
    ),
}
"""Sub-models that a composite family takes by type, beside its default ones."""

OWN_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    # published models have what the default configs leave out: BLIP-2 with Flan-T5
    **{
        model_type: ({"text_config": {"model_type": "t5", **SMALL_T5}},)
        for model_type in ("blip-2", "instructblip", "instructblipvideo")
    },
    "bamba": ({"attn_layer_indices": [1]},),
    "granitemoehybrid": ({"layer_types": ["linear_attention", "full_attention"] * 16},),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 16},),
    "nemotron_h": ({"moe_latent_size": 64},),
    "zamba2": ({"use_shared_attention_adapter": True},),
    "falcon_h1": ({"mamba_rms_norm": True},),
    "doge": ({"is_moe": True},),
    "ernie": ({"use_task_id": True},),
    "gemma4_assistant": ({"use_ordered_embeddings": True},),
    "gemma4_unified_assistant": ({"use_ordered_embeddings": True},),
    "granite_docling": ({"density_router_hidden_size": 8},),
    "idefics": ({"additional_vocab_size": 2, "use_resampler": True, "qk_layer_norms": True},),
    "reformer": ({"axial_pos_embds": False},),
    "xmod": ({"pre_norm": True}, {"adapter_layer_norm": True}),
}
"""Options of single families."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS = 4

CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
CONDITIONAL = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
ENDING = "ForConditionalGeneration"

NO_TEXT_DECODER = {
    "ClvpModelForConditionalGeneration": "writes speech tokens",
    "GradiumPhononTTSForConditionalGeneration": "writes speech latents",
    "PocketTTSForConditionalGeneration": "writes speech latents",
    "Qwen2_5OmniPreTrainedModelForConditionalGeneration": "a base class",
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration": "a base class",
    "Qwen2_5OmniTalkerForConditionalGeneration": "a part of qwen2_5_omni",
    "Qwen3OmniMoeTalkerForConditionalGeneration": "a part of qwen3_omni_moe",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": "a part of qwen3_omni_moe",
    "SeamlessM4TTextToUnitForConditionalGeneration": "writes speech units, a part of seamless_m4t",
}
"""Classes of conditional generation that are left out, and why."""


def causal_types() -> list[str]:
    """Every model type of the installed transformers that has a causal language model."""
    from transformers.models.auto import modeling_auto

    return list(getattr(modeling_auto, CAUSAL))


@cache
def architectures() -> dict[str, list[str]]:
    """Model type -> its classes with a text decoder, the causal language model first."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = {}
    for mapping in (CAUSAL, *CONDITIONAL):
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                if name not in found.setdefault(model_type, []):
                    found[model_type].append(name)
    mapped = {name for names in found.values() for name in names}
    for name in sorted(set(dir(transformers)) - mapped - set(NO_TEXT_DECODER)):
        if name.endswith(ENDING):
            model_type = getattr(getattr(transformers, name).config_class, "model_type", "")
            known = found.setdefault(model_type, [])
            if getattr(transformers, name) not in [getattr(transformers, n) for n in known]:
                known.append(name)
    return found


def build(model_type: str, architecture: str | None = None, **options: Any) -> Any:
    """A model of this type on the meta device. Raises what its code raises.

    architecture: the class; None for the causal language model, and where there is none for
        the first class of conditional generation.
    """
    import transformers

    names = architectures()[model_type]
    # some configs take what they are given apart
    values = copy.deepcopy({**OVERRIDES.get(model_type, {}), **options})
    with quietly_on_meta():
        config = transformers.CONFIG_MAPPING[model_type](**values)
        if model_type in FOREIGN:
            config.__dict__["vision_config"] = _stand_in()  # past its check of the type
        for path, value in AFTERWARDS.get(model_type, {}).items():
            part, _, name = path.rpartition(".")
            setattr(getattr(config, part), name, value)
        return of_class(config, architecture or names[0])


def _stand_in() -> Any:
    """A small vision config with what a config of timm has besides."""
    import transformers

    config = transformers.SiglipVisionConfig(**SMALL_VISION)
    config.model_args = {"embed_dim": config.hidden_size}
    config.vocab_offset, config.vocab_size, config.rms_norm_eps = 256, 128, 1e-6
    return config


def of_class(config: Any, architecture: str) -> Any:
    """A model of one class of transformers with this config."""
    import transformers
    from transformers.models.auto import modeling_auto

    _cut_experts(config)
    if getattr(modeling_auto, CAUSAL).get(config.model_type) == architecture:
        part = DECODER_OF.get(config.model_type)
        if part is not None:
            return getattr(transformers, architecture)(getattr(config, part))
        return transformers.AutoModelForCausalLM.from_config(config)
    return getattr(transformers, architecture)(config)


def variants(model_type: str, model: Any, architecture: str | None = None) -> Iterator[Any]:
    """The same class with each option of VARIANTS, OWN_OPTIONS and PARTNERS that its config has.

    An option that does not build for this family is passed over: it is none of its own.
    """
    own = OWN_OPTIONS.get(model_type, ())
    for options in (*_options(model.config), *own, *_partners(model_type)):
        form = None
        with suppress(Exception):
            form = build(model_type, architecture, **options)
        if form is not None:
            yield form


def _options(config: Any) -> Iterator[dict[str, Any]]:
    for option, value in VARIANTS:
        if not hasattr(config, option):
            continue
        default = getattr(config, option)
        if default != value and (not default or option in SET_BY_DEFAULT):
            yield {option: value}


def _partners(model_type: str) -> Iterator[dict[str, Any]]:
    """Sub-configs that the family leaves to AutoConfig, replaced."""
    import transformers

    kinds = getattr(transformers.CONFIG_MAPPING[model_type], "sub_configs", {})
    for part, partners in PARTNERS.items():
        if kinds.get(part) is transformers.AutoConfig:
            if part == "vision_config" and model_type in FOREIGN:
                continue
            for partner in partners:
                yield {part: partner}


@contextmanager
def quietly_on_meta() -> Iterator[None]:
    """Models go to the meta device, unfilled; what transformers says of defaults is not shown."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.device("meta"))
            stack.enter_context(no_init_weights())
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a value that differs from layer to layer has an error of its own
        return None


def _cut_experts(config: Any) -> None:
    parts = [config, *(_value(config, name) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for count in EXPERT_COUNTS:
            value = _value(part, count)
            if isinstance(value, int) and value > EXPERTS:
                setattr(part, count, EXPERTS)
        if part is not None and part is not config:
            _cut_experts(part)
