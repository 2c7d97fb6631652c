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


@pytest.mark.parametrize("model_type", DOZEN)
def test_the_table_is_what_the_modules_say(model_type):
    import derive_kinds

    derived = derive_kinds.derive([model_type])
    assert not derived.failed
    assert not derived.disagreements
    lines = derive_kinds.TABLE.read_text(encoding="utf-8").split("\n")
    at = json.loads(lines[0])["models"][model_type]
    assert json.loads(lines[at]) == derived.tables[model_type]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_a_missing_base_prefix_changes_nothing(model_type):
    from taia.derivation.models import build

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
    assert len(model_types()) >= 189


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
def test_the_whole_table_is_derived_again(capsys):
    """Every model type built again: the counts, and the shipped table to the byte."""
    import derive_kinds
    import transformers

    from taia.derivation.models import architectures, causal_types

    derived = derive_kinds.derive(sorted(architectures()))
    with capsys.disabled():
        print("\n" + "\n".join(derive_kinds.count(derived)))
    assert not derived.failed
    assert not derived.disagreements
    assert set(causal_types()) <= set(derived.tables) == set(architectures())
    text = derive_kinds.to_lines(derived.tables, transformers.__version__)
    assert derive_kinds.TABLE.read_text(encoding="utf-8") == text


def test_the_page_of_the_rules_is_the_one_that_the_table_makes():
    import derive_kinds
    from kinds_page import page

    made = page(derive_kinds.TABLE.read_text(encoding="utf-8"))
    assert derive_kinds.PAGE.read_text(encoding="utf-8") == made
