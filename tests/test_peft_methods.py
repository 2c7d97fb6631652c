"""Every method and setting against PEFT itself: merge, slice and attach at any strength."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_tools import close, linear_names, load, logits, save_peft
from conftest import FAMILIES
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from safetensors.torch import load_file

import taia
from taia.adapter import read_adapter

pytestmark = [
    # PEFT says so each time an adapter is saved for a base that is not on the hub
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    # and this of lora_bias, which it then refuses to merge
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter .default.. 9 LoRA tensor"),
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]
BOTH = {"target_modules": [*ATTENTION, *FFN]}
TOKENS = [5, 3, 60]

METHODS = {
    "plain": LoraConfig(r=4, lora_alpha=6, **BOTH),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, **BOTH),
    "patterns": LoraConfig(
        r=4, lora_alpha=8, rank_pattern={r".*\.0\..*": 2, "q_proj": 6},
        alpha_pattern={"model.layers.1.self_attn.k_proj": 3}, **BOTH),
    "layers": LoraConfig(r=4, layers_to_transform=[0, 2], layers_pattern="layers", **BOTH),
    "excluded": LoraConfig(r=4, exclude_modules=["up_proj"], **BOTH),
    "bias all": LoraConfig(r=4, bias="all", **BOTH),
    "bias lora_only": LoraConfig(r=4, bias="lora_only", **BOTH),
    "lora_bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=ATTENTION[:3]),
    "modules_to_save": LoraConfig(r=4, modules_to_save=["norm", "lm_head"], **BOTH),
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "up_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=4, trainable_token_indices=TOKENS, **BOTH),
    "tokens by name": LoraConfig(
        r=4, trainable_token_indices={"embed_tokens": [1], "lm_head": [2, 4]}, **BOTH),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, **BOTH),
    "dora embedding": LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "embed_tokens", "down_proj"]),
    "parameter": LoraConfig(
        r=4, lora_alpha=6, target_modules=FFN, target_parameters=["self_attn.q_proj.weight"]),
    "mica": LoraConfig(r=4, init_lora_weights="mica", **BOTH),
    "orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal", **BOTH),
    "gaussian": LoraConfig(r=4, init_lora_weights="gaussian", **BOTH),
    "dropout": LoraConfig(r=4, lora_dropout=0.1, **BOTH),
    "loha": LoHaConfig(r=4, alpha=6, init_weights=False, **BOTH),
    "loha patterns": LoHaConfig(
        r=4, alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, rank_dropout=0.1,
        init_weights=False, **BOTH),
    "lokr": LoKrConfig(r=2, alpha=3, init_weights=False, **BOTH),
    "lokr both": LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=2, rank_pattern={"up_proj": 1},
        init_weights=False, **BOTH),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 norms": IA3Config(
        target_modules=["q_proj", "up_proj", "down_proj"], modules_to_save=["norm"],
        feedforward_modules="model.*(up|down)_proj"),
}  # fmt: skip
"""Settings of every method, for a llama-like model with biases on q, k and v (qwen2)."""

WHOLE = {"bias all", "bias lora_only", "modules_to_save", "tokens", "tokens by name",
         "dora", "dora embedding"}  # fmt: skip
"""Of these a sliced adapter can hold a part wholly or not at all."""

QUICK = {"plain", "dora", "loha", "lokr both", "ia3", "tokens", "parameter", "lora_bias"}
EVERY = [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS]


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """A function method -> folders of a base and an adapter of that method."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(method: str) -> tuple[Path, Path]:
        if method not in made:
            base, _ = pair("qwen2")
            out = tmp_path_factory.mktemp("adapter") / method
            made[method] = base, save_peft(base, out, METHODS[method])
        return made[method]

    return make


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", EVERY)
def test_a_merge_of_everything_is_pefts(saved, tmp_path, method):
    base, adapter = saved(method)
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    expected = by_peft(base, adapter)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    taia.verify(tmp_path / "out")


