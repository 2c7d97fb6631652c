"""A live model: nothing is copied, everything is restored."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_tools import close, load, logits, save_adapter
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import taia

# PEFT says so each time an adapter is saved for a base that is not on the hub
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def test_attach_copies_no_weights_and_close_restores_the_model(adapters):
    base, adapter = adapters("llama", "plain")
    model = load(base)
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    live = taia.attach(model, adapter)
    held = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert set(weights.values()) <= held
    factors = sum(t.numel() for n, t in model.state_dict().items() if "lora_" in n)
    own = sum(t.numel() for n, t in model.state_dict().items() if "lora_" not in n)
    assert own == sum(t.numel() for t in load(base).state_dict().values())
    assert factors < own
    live.close()
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == weights


def test_using_restores_after_an_exception_and_nests(adapters):
    base, adapter = adapters("llama", "plain")
    model = load(base)
    live = taia.attach(model, adapter)
    plain = logits(model)
    with live.using("all"):
        everything = logits(model)
        with live.using("none"):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), everything)
        with pytest.raises(ValueError, match="odd"), live.using("attention"):
            raise ValueError("odd")
        assert torch.equal(logits(model), everything)
    assert torch.equal(logits(model), plain)


def test_bfloat16_factors_are_no_further_from_float32_than_a_bfloat16_merge(adapters):
    base, adapter = adapters("llama", "plain")
    exact = load(base)
    half, merged = load(base).bfloat16(), load(base).bfloat16()
    live = taia.attach(half, adapter)
    factors = {tensor.dtype for name, tensor in half.state_dict().items() if "lora_" in name}
    assert factors == {torch.bfloat16}
    merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    with taia.attach(exact, adapter).using("all"), live.using("all"):
        right = logits(exact)
        error = (logits(half).float() - right).pow(2).mean().sqrt()
    assert error < 1.5 * (logits(merged).float() - right).pow(2).mean().sqrt()
    live.close()


@pytest.mark.parametrize("safe", [False, True])
def test_a_bfloat16_layer_merges_as_peft_merges(adapters, safe):
    base, adapter = adapters("llama", "plain")
    model, peer = load(base).bfloat16(), load(base).bfloat16()
    live = taia.attach(model, adapter)
    peft = PeftModel.from_pretrained(peer, adapter, autocast_adapter_dtype=False)
    before = logits(model)
    with live.using("all"):
        for one in (model, peft):
            for layer in one.modules():
                if isinstance(layer, LoraLayer):
                    layer.merge(safe_merge=safe)
        assert torch.equal(logits(model), logits(peft))
        assert not torch.equal(logits(model), before)
        with pytest.raises(taia.TaiaError, match="unmerge them first"):
            live.close()
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.unmerge()
    assert (logits(model) - before).abs().max() < 0.05 * before.abs().max()


def test_dora_merges_whole_or_not_at_all(pair, tmp_path):
    base, _ = pair("llama")
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj"], r=4, use_dora=True)
    model = load(base)
    live = taia.attach(model, adapter)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with live.using("all*0.5"), pytest.raises(taia.TaiaError, match=r"at strength 0\.5"):
        layers[0].merge()
    with live.using("all"):
        tuned = logits(model)
        for layer in layers:
            layer.merge()
        assert close(logits(model), tuned)
        for layer in layers:
            layer.unmerge()
    assert close(logits(model), logits(load(base)))


def test_a_wrapped_module_of_several_kinds_is_not_kept_by_half(pair, tmp_path):
    base, _ = pair("llama")
    adapter = save_adapter(
        base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["layers.2"], r=4
    )
    model = load(base)
    live = taia.attach(model, adapter)
    with pytest.raises(taia.TaiaError, match="on or off as a whole"), live.using("attention"):
        pass
    with live.using("all"):
        assert close(logits(model), logits(PeftModel.from_pretrained(load(base), adapter)))


def test_a_configuration_that_contradicts_the_file_leaves_the_model_alone(adapters, tmp_path):
    base, adapter = adapters("llama", "plain")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = (adapter / "adapter_model.safetensors").read_bytes()
    (other / "adapter_model.safetensors").write_bytes(stored)
    for change in ({"target_modules": ["q_proj"]}, {"r": 7}, {"target_modules": ["typo"]}):
        (other / "adapter_config.json").write_text(json.dumps(config | change))
        model = load(base)
        names = list(model.state_dict())
        with pytest.raises(taia.TaiaError, match=r"disagree|of rank 4, the configuration says 7"):
            taia.attach(model, other)
        assert list(model.state_dict()) == names


def test_close_gives_back_modules_and_flags(pair, tmp_path):
    base, _ = pair("qwen2")
    adapter = save_adapter(
        base, tmp_path / "a", bias="all", modules_to_save=["norm"], r=4, lora_alpha=4
    )
    model = load(base)
    model.model.layers[0].train()
    plain = logits(load(base))
    modules = {name: id(module) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    live = taia.attach(model, adapter)
    with live.using("all"):
        pass
    live.close()
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == training
    assert torch.equal(logits(model), plain)
    with pytest.raises(taia.TaiaError, match="attach it again"), live.using("all"):
        pass
