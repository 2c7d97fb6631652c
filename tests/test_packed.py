"""Packed weights multiply as the layers do, and the layers are as before afterwards."""

from __future__ import annotations

import pytest
import torch
from adapter_tools import save_adapter
from chat_tools import byte_tokenizer
from conftest import build

import taia
from taia import packed as packed_weights
from taia.generation import generate
from taia.packed import packed

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this torch has no oneDNN with bfloat16",
)


@pytest.fixture
def model():
    return build("llama", 0, "bfloat16").eval()


def patched(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]


def linear(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if type(layer) is torch.nn.Linear]


@torch.inference_mode()
def test_a_base_gives_the_same_logits_and_is_left_as_it_was(model):
    tokens = torch.arange(24).view(2, 12)
    before = model(tokens).logits
    with packed(model):
        assert patched(model) == linear(model)
        assert torch.equal(model(tokens).logits, before)
    assert not patched(model)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("keep", ["all", "attention", "ffn*0.3", "none"])
@torch.inference_mode()
def test_an_attached_layer_gives_what_its_factors_say(pair, tmp_path, keep):
    base, _ = pair("llama", "bfloat16")
    adapter = save_adapter(base, tmp_path / "adapter", rank_pattern={"q_proj": 5})
    live = taia.attach(build("llama", 0, "bfloat16").eval(), adapter)
    torch.manual_seed(0)
    with live.using(keep):
        for name, layer in live.model.named_modules():
            if not hasattr(layer, "lora_variant"):
                continue
            x = torch.randn(3, 1, layer.in_features).bfloat16()
            exact = layer.base_layer.weight.double()
            if not layer.disable_adapters:
                a, b = (some["taia"].weight.double() for some in (layer.lora_A, layer.lora_B))
                exact = exact + layer.scaling["taia"] * b @ a
            expected = x.double() @ exact.T
            usual = (layer(x) - expected).abs().max()
            with packed(live.model):
                assert name in patched(live.model)
                off = (layer(x) - expected).abs().max()
            assert off <= 2 * usual + 1e-6 * expected.abs().max()
    assert not patched(live.model)


def test_weights_are_those_of_the_moment(model):
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        with packed(model):
            first = model(tokens).logits
        for name in linear(model):
            model.get_submodule(name).weight.mul_(1.5)
        with packed(model):
            second = model(tokens).logits
        assert not torch.equal(first, second)
        assert torch.equal(second, model(tokens).logits)


def test_what_cannot_be_packed_stays(model, monkeypatch):
    name = linear(model)[3]
    handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
    with packed(model):
        assert patched(model) == [one for one in linear(model) if one != name]
    handle.remove()
    with packed(model.float()):
        assert not patched(model)
    monkeypatch.setattr(packed_weights, "ROOM", 1000)
    with packed(model.bfloat16()):
        assert not patched(model)


def test_dora_and_layers_with_two_adapters_stay(pair, tmp_path):
    base, _ = pair("llama", "bfloat16")
    live = taia.attach(
        build("llama", 0, "bfloat16").eval(), save_adapter(base, tmp_path / "dora", use_dora=True)
    )
    wrapped = [name for name, layer in live.model.named_modules() if hasattr(layer, "lora_variant")]
    with live.using("all"), packed(live.model):
        assert not {*wrapped} & {*patched(live.model)}
    with packed(live.model):  # switched off they are their base layers
        assert {*wrapped} <= {*patched(live.model)}


def test_an_error_inside_leaves_the_layers(model):
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert not patched(model)


def test_texts_of_a_base_are_the_same_word_for_word(monkeypatch):
    model = build("llama", 0, "bfloat16", vocab_size=260).eval()
    prompts = [[257, *range(n)] for n in (3, 9, 20)]
    with_it = generate(model, byte_tokenizer(), prompts, max_new_tokens=12)
    monkeypatch.setattr(packed_weights, "ROOM", 0)
    assert generate(model, byte_tokenizer(), prompts, max_new_tokens=12) == with_it