@pytest.mark.parametrize("method", EVERY)
def test_a_merge_at_a_strength_is_a_blend_of_base_and_tuned(saved, tmp_path, method):
    base, adapter = saved(method)
    taia.splice(base, adapter, tmp_path / "out", keep="attention*0.3 + embedding", merge=True)
    before, after = weights(base), by_peft(base, adapter)
    for name, tensor in weights(tmp_path / "out").items():
        strength = 0.3 if "self_attn" in name else 1.0 if "embed_tokens" in name else 0.0
        expected = before[name] + strength * (after[name] - before[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
        if strength == 0:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("method", EVERY)
def test_slice_merge_and_attach_agree_and_the_model_is_restored(saved, tmp_path, method):
    base, adapter = saved(method)
    strength = "" if method in WHOLE else "*0.75"
    keep = f"attention{strength} + embedding + norm[1:]"
    if method in ("embedding", "dora embedding", "tokens", "tokens by name"):
        keep = f"attention{strength} + embedding"
    elif not {"norm", "embedding"} & kinds(adapter):
        keep = f"attention{strength}"
    elif "norm" in kinds(adapter):
        keep = f"attention{strength} + norm"
    taia.splice(base, adapter, tmp_path / "sliced", keep=keep)
    sliced = logits(PeftModel.from_pretrained(load(base), tmp_path / "sliced"))
    taia.verify(tmp_path / "sliced")

    model = load(base)
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    live = taia.attach(model, adapter)
    assert torch.equal(logits(model), plain)
    with live.using(keep):
        assert close(logits(model), sliced)
    with live.using("all"):
        everything = logits(model)
    assert close(everything, logits(PeftModel.from_pretrained(load(base), adapter)))
    assert torch.equal(logits(model), plain)
    live.close()
    assert model.state_dict().keys() == names.keys()
    assert all(torch.equal(t, names[n]) for n, t in model.state_dict().items())

    taia.splice(base, adapter, tmp_path / "merged", keep=keep, merge=True)
    merged = logits(load(tmp_path / "merged"))
    assert not close(merged, plain)
    assert close(merged, sliced)


def kinds(adapter: Path) -> set[str]:
    from taia.adapter import addresses_of

    opened = read_adapter(adapter).of("qwen2")
    return {address.kind.value for address in addresses_of(opened, "qwen2").values()}


@pytest.mark.parametrize("method", EVERY)
def test_a_live_model_has_any_strength(saved, tmp_path, method):
    base, adapter = saved(method)
    if method in ("bias all", "bias lora_only", "modules_to_save", "ia3 norms"):
        keep = "attention*0.4" if method in ("modules_to_save", "ia3 norms") else "ffn*0.4"
    else:
        keep = "all*0.4"
    taia.splice(base, adapter, tmp_path / "out", keep=keep, merge=True)
    model = load(base)
    with taia.attach(model, adapter).using(keep):
        assert close(logits(model), logits(load(tmp_path / "out")))


@pytest.mark.parametrize("method", ["dora", "tokens", "modules_to_save"])
def test_what_cannot_be_divided_is_refused_in_an_adapter(saved, tmp_path, method):
    base, adapter = saved(method)
    with pytest.raises(taia.TaiaError, match="kept whole or not at all; --merge"):
        taia.splice(base, adapter, tmp_path / "out", keep="all*0.5")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["plain", "lokr", "loha", "ia3", "dora"])
def test_what_is_kept_is_all_that_a_slice_holds(saved, tmp_path, method):
    base, adapter = saved(method)
    taia.splice(base, adapter, tmp_path / "out", keep="ffn")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert keys
    assert all(".mlp." in key for key in keys)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) <= set(FFN)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "ia3"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_every_family_merges_as_peft_merges(pair, tmp_path, model_type, method):
    base, _ = pair(model_type)
    names = linear_names(load(base))
    if model_type == "gpt2" and method in ("loha", "lokr"):
        pytest.skip("PEFT takes neither to gpt2's transposed layers")
    config = {
        "lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=names),
        "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=names),
        "loha": lambda: LoHaConfig(r=4, init_weights=False, target_modules=names),
        "lokr": lambda: LoKrConfig(r=2, init_weights=False, target_modules=names),
        "ia3": lambda: IA3Config(target_modules=names, feedforward_modules=names[-1:]),
    }[method]()
    adapter = save_peft(base, tmp_path / "a", config)
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    ours = load(tmp_path / "out").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    model = load(base)
    with taia.attach(model, adapter).using("all"):
        assert close(logits(model), logits(expected))


def test_ia3_is_bitwise_pefts(saved, tmp_path):
    """One product of two numbers has one rounding; sums of products depend on their order."""
    base, adapter = saved("ia3")
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    expected = by_peft(base, adapter)
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "out").items())
