"""Names that break naive tools: each case against the structure of a real model.

A case is (model type, name, kind, projection). The fast test asks the shipped table, the
slow one builds the model on the meta device and asks the modules above the tensor.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from taia.kinds import Address, Kind, classify, classify_all

Case = tuple[str, str, str, str | None]

FAMILIES: dict[str, list[Case]] = {
    "Llama, Mistral, Qwen, SmolLM3": [
        ("llama", "model.layers.3.post_attention_layernorm.weight", "norm", None),
        ("qwen2", "model.layers.3.self_attn.q_proj.bias", "attention", "q"),
        ("qwen3", "model.layers.3.self_attn.q_norm.weight", "attention", None),
        ("mistral", "model.layers.3.self_attn.o_proj.weight", "attention", "o"),
        ("smollm3", "model.layers.3.mlp.gate_proj.weight", "ffn", "gate"),
        ("qwen3", "model.layers.3.self_attn.k_norm.weight", "attention", None),
    ],
    "Gemma, OLMo2": [
        ("gemma2", "model.layers.3.post_attention_layernorm.weight", "norm", None),
        ("olmo2", "model.layers.3.post_feedforward_layernorm.weight", "norm", None),
        ("gemma3_text", "model.layers.3.pre_feedforward_layernorm.weight", "norm", None),
        ("gemma2", "model.layers.3.post_feedforward_layernorm.weight", "norm", None),
        ("olmo2", "model.layers.3.post_attention_layernorm.weight", "norm", None),
    ],
    "GLM4": [
        ("glm4", "model.layers.3.post_self_attn_layernorm.weight", "norm", None),
        ("glm4", "model.layers.3.mlp.gate_up_proj.weight", "ffn", "gate_up"),
    ],
    "Phi-3": [
        ("phi3", "model.layers.3.self_attn.qkv_proj.weight", "attention", "qkv"),
        ("phi3", "model.layers.3.mlp.gate_up_proj.weight", "ffn", "gate_up"),
    ],
    "GPT-2": [
        ("gpt2", "transformer.h.3.attn.c_attn.weight", "attention", "qkv"),
        ("gpt2", "transformer.h.3.attn.c_proj.weight", "attention", "o"),
        ("gpt2", "transformer.h.3.mlp.c_proj.weight", "ffn", "down"),
        ("gpt2", "transformer.h.3.mlp.c_fc.bias", "ffn", "up"),
    ],
    "GPT-NeoX, BLOOM, Falcon": [
        ("gpt_neox", "gpt_neox.layers.3.attention.dense.weight", "attention", "o"),
        ("gpt_neox", "gpt_neox.layers.3.mlp.dense_4h_to_h.weight", "ffn", "down"),
        ("gpt_neox", "gpt_neox.layers.3.attention.query_key_value.bias", "attention", "qkv"),
        ("bloom", "transformer.h.3.self_attention.dense.weight", "attention", "o"),
        ("falcon", "transformer.h.3.self_attention.query_key_value.weight", "attention", "qkv"),
        ("falcon", "transformer.h.3.ln_attn.weight", "norm", None),
        ("bloom", "transformer.h.3.mlp.dense_4h_to_h.weight", "ffn", "down"),
        ("falcon", "transformer.h.3.self_attention.dense.weight", "attention", "o"),
    ],
    "MPT, DBRX": [
        ("mpt", "transformer.blocks.3.attn.Wqkv.weight", "attention", "qkv"),
        ("mpt", "transformer.blocks.3.ffn.up_proj.weight", "ffn", "up"),
        ("dbrx", "transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", "attention", "qkv"),
        ("dbrx", "transformer.blocks.3.norm_attn_norm.norm_1.weight", "norm", None),
        ("dbrx", "transformer.blocks.3.ffn.router.layer.weight", "router", None),
    ],
    "OPT, BART": [
        ("opt", "model.decoder.layers.3.self_attn_layer_norm.weight", "norm", None),
        ("opt", "model.decoder.layers.3.final_layer_norm.weight", "norm", None),
        ("opt", "model.decoder.layers.3.fc1.weight", "ffn", "up"),
        ("opt", "model.decoder.layers.3.fc2.bias", "ffn", "down"),
        ("bart", "model.decoder.layers.3.encoder_attn.q_proj.weight", "attention", "q"),
        ("bart", "model.decoder.layers.3.encoder_attn_layer_norm.weight", "norm", None),
        ("bart", "model.decoder.layers.3.final_layer_norm.weight", "norm", None),
    ],
    "parallel blocks": [
        ("phi", "model.layers.3.mlp.fc1.weight", "ffn", "up"),
        ("gptj", "transformer.h.3.mlp.fc_in.weight", "ffn", "up"),
        ("cohere", "model.layers.3.input_layernorm.weight", "norm", None),
        ("gptj", "transformer.h.3.mlp.fc_out.weight", "ffn", "down"),
        ("gptj", "transformer.h.3.ln_1.weight", "norm", None),
        ("phi", "model.layers.3.input_layernorm.weight", "norm", None),
        ("falcon", "transformer.h.3.input_layernorm.weight", "norm", None),
    ],
    "MoE and MLA": [
        ("hunyuan_v1_moe", "model.layers.3.mlp.gate.wg.weight", "router", None),
        ("lfm2_moe", "model.layers.3.feed_forward.expert_bias", "router", None),
        ("mixtral", "model.layers.3.mlp.experts.gate_up_proj", "ffn", "gate_up"),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.7.w1.weight", "ffn", "gate"),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.7.w2.weight", "ffn", "down"),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.7.w3.weight", "ffn", "up"),
        ("mixtral", "model.layers.3.block_sparse_moe.gate.weight", "router", None),
        ("mixtral", "model.layers.3.mlp.gate.weight", "router", None),
        ("qwen2_moe", "model.layers.3.mlp.shared_expert.up_proj.weight", "ffn", "up"),
        ("qwen3_moe", "model.layers.3.mlp.experts.7.gate_proj.weight", "ffn", "gate"),
        ("qwen3_moe", "model.layers.3.mlp.gate_proj.weight", "ffn", "gate"),
        ("deepseek_v3", "model.layers.3.self_attn.q_a_proj.weight", "attention", "q"),
        ("deepseek_v3", "model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "attention", "kv"),
        ("deepseek_v3", "model.layers.3.self_attn.kv_a_layernorm.weight", "attention", None),
        ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", "router", None),
        ("deepseek_v3", "model.layers.3.mlp.shared_experts.down_proj.weight", "ffn", "down"),
        ("deepseek_v2", "model.layers.3.self_attn.q_proj.weight", "attention", "q"),
        ("deepseek_v32", "model.layers.3.self_attn.indexer.wk.weight", "attention", None),
        ("deepseek_v3", "model.layers.3.self_attn.q_b_proj.weight", "attention", "q"),
        ("deepseek_v3", "model.layers.3.self_attn.kv_b_proj.weight", "attention", "kv"),
        ("deepseek_v3", "model.layers.3.self_attn.q_a_layernorm.weight", "attention", None),
        ("deepseek_v3", "model.layers.3.mlp.gate.weight", "router", None),
        ("qwen2_moe", "model.layers.3.mlp.gate.weight", "router", None),
    ],
    "gpt-oss": [
        ("gpt_oss", "model.layers.3.self_attn.sinks", "attention", None),
        ("gpt_oss", "model.layers.3.mlp.router.bias", "router", None),
        ("gpt_oss", "model.layers.3.mlp.experts.down_proj_bias", "ffn", "down"),
    ],
    "hybrids": [
        ("qwen3_next", "model.layers.0.linear_attn.out_proj.weight", "mixer", None),
        ("qwen3_next", "model.layers.3.self_attn.o_proj.weight", "attention", "o"),
        ("jamba", "model.layers.3.mamba.in_proj.weight", "mixer", None),
        ("jamba", "model.layers.3.input_layernorm.weight", "norm", None),
        ("jamba", "model.layers.3.feed_forward.router.weight", "router", None),
        ("bamba", "model.layers.3.mamba.A_log", "mixer", None),
        ("granitemoehybrid", "model.layers.3.mamba.conv1d.weight", "mixer", None),
        ("falcon_h1", "model.layers.3.self_attn.k_proj.weight", "attention", "k"),
        ("qwen3_next", "model.layers.0.linear_attn.A_log", "mixer", None),
        ("qwen3_5_text", "model.layers.0.linear_attn.conv1d.weight", "mixer", None),
        ("granitemoehybrid", "model.layers.3.shared_mlp.output_linear.weight", "ffn", "down"),
    ],
    "Nemotron-H": [
        ("nemotron_h", "model.layers.3.mixer.q_proj.weight", "attention", "q"),
        ("nemotron_h", "model.layers.3.mixer.up_proj.weight", "ffn", "up"),
        ("nemotron_h", "model.layers.3.mixer.in_proj.weight", "mixer", None),
        ("nemotron_h", "model.layers.3.norm.weight", "norm", None),
    ],
    "Mamba, RWKV": [
        ("mamba", "backbone.layers.3.mixer.in_proj.weight", "mixer", None),
        ("rwkv", "rwkv.blocks.3.attention.key.weight", "mixer", None),
        ("rwkv", "rwkv.blocks.3.feed_forward.key.weight", "ffn", None),
    ],
    "JetMoe": [
        ("jetmoe", "model.layers.3.self_attention.experts.output_linear.weight", "attention", "o"),
        ("jetmoe", "model.layers.3.self_attention.experts.router.layer.weight", "router", None),
        ("jetmoe", "model.layers.3.mlp.router.layer.weight", "router", None),
    ],
    "Zamba2": [
        ("zamba2", "model.layers.3.shared_transformer.self_attn.q_proj.weight", "attention", "q"),
        (
            "zamba2",
            "model.layers.3.shared_transformer.feed_forward.down_proj.weight",
            "ffn",
            "down",
        ),
        ("zamba2", "model.layers.3.mamba_decoder.mamba.in_proj.weight", "mixer", None),
        ("zamba2", "model.layers.3.linear.weight", "other", None),
    ],
    "Mllama, VLMs": [
        ("mllama", "model.layers.3.cross_attn.q_proj.weight", "attention", "q"),
        ("mllama", "model.layers.3.cross_attn_attn_gate", "attention", None),
        ("mllama", "model.layers.3.cross_attn_mlp_gate", "ffn", None),
    ],
    "Gemma-3n": [
        ("gemma3n_text", "model.layers.3.altup.prediction_coefs.weight", "other", None),
        ("gemma3n_text", "model.layers.3.laurel.linear_left.weight", "other", None),
        ("gemma3n_text", "model.layers.3.per_layer_projection.weight", "other", None),
        ("gemma3n_text", "model.layers.3.altup.modality_router.weight", "other", None),
        ("gemma3n_text", "model.layers.3.per_layer_input_gate.weight", "other", None),
    ],
    "gate_proj in attention": [
        ("afmoe", "model.layers.3.self_attn.gate_proj.weight", "attention", "gate"),
        ("beam", "model.layers.3.self_attn.gate_proj.weight", "attention", "gate"),
    ],
    "Zaya": [
        ("zaya", "model.layers.3.mlp.gate.down_proj.weight", "router", None),
    ],
    "fused under a plain name": [
        ("moshi", "model.layers.3.mlp.fc1.weight", "ffn", "gate_up"),
    ],
    "BERT": [
        ("bert", "bert.encoder.layer.3.intermediate.dense.weight", "ffn", "up"),
        ("bert", "bert.encoder.layer.3.output.dense.weight", "ffn", "down"),
        ("bert", "bert.encoder.layer.3.attention.output.dense.weight", "attention", "o"),
        ("bert", "bert.encoder.layer.3.output.LayerNorm.weight", "ffn", None),
    ],
}
"""Family -> cases, on names that a live model or its files have."""

STORED: list[Case] = [
    ("llama", "model.layers.3.self_attn.rotary_emb.inv_freq", "attention", None),
    ("gpt2", "h.3.attn.bias", "attention", None),
    ("gpt2", "transformer.h.3.attn.masked_bias", "attention", None),
    ("gpt_neox", "gpt_neox.layers.3.attention.masked_bias", "attention", None),
    ("gpt_oss", "model.layers.3.mlp.experts.gate_up_proj_blocks", "ffn", "gate_up"),
    ("gpt_oss", "model.layers.3.mlp.experts.down_proj_scales", "ffn", "down"),
]
"""Names that only files have: buffers of old versions, and what a quantiser stores."""

GATED_ATTENTION = ["afmoe", "beam", "deepseek_v4", "hrm_text", "hy_v4", "inkling2", "muse_glimmer"]
GATED_ATTENTION += ["muse_spark"]

CASES = [
    pytest.param(*case, id=f"{family}: {case[0]} {case[1]}")
    for family, cases in FAMILIES.items()
    for case in cases
]


@cache
def structure(model_type: str) -> dict[str, Any]:
    """Pattern of a name, live or on disk -> the addresses that the modules give it."""
    from taia.derivation.disk import disk_rows
    from taia.derivation.family import forms_of
    from taia.derivation.names import pattern
    from taia.derivation.walk import addresses

    found: dict[str, Any] = {}
    for model in forms_of(model_type):
        live = addresses(model)
        for name, row in [*live.items(), *disk_rows(model, live)]:
            found.setdefault(pattern(name), set()).add((row.kind, row.projection, row.tower))
    return found


@pytest.mark.parametrize(("model_type", "name", "kind", "projection"), [*CASES, *STORED])
def test_the_table_tells_a_trap_apart(model_type, name, kind, projection):
    found = classify(name, model_type)
    assert (found.kind, found.projection, found.tower) == (kind, projection, "language")
    assert found.layer == (0 if ".0." in name else 3)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "name", "kind", "projection"), CASES)
def test_the_modules_of_a_live_model_say_the_same(model_type, name, kind, projection):
    from taia.derivation.names import pattern

    assert structure(model_type)[pattern(name)] == {(kind, projection, "language")}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", GATED_ATTENTION)
def test_a_gate_proj_inside_attention_is_attention(model_type):
    """A filter on the name `gate_proj` would revert attention in these eight families."""
    told = {
        (kind, tower)
        for pattern, answers in structure(model_type).items()
        for kind, _, tower in answers
        if pattern.endswith("gate_proj.weight") and "attn" in pattern
    }
    assert told == {("attention", "language")}


def test_a_block_that_layers_share_is_one_tensor_with_one_address():
    """Zamba2 ties its blocks: each stored name is one decision, under the layer it names."""
    name = "model.layers.{}.shared_transformer.self_attn.q_proj.weight".format
    assert classify(name(6), "zamba2") == Address(Kind.ATTENTION, 6, "q", "language")


def test_a_tied_embedding_and_head_are_two_names_of_two_kinds():
    assert classify("lm_head.weight", "gemma2").kind is Kind.HEAD
    assert classify("model.embed_tokens.weight", "gemma2").kind is Kind.EMBEDDING


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("deepseek_v3", "model.layers.61.self_attn.o_proj.weight"),
        ("deepseek_v3", "model.layers.61.shared_head.norm.weight"),
        ("glm4_moe", "model.layers.46.eh_proj.weight"),
        ("qwen3_next", "mtp.fc.weight"),
    ],
)
def test_what_transformers_drops_on_load_is_other_and_no_layer(model_type, name):
    assert classify(name, model_type) == Address(Kind.OTHER, None, None, "language")


@pytest.mark.parametrize(
    ("name", "kind", "tower", "layer"),
    [
        (
            "model.vision_model.transformer.layers.2.self_attn.q_proj.weight",
            "attention",
            "vision",
            2,
        ),
        # a second stack of the tower has no layers of its own
        ("model.vision_model.global_transformer.layers.2.mlp.fc1.weight", "ffn", "vision", None),
        ("model.multi_modal_projector.weight", "other", "projector", None),
        ("model.language_model.layers.3.cross_attn.q_proj.weight", "attention", "language", 3),
        ("model.language_model.layers.3.cross_attn_attn_gate", "attention", "language", 3),
        ("model.language_model.layers.3.cross_attn_mlp_gate", "ffn", "language", 3),
        # the layout before the prefixes moved
        ("language_model.model.layers.3.self_attn.q_proj.weight", "attention", "language", 3),
        ("vision_model.transformer.layers.2.self_attn.q_proj.weight", "attention", "vision", 2),
    ],
)
def test_the_towers_of_mllama(name, kind, tower, layer):
    found = classify(name, "mllama")
    assert (found.kind, found.tower, found.layer) == (kind, tower, layer)


@pytest.mark.parametrize(
    ("model_type", "name", "kind", "projection", "tower"),
    [
        ("qwen2_vl", "model.visual.blocks.1.attn.qkv.weight", "attention", "qkv", "vision"),
        ("qwen2_vl", "visual.blocks.1.attn.qkv.weight", "attention", "qkv", "vision"),
        ("qwen2_vl", "visual.merger.mlp.0.weight", "other", None, "projector"),
        ("qwen2_vl", "model.layers.1.mlp.up_proj.weight", "ffn", "up", "language"),
        ("qwen2_5_vl", "visual.blocks.1.mlp.down_proj.weight", "ffn", "down", "vision"),
        ("llava", "language_model.model.layers.1.self_attn.k_proj.weight", "attention", "k",
         "language"),
        ("llava", "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "ffn", "up",
         "vision"),
        ("llava", "multi_modal_projector.linear_1.weight", "other", None, "projector"),
        ("mistral3", "vision_tower.transformer.layers.1.attention.q_proj.weight", "attention", "q",
         "vision"),
        ("gemma3n", "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight", "other", None,
         "vision"),
        ("gemma3n", "model.language_model.layers.3.altup.prediction_coefs.weight", "other", None,
         "language"),
        ("whisper", "model.encoder.layers.1.fc1.weight", "ffn", "up", "audio"),
        ("whisper", "model.decoder.layers.1.encoder_attn.q_proj.weight", "attention", "q",
         "language"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q.weight", "attention", "q", "encoder"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight", "attention", "q", "language"),
        ("t5", "decoder.block.1.layer.2.DenseReluDense.wo.weight", "ffn", "down", "language"),
        ("t5", "decoder.block.1.layer.1.layer_norm.weight", "attention", None, "language"),
        ("t5", "decoder.block.1.layer.2.layer_norm.weight", "ffn", None, "language"),
        ("bart", "model.encoder.layers.1.fc2.weight", "ffn", "down", "encoder"),
        ("blip-2", "language_model.encoder.block.1.layer.0.SelfAttention.q.weight", "attention",
         "q", "encoder"),
        ("blip-2", "qformer.encoder.layer.1.attention.attention.query.weight", "other", None,
         "projector"),
        ("qwen2_5_omni", "thinker.model.layers.1.self_attn.q_proj.weight", "attention", "q",
         "language"),
        ("qwen2_5_omni", "talker.model.layers.1.self_attn.q_proj.weight", "attention", "q",
         "generator"),
        ("musicgen", "text_encoder.encoder.block.1.layer.0.SelfAttention.q.weight", "attention",
         "q", "encoder"),
    ],
)  # fmt: skip
def test_the_towers_of_other_families(model_type, name, kind, projection, tower):
    found = classify(name, model_type)
    assert (found.kind, found.projection, found.tower) == (kind, projection, tower)


def test_an_encoder_and_a_decoder_never_share_a_layer():
    """(tower, layer) is one place: the encoder of T5 is a tower of its own."""
    names = [
        f"{part}.block.{layer}.layer.0.SelfAttention.{letter}.weight"
        for part in ("encoder", "decoder")
        for layer in range(3)
        for letter in "qkvo"
    ]
    found = classify_all(names, "t5")
    assert len(set(found.values())) == len(names)
