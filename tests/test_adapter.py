"""Adapters: PEFT, attach and merge-then-splice agree on every sliced adapter."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from adapter_tools import SETTINGS, close, load, logits, save_adapter
from conftest import FAMILIES
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import taia
from taia.adapter import addresses_of, read_adapter
from taia.checkpoint import read_header
from taia.kinds import Kind
from taia.writing import header_digest

# PEFT says so each time an adapter is saved for a base that is not on the hub
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

KEEPS = ["attention", "all - ffn", "attention[1:]*0.5 + ffn[0]*1.25"]


QUICK = [
    ("llama", "patterns", KEEPS[2]),
    ("gpt2", "rslora", KEEPS[0]),
    ("mixtral", "plain", KEEPS[0]),
]
EVERY = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in product(FAMILIES, SETTINGS, KEEPS)
]


@pytest.mark.parametrize(("model_type", "setting", "keep"), EVERY)
def test_slice_attach_and_merge_agree(adapters, tmp_path, model_type, setting, keep):
    base, adapter = adapters(model_type, setting)
    if model_type == "mixtral" and "ffn" in keep.replace("all - ffn", ""):
        keep = "attention[1:]*0.5"  # stacked experts carry no LoRA module here
    if model_type == "mixtral" and keep == "all - ffn":
        keep = "all - router"
    sliced = tmp_path / "sliced"
    taia.splice(base, adapter, sliced, keep=keep)
    by_peft = logits(PeftModel.from_pretrained(load(base), sliced))

    model = load(base)
    plain = logits(model)
    live = taia.attach(model, adapter)
    assert torch.equal(logits(model), plain)
    with live.using(keep):
        by_attach = logits(model)
    assert torch.equal(logits(model), plain)

    taia.splice(base, adapter, tmp_path / "merged", keep=keep, merge=True)
    merged = logits(load(tmp_path / "merged"))
    assert not close(merged, plain)
    assert close(by_peft, by_attach)
    assert close(by_peft, merged)
    taia.verify(sliced)
    taia.verify(tmp_path / "merged")


def test_slice_then_merge_is_merge_then_splice(adapters, tmp_path):
    base, adapter = adapters("llama", "patterns")
    taia.slice_adapter(adapter, tmp_path / "sliced", keep="attention")
    taia.splice(base, tmp_path / "sliced", tmp_path / "one", keep="all", merge=True)
    taia.splice(base, adapter, tmp_path / "full", keep="all", merge=True)
    taia.splice(base, tmp_path / "full", tmp_path / "two", keep="attention")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in two)


def test_merge_of_everything_is_pefts_merge(adapters, tmp_path):
    base, adapter = adapters("gpt2", "rslora")
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    peft = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    ours = load(tmp_path / "out").state_dict()
    assert all(torch.allclose(ours[n], t, atol=1e-6) for n, t in peft.state_dict().items())


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sliced_adapter_obeys_the_rules_of_vllm_and_llama_cpp(adapters, tmp_path, setting):
    """vLLM: one rank and alpha, no patterns, no DoRA, no modules_to_save; scale = alpha / r.

    llama.cpp: one alpha, divided by each tensor's own rank.
    """
    _, adapter = adapters("llama", setting)
    taia.slice_adapter(adapter, tmp_path / "out", keep="attention")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert not config["modules_to_save"]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            rank = file.get_slice(key).get_shape()[0 if "lora_A" in key else 1]
            assert rank == config["r"]
            assert "self_attn" in key
    original = read_adapter(adapter)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in original.modules.values():
        if "self_attn" in module.name:
            a, b = original.factors(module)
            key = f"base_model.model.{module.name}.lora_{{}}.weight"
            delta = stored[key.format("B")] @ stored[key.format("A")]
            assert torch.allclose(delta, torch.from_numpy(module.scale * (b @ a)), atol=1e-6)


def test_targets_name_the_kept_modules_and_no_others(adapters, tmp_path):
    _, llama = adapters("llama", "plain")
    taia.slice_adapter(llama, tmp_path / "a", keep="attention")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    taia.slice_adapter(llama, tmp_path / "b", keep="attention.q[1]")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    _, gpt2 = adapters("gpt2", "plain")  # c_proj is in attention and in the FFN
    taia.slice_adapter(gpt2, tmp_path / "c", keep="attention")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert "c_proj" not in config["target_modules"]
    assert "transformer.h.0.attn.c_proj" in config["target_modules"]


def test_depth_comes_from_the_base_not_from_the_adapted_layers(pair, tmp_path):
    base, _ = pair("llama")
    adapter = save_adapter(base, tmp_path / "a", layers_to_transform=[0, 1], r=4, lora_alpha=4)
    taia.slice_adapter(adapter, tmp_path / "out", keep="attention[-2:]")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".")[4] for key in keys} == {"1"}


def test_dora_is_kept_whole_or_not_at_all(pair, tmp_path):
    base, _ = pair("llama")
    adapter = save_adapter(base, tmp_path / "a", use_dora=True, r=4, lora_alpha=6)
    taia.slice_adapter(adapter, tmp_path / "sliced", keep="attention")
    by_peft = logits(PeftModel.from_pretrained(load(base), tmp_path / "sliced"))
    taia.splice(base, adapter, tmp_path / "merged", keep="attention", merge=True)
    assert close(by_peft, logits(load(tmp_path / "merged")))
    model = load(base)
    with taia.attach(model, adapter).using("attention"):
        assert close(by_peft, logits(model))
    with pytest.raises(taia.TaiaError, match=r"DoRA at strength 0\.5"):
        taia.slice_adapter(adapter, tmp_path / "half", keep="attention*0.5")
    assert not (tmp_path / "half").exists()
    taia.splice(base, adapter, tmp_path / "half", keep="attention*0.5", merge=True)
    taia.verify(tmp_path / "half")


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_and_saved_modules_are_decided_by_kind(pair, tmp_path, bias):
    base, _ = pair("qwen2")
    adapter = save_adapter(
        base, tmp_path / "a", bias=bias, modules_to_save=["norm", "lm_head"], r=4, lora_alpha=4
    )
    addresses = addresses_of(read_adapter(adapter), "qwen2")
    assert addresses["lm_head.weight"].kind is Kind.HEAD
    assert addresses["model.norm.weight"].kind is Kind.NORM
    for keep in ("attention", "attention + norm + head", "all - ffn"):
        sliced = tmp_path / f"sliced {keep}"
        taia.slice_adapter(adapter, sliced, keep=keep)
        by_peft = logits(PeftModel.from_pretrained(load(base), sliced))
        taia.splice(base, adapter, tmp_path / f"merged {keep}", keep=keep, merge=True)
        assert close(by_peft, logits(load(tmp_path / f"merged {keep}"))), keep
        model = load(base)
        plain = logits(model)
        live = taia.attach(model, adapter)
        with live.using(keep):
            assert close(by_peft, logits(model)), keep
        assert torch.equal(logits(model), plain)
        taia.verify(sliced)


def test_an_adapter_for_another_model_is_refused_everywhere(adapters, pair, tmp_path):
    _, adapter = adapters("llama", "plain")
    other, _ = pair("gpt2")
    with pytest.raises(taia.TaiaError, match="does not fit"):
        taia.attach(load(other), adapter)
    with pytest.raises(taia.TaiaError):
        taia.splice(other, adapter, tmp_path / "out", keep="attention", merge=True)
    with pytest.raises(taia.TaiaError):
        taia.splice(other, adapter, tmp_path / "out", keep="attention")
    assert not (tmp_path / "out").exists()


def test_a_slice_without_a_base_needs_only_agreed_names(adapters, tmp_path):
    _, adapter = adapters("llama", "plain")
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (lonely / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "someone/something"})
    )
    (lonely / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    taia.slice_adapter(lonely, tmp_path / "out", keep="attention")
    one = load_file(tmp_path / "out" / "adapter_model.safetensors")
    taia.slice_adapter(adapter, tmp_path / "known", keep="attention")
    assert one.keys() == load_file(tmp_path / "known" / "adapter_model.safetensors").keys()


def test_one_model_takes_an_adapter_in_any_dtype(pair, tmp_path):
    base, _ = pair("llama", "bfloat16")
    adapter = save_adapter(base, tmp_path / "a", r=4, lora_alpha=8)
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = PeftModel.from_pretrained(build_copy(base), adapter).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=2**-7, atol=1e-3)


def build_copy(base: Path):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_lora_on_an_end_is_merged_although_peft_saves_the_weight_beside_it(pair, tmp_path, target):
    base, _ = pair("qwen2")
    adapter = save_adapter(
        base, tmp_path / "a", target_modules=[target, "q_proj"], r=4, lora_alpha=8
    )
    by_peft = logits(PeftModel.from_pretrained(load(base), adapter))
    taia.splice(base, adapter, tmp_path / "merged", keep="all", merge=True)
    assert close(by_peft, logits(load(tmp_path / "merged")))
    model = load(base)
    with taia.attach(model, adapter).using("all"):
        assert close(by_peft, logits(model))


def test_a_tied_end_is_not_merged_on_one_side(pair, tmp_path):
    shutil.copytree(pair("gpt2")[0], tmp_path / "base")
    base = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # true unless it says otherwise
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(
        base, tmp_path / "a", target_modules=["wte"], fan_in_fan_out=False, r=4, lora_alpha=8
    )
    with pytest.raises(taia.TaiaError, match="share this tensor"):
        taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)


def test_orientation_follows_the_architecture_not_the_configuration(pair, tmp_path):
    base, _ = pair("gpt2")
    adapter = save_adapter(base, tmp_path / "a", target_modules=["attn.c_proj"], r=4, lora_alpha=8)
    config = json.loads((adapter / "adapter_config.json").read_text())
    by_peft = logits(PeftModel.from_pretrained(load(base), adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    taia.splice(base, adapter, tmp_path / "merged", keep="all", merge=True)
    assert close(by_peft, logits(load(tmp_path / "merged")))


def test_layers_from_the_end_need_a_base(adapters, tmp_path):
    _, adapter = adapters("llama", "plain")
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (lonely / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    (lonely / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    for keep in ("attention[-2:]", "all*linear(0, 1)"):
        with pytest.raises(taia.TaiaError, match="name the base model"):
            taia.slice_adapter(lonely, tmp_path / "out", keep=keep)


def test_an_adapter_of_other_shapes_is_not_sliced(adapters, pair, tmp_path):
    _, adapter = adapters("llama", "plain")
    wide, _ = pair("llama", intermediate_size=64)
    with pytest.raises(taia.TaiaError, match="made for another model"):
        taia.splice(wide, adapter, tmp_path / "out", keep="attention")


def test_a_sliced_or_merged_output_does_not_replace_its_sources(adapters):
    base, adapter = adapters("llama", "plain")
    for out in (adapter, base, base.parent):
        with pytest.raises(taia.TaiaError, match="one of the two models"):
            taia.splice(base, adapter, out, overwrite=True)
    assert read_adapter(adapter).modules


def test_a_merge_takes_the_adapters_tokenizer_as_one_set(adapters, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(adapters("llama", "plain")[0], base)
    shutil.copytree(adapters("llama", "plain")[1], adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_text("base")
    (adapter / "chat_template.jinja").write_text("adapter")
    taia.splice(base, adapter, tmp_path / "template", keep="all", merge=True)
    assert (tmp_path / "template" / "chat_template.jinja").read_text() == "adapter"
    assert (tmp_path / "template" / "tokenizer.json").read_text() == "base"
    (adapter / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("adapter")
    taia.splice(base, adapter, tmp_path / "all", keep="all", merge=True)
    assert not (tmp_path / "all" / "chat_template.jinja").exists()
    assert (tmp_path / "all" / "tokenizer.json").read_text() == "adapter"
    taia.verify(tmp_path / "all")


def test_the_depth_of_a_gguf_base_is_read_from_its_head(adapters, tmp_path):
    from gguf import GGUFWriter

    _, adapter = adapters("llama", "plain")
    writer = GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_block_count(5)  # the adapter changes the first three
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    taia.splice(tmp_path / "base.gguf", adapter, tmp_path / "out", keep="attention[-3:]")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.split(".")[4] for key in keys} == {"2"}
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(taia.TaiaError, match="not a readable GGUF"):
        taia.splice(tmp_path / "broken.gguf", adapter, tmp_path / "no", keep="attention[-3:]")


def test_a_merge_verifies_where_products_are_summed_in_another_order(adapters, tmp_path):
    """Its digest guards the bytes; the sources guard what they mean."""
    import dataclasses

    from taia.hashing import digests
    from taia.receipt import Receipt

    base, adapter = adapters("llama", "plain")
    out = tmp_path / "out"
    receipt = taia.splice(base, adapter, out, keep="attention", merge=True)
    merged = [entry for entry in receipt.tensors if entry.origin == "blend"]
    assert all(entry.digest for entry in merged)
    assert not any(entry.digest for entry in receipt.tensors if entry.origin == "base")

    def changed(by: float) -> None:
        """The merge of a machine whose sums differ, with a receipt of its own."""
        tensors = load_file(out / "model.safetensors")
        tensors[merged[0].name] += by
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        now = read_header(out / "model.safetensors")
        rows = [dataclasses.replace(e, start=now[e.name].start, stop=now[e.name].stop)
                for e in receipt.tensors]  # fmt: skip
        found = digests(out, [e for e in rows if e.digest], receipt.algorithm)
        rows = [dataclasses.replace(e, digest=found.get(e.name)) for e in rows]
        head = header_digest(out / "model.safetensors")
        headers = {"model.safetensors": head}
        dataclasses.replace(receipt, tensors=rows, headers=headers).write(out)

    changed(1e-8)
    assert taia.verify(out) == Receipt.read(out)
    changed(1e-3)
    with pytest.raises(taia.VerificationError, match="differs from its source"):
        taia.verify(out)
