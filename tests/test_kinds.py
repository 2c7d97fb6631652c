"""kinds: the shipped table against the module structure of real models."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taia.errors import KindError
from taia.kinds import (
    Address,
    Kind,
    classify,
    classify_all,
    classify_by_agreement,
    model_types,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

DOZEN = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2"]
DOZEN += ["mixtral", "opt", "deepseek_v3", "nemotron_h"]


def address(kind: str, layer: int | None = None, projection: str | None = None) -> Address:
    return Address(Kind(kind), layer, projection, "language")


# Each row of the table of names that break naive tools: type, name, kind, projection.
TRAPS = [
    ("llama", "model.layers.3.post_attention_layernorm.weight", "norm", None),
    ("llama", "model.layers.3.self_attn.rotary_emb.inv_freq", "attention", None),
    ("qwen2", "model.layers.3.self_attn.q_proj.bias", "attention", "q"),
    ("qwen3", "model.layers.3.self_attn.q_norm.weight", "attention", None),
    ("gemma2", "model.layers.3.post_attention_layernorm.weight", "norm", None),
    ("olmo2", "model.layers.3.post_feedforward_layernorm.weight", "norm", None),
    ("gemma3_text", "model.layers.3.pre_feedforward_layernorm.weight", "norm", None),
    ("glm4", "model.layers.3.post_self_attn_layernorm.weight", "norm", None),
    ("glm4", "model.layers.3.mlp.gate_up_proj.weight", "ffn", "gate_up"),
    ("phi3", "model.layers.3.self_attn.qkv_proj.weight", "attention", "qkv"),
    ("phi3", "model.layers.3.mlp.gate_up_proj.weight", "ffn", "gate_up"),
    ("gpt2", "transformer.h.3.attn.c_attn.weight", "attention", "qkv"),
    ("gpt2", "transformer.h.3.attn.c_proj.weight", "attention", "o"),
    ("gpt2", "transformer.h.3.mlp.c_proj.weight", "ffn", "down"),
    ("gpt2", "transformer.h.3.mlp.c_fc.bias", "ffn", "up"),
    ("gpt2", "h.3.attn.bias", "attention", None),
    ("gpt2", "transformer.h.3.attn.masked_bias", "attention", None),
    ("gpt_neox", "gpt_neox.layers.3.attention.dense.weight", "attention", "o"),
    ("gpt_neox", "gpt_neox.layers.3.mlp.dense_4h_to_h.weight", "ffn", "down"),
    ("gpt_neox", "gpt_neox.layers.3.attention.query_key_value.bias", "attention", "qkv"),
    ("gpt_neox", "gpt_neox.layers.3.attention.masked_bias", "attention", None),
    ("bloom", "transformer.h.3.self_attention.dense.weight", "attention", "o"),
    ("falcon", "transformer.h.3.self_attention.query_key_value.weight", "attention", "qkv"),
    ("falcon", "transformer.h.3.ln_attn.weight", "norm", None),
    ("hunyuan_v1_moe", "model.layers.3.mlp.gate.wg.weight", "router", None),
    ("lfm2_moe", "model.layers.3.feed_forward.expert_bias", "router", None),
    ("mpt", "transformer.blocks.3.attn.Wqkv.weight", "attention", "qkv"),
    ("mpt", "transformer.blocks.3.ffn.up_proj.weight", "ffn", "up"),
    ("dbrx", "transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", "attention", "qkv"),
    ("dbrx", "transformer.blocks.3.norm_attn_norm.norm_1.weight", "norm", None),
    ("dbrx", "transformer.blocks.3.ffn.router.layer.weight", "router", None),
    ("opt", "model.decoder.layers.3.self_attn_layer_norm.weight", "norm", None),
    ("opt", "model.decoder.layers.3.final_layer_norm.weight", "norm", None),
    ("opt", "model.decoder.layers.3.fc1.weight", "ffn", "up"),
    ("opt", "model.decoder.layers.3.fc2.bias", "ffn", "down"),
    ("bart", "model.decoder.layers.3.encoder_attn.q_proj.weight", "attention", "q"),
    ("phi", "model.layers.3.mlp.fc1.weight", "ffn", "up"),
    ("gptj", "transformer.h.3.mlp.fc_in.weight", "ffn", "up"),
    ("cohere", "model.layers.3.input_layernorm.weight", "norm", None),
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
    ("gpt_oss", "model.layers.3.self_attn.sinks", "attention", None),
    ("gpt_oss", "model.layers.3.mlp.router.bias", "router", None),
    ("gpt_oss", "model.layers.3.mlp.experts.gate_up_proj_blocks", "ffn", "gate_up"),
    ("gpt_oss", "model.layers.3.mlp.experts.down_proj_scales", "ffn", "down"),
    ("gpt_oss", "model.layers.3.mlp.experts.down_proj_bias", "ffn", "down"),
    ("qwen3_next", "model.layers.0.linear_attn.out_proj.weight", "mixer", None),
    ("qwen3_next", "model.layers.3.self_attn.o_proj.weight", "attention", "o"),
    ("jamba", "model.layers.3.mamba.in_proj.weight", "mixer", None),
    ("jamba", "model.layers.3.input_layernorm.weight", "norm", None),
    ("jamba", "model.layers.3.feed_forward.router.weight", "router", None),
    ("bamba", "model.layers.3.mamba.A_log", "mixer", None),
    ("granitemoehybrid", "model.layers.3.mamba.conv1d.weight", "mixer", None),
    ("falcon_h1", "model.layers.3.self_attn.k_proj.weight", "attention", "k"),
    ("nemotron_h", "model.layers.3.mixer.q_proj.weight", "attention", "q"),
    ("nemotron_h", "model.layers.3.mixer.up_proj.weight", "ffn", "up"),
    ("nemotron_h", "model.layers.3.mixer.in_proj.weight", "mixer", None),
    ("mamba", "backbone.layers.3.mixer.in_proj.weight", "mixer", None),
    ("rwkv", "rwkv.blocks.3.attention.key.weight", "mixer", None),
    ("rwkv", "rwkv.blocks.3.feed_forward.key.weight", "ffn", None),
    ("jetmoe", "model.layers.3.self_attention.experts.output_linear.weight", "attention", "o"),
    ("jetmoe", "model.layers.3.self_attention.experts.router.layer.weight", "router", None),
    ("jetmoe", "model.layers.3.mlp.router.layer.weight", "router", None),
    ("mllama", "model.layers.3.cross_attn.q_proj.weight", "attention", "q"),
    ("mllama", "model.layers.3.cross_attn_attn_gate", "attention", None),
    ("mllama", "model.layers.3.cross_attn_mlp_gate", "ffn", None),
    ("gemma3n_text", "model.layers.3.altup.prediction_coefs.weight", "other", None),
    ("gemma3n_text", "model.layers.3.laurel.linear_left.weight", "other", None),
    ("gemma3n_text", "model.layers.3.per_layer_projection.weight", "other", None),
    ("afmoe", "model.layers.3.self_attn.gate_proj.weight", "attention", "gate"),
    ("beam", "model.layers.3.self_attn.gate_proj.weight", "attention", "gate"),
    ("zaya", "model.layers.3.mlp.gate.down_proj.weight", "router", None),
    ("moshi", "model.layers.3.mlp.fc1.weight", "ffn", "gate_up"),
    ("bert", "bert.encoder.layer.3.intermediate.dense.weight", "ffn", "up"),
    ("bert", "bert.encoder.layer.3.output.dense.weight", "ffn", "down"),
    ("bert", "bert.encoder.layer.3.attention.output.dense.weight", "attention", "o"),
    ("bert", "bert.encoder.layer.3.output.LayerNorm.weight", "ffn", None),
]


@pytest.mark.parametrize(("model_type", "name", "kind", "projection"), TRAPS)
def test_a_trap_is_told_apart(model_type, name, kind, projection):
    found = classify(name, model_type)
    assert (found.kind, found.projection, found.tower) == (kind, projection, "language")
    assert found.layer == (0 if ".0." in name else 3)


@pytest.mark.parametrize("model_type", DOZEN)
def test_the_table_is_what_the_modules_say(model_type):
    import derive_kinds
    from kind_configs import build, variants

    model = build(model_type)
    derived = derive_kinds.family_of(model, *variants(model_type, model))
    table = json.loads(derive_kinds.TABLE.read_text())
    assert table["families"][table["models"][model_type]] == derived


@pytest.mark.parametrize("model_type", DOZEN)
def test_every_tensor_of_a_live_model_has_the_address_of_its_module(model_type):
    from kind_configs import build
    from kind_rules import addresses

    model = build(model_type)
    found = classify_all(model.state_dict(), model_type)
    for name, row in addresses(model).items():
        got = found[name]
        assert (got.kind, got.projection, got.tower) == (row.kind, row.projection, row.tower), name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_a_missing_base_prefix_changes_nothing(model_type):
    from kind_configs import build

    model = build(model_type)
    for name in model.state_dict():
        short = name.removeprefix(f"{model.base_model_prefix}.")
        assert classify(short, model_type) == classify(name, model_type)


def test_the_files_of_a_saved_mixtral_are_known(tmp_path):
    from safetensors import safe_open
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    found = classify_all(names, "mixtral")
    experts = [name for name in names if "experts" in name]
    assert len(experts) == 2 * 3 * 3
    assert {found[name].kind for name in experts} == {Kind.FFN}
    assert {found[name].projection for name in experts} == {"gate", "up", "down"}
    assert {found[name].layer for name in experts} == {0, 1}


def test_a_name_that_depends_on_its_layer_needs_the_whole_checkpoint():
    name = "model.layers.{}.self_attn.q_proj.weight".format
    with pytest.raises(KindError, match="classify_all"):
        classify(name(0), "kimi_linear")
    found = classify_all(
        [
            name(0),
            "model.layers.0.self_attn.b_proj.weight",
            name(3),
            "model.layers.3.self_attn.kv_a_layernorm.weight",
        ],
        "kimi_linear",
    )
    assert found[name(0)] == address("mixer", 0)
    assert found[name(3)] == address("attention", 3, "q")


def test_a_tied_head_and_embedding_are_known():
    assert classify("lm_head.weight", "qwen2") == address("head")
    assert classify("model.embed_tokens.weight", "qwen2") == address("embedding")


@pytest.mark.parametrize(
    "suffix",
    [
        "bias",
        "weight.absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "qweight",
        "weight_scale_inv",
    ],
)
def test_what_stands_beside_a_weight_shares_its_address(suffix):
    stem = "model.layers.1.mlp.down_proj"
    assert classify(f"{stem}.{suffix}", "llama") == classify(f"{stem}.weight", "llama")


def test_multi_token_prediction_layers_are_other():
    name = "model.layers.{}.self_attn.o_proj.weight".format
    assert classify(name(60), "deepseek_v3") == address("attention", 60, "o")
    assert classify(name(61), "deepseek_v3") == address("other")
    assert classify("model.layers.61.eh_proj.weight", "deepseek_v3") == address("other")
    assert classify("mtp.fc.weight", "qwen3_5_text") == address("other")


def test_towers_are_told_apart():
    towers = {
        "model.vision_tower.encoder.layers.2.self_attn.q_proj.weight": "vision",
        "model.multi_modal_projector.mm_input_projection_weight": "projector",
        "model.language_model.layers.2.self_attn.q_proj.weight": "language",
    }
    assert {name: classify(name, "gemma3").tower for name in towers} == towers


@pytest.mark.parametrize(
    ("module", "kind", "projection"),
    [
        *((f"self_attn.{p}_proj", "attention", p) for p in "qkvo"),
        *((f"mlp.{p}_proj", "ffn", p) for p in ("gate", "up", "down")),
    ],
)
def test_model_types_agree_on_what_adapters_hold(module, kind, projection):
    found = classify_by_agreement(f"model.layers.4.{module}.weight")
    assert found == address(kind, 4, projection)


def test_agreement_needs_a_known_name_and_one_answer():
    with pytest.raises(KindError, match=r"differ on it .* Give the base model"):
        classify_by_agreement("model.layers.4.mlp.fc1.weight")
    with pytest.raises(KindError, match=r"no known model type"):
        classify_by_agreement("model.layers.4.nonsense.weight")


def test_an_unknown_model_type_names_the_nearest():
    with pytest.raises(KindError, match=r"llame: not a model type .* did you mean 'llama'"):
        classify("lm_head.weight", "llame")


def test_an_unknown_name_names_the_nearest_patterns():
    with pytest.raises(KindError, match=r"'model\.layers\.\*\.mlp\.up_proj'"):
        classify("model.layers.0.mlp.upproj.weight", "llama")


def test_all_unknown_names_are_told_together():
    with pytest.raises(KindError, match="2 of 3") as raised:
        classify_all(["lm_head.weight", "nothing.weight", "none.weight"], "llama")
    assert len(raised.value.faults) == 2


@given(st.integers(0, 10**6), st.sampled_from("qkvo"))
def test_the_layer_is_the_number_in_the_name(layer, letter):
    name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
    assert classify(name, "llama") == address("attention", layer, letter)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_kind_error(text):
    try:
        found = classify(text, "gpt2")
    except KindError:
        return
    assert isinstance(found, Address)


@given(st.lists(st.builds(address, st.sampled_from(list(Kind)), st.none() | st.integers(0, 9))))
def test_addresses_sort_with_and_without_layers(addresses):
    ordered = sorted(addresses)
    assert all(not later < earlier for earlier, later in itertools.pairwise(ordered))


def test_the_model_types_are_sorted_and_many():
    assert list(model_types()) == sorted(model_types())
    assert set(DOZEN) <= set(model_types())
    assert len(model_types()) >= 171


def test_classifying_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from taia.kinds import classify;"
        "classify('lm_head.weight', 'llama');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_thousand_names_take_milliseconds():
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(250) for p in "qkvo"]
    classify(names[0], "llama")
    start = time.perf_counter()
    for name in names:
        classify(name, "llama")
    assert time.perf_counter() - start < 0.2  # 10 ms here; room for a busy machine


@pytest.mark.slow
def test_the_whole_table_is_derived_again():
    import derive_kinds
    import transformers
    from kind_configs import model_types as all_types

    families, _ = derive_kinds.derive(all_types())
    text = derive_kinds.to_json(families, transformers.__version__)
    assert derive_kinds.TABLE.read_text() == text
