"""No setting of PEFT is silently ignored: each is read, known to be inert, or refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from adapter_tools import linear_names, load, save_adapter
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftType

import taia
from taia import peft_config
from taia.adapter import read_adapter
from taia.errors import CheckpointError
from taia.molora import MoLoraConfig, register
from taia.peft_config import INERT, METHODS, OTHER_METHODS, READ, REFUSED, read_settings

# PEFT says so each time an adapter is saved for a base that is not on the hub
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

register()
CONFIGS = {
    "LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig, "IA3": IA3Config,
    "MOLORA": MoLoraConfig,
}  # fmt: skip


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_is_read_inert_or_refused(method):
    fields = {f.name for f in dataclasses.fields(CONFIGS[method])}
    refused = set(REFUSED) if method in ("LORA", "MOLORA") else set()
    refused |= {"lora_bias", "use_dora"} if method == "MOLORA" else set()
    assert fields <= READ[method] | INERT | refused
    assert READ[method] <= fields
    assert not READ[method] & INERT
    assert not (READ[method] | INERT) & refused


def test_the_tables_hold_nothing_that_peft_does_not_have():
    fields = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)}
    assert fields >= INERT | set(REFUSED)


def test_every_method_of_peft_is_read_or_refused_with_a_reason():
    assert METHODS.keys() | OTHER_METHODS.keys() == {t.value for t in PeftType}
    assert not METHODS.keys() & OTHER_METHODS.keys()


def altered(adapter, out, **change):
    out.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | change))
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (out / "adapter_model.safetensors").write_bytes(weights)
    return out


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_are_refused_by_name(adapters, tmp_path, method):
    base, adapter = adapters("llama", "plain")
    other = altered(adapter, tmp_path / "other", peft_type=method)
    with pytest.raises(taia.TaiaError, match=rf"type {method}: .*; read are LoRA, LoHa"):
        taia.splice(base, other, tmp_path / "out")


@pytest.mark.parametrize("setting", [*REFUSED, "a_setting_of_next_year"])
def test_settings_that_make_another_delta_are_refused_by_name(adapters, tmp_path, setting):
    base, adapter = adapters("llama", "plain")
    other = altered(adapter, tmp_path / "other", **{setting: [1]})
    for merge in (False, True):
        with pytest.raises(taia.TaiaError, match=setting):
            taia.splice(base, other, tmp_path / "out", merge=merge)
    with pytest.raises(taia.TaiaError, match=setting):
        taia.attach(load(base), other)


@pytest.mark.parametrize(
    "setting", sorted(INERT & {f.name for f in dataclasses.fields(LoraConfig)})
)
def test_inert_settings_do_not_change_the_merge(adapters, tmp_path, setting):
    """What is called inert is: an adapter without the setting gives the same bytes."""
    base, adapter = adapters("llama", "plain")
    if setting == "peft_type":
        return
    other = altered(adapter, tmp_path / "other", **{setting: None})
    for folder, out in ((adapter, tmp_path / "one"), (other, tmp_path / "two")):
        taia.splice(base, folder, out, keep="all", merge=True)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_is_refused_until_peft_converts_it(pair, tmp_path, start):
    base, _ = pair("llama")
    model = load(base)
    config = LoraConfig(r=4, init_lora_weights=start, target_modules=linear_names(model))
    peft = get_peft_model(model, config)
    peft.peft_config["default"].init_lora_weights = True  # so that PEFT saves where it began
    peft.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft.peft_config["default"].init_lora_weights = start
    peft.save_pretrained(tmp_path / "raw")
    with pytest.raises(taia.TaiaError, match="changed the base weights"):
        read_adapter(tmp_path / "raw")
    peft.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    expected = peft.merge_and_unload().state_dict()
    taia.splice(base, tmp_path / "plain", tmp_path / "out", keep="all", merge=True)
    for name, tensor in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_velora_acts_in_training_only(pair, tmp_path):
    base, _ = pair("llama")
    adapter = save_adapter(
        base, tmp_path / "a", r=4, target_modules=["q_proj"], velora_config={"num_groups": 8}
    )
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


HUGE = 10**400
"""A number that JSON holds and no float does."""


@pytest.mark.parametrize(
    ("method", "change", "told"),
    [
        ("LOKR", {"r": HUGE}, "r: a rank of more than 1,000,000"),
        ("LOHA", {"rank_pattern": {"q_proj": HUGE}}, "q_proj: a rank of more than 1,000,000"),
        ("LORA", {"r": 0}, "r: a rank of 0"),
        ("MOLORA", {"experts": HUGE, "experts_per_token": 2}, "experts: more than 1,000,000"),
        ("LORA", {"lora_alpha": HUGE}, "lora_alpha"),
        ("LOKR", {"alpha_pattern": {"q_proj": -HUGE}}, "alpha_pattern"),
    ],
)
def test_numbers_that_no_adapter_can_have_are_faults(tmp_path, method, change, told):
    with pytest.raises(CheckpointError) as caught:
        read_settings(tmp_path / "adapter_config.json", {"peft_type": method, **change})
    assert told in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_never_end_is_refused(adapters, tmp_path, monkeypatch, name):
    base, adapter = adapters("llama", "plain")
    slow = altered(adapter, tmp_path / "slow", **{name: {"(?:.|.)*(?:.|.)*[!?]": 4}})
    monkeypatch.setattr(peft_config, "MATCHING_SECONDS", 0.1)
    with pytest.raises(taia.TaiaError, match=r"takes more than 0\.1 s on"):
        taia.splice(base, slow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["(?x)q_proj#", "(?V0)(?V1)q_proj", "("])
def test_a_pattern_that_peft_could_not_read_is_refused(adapters, tmp_path, pattern):
    base, adapter = adapters("llama", "plain")
    broken = altered(adapter, tmp_path / "broken", rank_pattern={pattern: 4})
    with pytest.raises(taia.TaiaError, match="is no regular expression"):
        taia.splice(base, broken, tmp_path / "out")


def test_many_slow_patterns_are_no_more_patience(adapters, tmp_path, monkeypatch):
    base, adapter = adapters("llama", "plain")
    monkeypatch.setattr(peft_config, "MATCHING_SECONDS", 0.05)
    monkeypatch.setattr(peft_config, "SLOW_SECONDS", 0.0)  # so every match counts

    def ask() -> None:
        for _ in range(100_000):
            peft_config.matches("q_pro[a-z]", "model.layers.0.self_attn.q_proj")

    with pytest.raises(taia.TaiaError, match=r"takes more than 0\.05 s"):
        ask()
    many = {f"layers\\.[{number}]\\.q_proj": 4 for number in range(101)}
    crowded = altered(adapter, tmp_path / "crowded", alpha_pattern=many)
    with pytest.raises(taia.TaiaError, match="101 expressions, where 100 are the most"):
        taia.splice(base, crowded, tmp_path / "out")
