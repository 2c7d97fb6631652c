"""What PEFT stores: everything explained, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import taia
from taia.adapter import read_adapter

# PEFT says so each time an adapter is saved for a base that is not on the hub
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "lora_alpha=8: not a setting of LoHa"),
        ({"peft_type": "OFT"}, "type OFT: it turns"),
        ({"target_parameters": ["q_proj.weight", "q_proj.extra"]}, "names 2 of it"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
    ],
)
def test_deltas_of_another_form_are_refused_by_name(adapters, tmp_path, change, message):
    _, adapter = adapters("llama", "plain")
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(config | change))
    (other / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(taia.TaiaError, match=message):
        taia.slice_adapter(other, tmp_path / "out", keep="attention")


def test_a_tensor_that_no_rule_explains_is_an_error(adapters, tmp_path):
    _, adapter = adapters("llama", "plain")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file(stored | {"base_model.model.model.lora_C": torch.ones(2)},
              other / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(taia.TaiaError, match="lora_C"):
        read_adapter(other)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": None},
        {"lora_alpha": "x"},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 3}},
        {"target_modules": [["q"]]},
        {"base_model_name_or_path": 5},
        {"peft_type": ["LORA"]},
    ],
)
def test_a_configuration_of_the_wrong_types_is_one_message(adapters, tmp_path, change):
    _, adapter = adapters("llama", "plain")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | change))
    (other / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(taia.TaiaError, match=r"not a LoRA configuration|an adapter of type \["):
        read_adapter(other)


@pytest.mark.parametrize(
    ("change", "part", "message"),
    [
        ({"r": 3}, None, "of rank 4, the configuration says 3"),
        ({"use_dora": True}, None, "has no lora_magnitude_vector"),
        ({}, ".lora_magnitude_vector", "does not say use_dora"),
        ({}, ".lora_B.bias", "does not say lora_bias"),
    ],
)
def test_a_file_that_is_not_what_its_configuration_says_is_refused(
    adapters, tmp_path, change, part, message
):
    """PEFT drops such a tensor, or makes one up: with a warning, and another model."""
    _, adapter = adapters("llama", "plain")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | change))
    stored = load_file(adapter / "adapter_model.safetensors")
    if part is not None:
        stem, b = next((k.removesuffix(".lora_B.weight"), v) for k, v in stored.items()
                       if k.endswith(".lora_B.weight"))  # fmt: skip
        stored[stem + part] = torch.ones(len(b))
    save_file(stored, other / "adapter_model.safetensors")
    with pytest.raises(taia.TaiaError, match=message):
        read_adapter(other)
