"""Sliced and extracted adapters under the rules of vLLM and of llama.cpp, re-stated.

vLLM (vllm/lora: peft_helper.py, lora_model.py, utils.py) wants `r`, `lora_alpha` and
`target_modules` in the configuration, knows no pattern, refuses DoRA, biases,
`modules_to_save` and a rank above `max_lora_rank`, reads keys that end in `lora_A.weight`,
`lora_B.weight`, `lora_embedding_A` or `lora_embedding_B`, and only of modules whose last name
is that of a linear layer (or embedding) of the model.

llama.cpp (convert_lora_to_gguf.py) wants `lora_alpha` and `base_model_name_or_path`, reads the
same four endings, skips `.base_layer.weight`, takes norms whole, stops at any other key, wants
both factors of a module, of one rank, and scales each by alpha / rank.
"""

from __future__ import annotations

import json

import pytest
import torch
from adapter_tools import SETTINGS, linear_names, load, save_adapter
from conftest import FAMILIES
from safetensors.torch import load_file, save_file

import taia
from taia.adapter import read_adapter

# PEFT says so each time an adapter is saved for a base that is not on the hub
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `max_lora_rank` can be."""


def vllm_faults(folder, modules):
    """What vLLM would say of an adapter for a model with modules of these last names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    faults = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    faults += [key for key in ("use_dora", "modules_to_save") if config.get(key)]
    faults += ["bias"] if config.get("bias", "none") != "none" else []
    faults += ["rank"] if config["r"] > max(VLLM_RANKS) else []
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module = next((key.removesuffix(end) for end in ENDINGS if key.endswith(end)), None)
        if module is None or not key.startswith("base_model.model."):
            faults.append(f"{key}: unsupported")
            continue
        if module.rpartition(".")[2] not in modules:
            faults.append(f"{key}: unexpected module")
        if config["r"] != tensor.shape[0 if "_A" in key else 1]:
            faults.append(f"{key}: its rank is not that of the configuration")
    return faults


def llama_cpp_faults(folder):
    """What llama.cpp's converter would stop at."""
    config = json.loads((folder / "adapter_config.json").read_text())
    faults = [k for k in ("lora_alpha", "base_model_name_or_path") if config.get(k) is None]
    pairs = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        end = next((end for end in ENDINGS if key.endswith(end)), None)
        if end is not None:
            pairs.setdefault(key.removesuffix(end), {})["A" if "_A" in end else "B"] = tensor
        elif ".base_layer.weight" not in key and "_layernorm" not in key and ".norm" not in key:
            faults.append(key)
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            faults.append(name)
    return faults


def delta_by_rule(folder, name):
    """alpha / rank * B @ A, as both tools compute it, with the rank of the tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    return config["lora_alpha"] / a.shape[0] * (b @ a)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("keep", ["attention", "attention[1:]*0.5 + ffn[0]*1.25"])
def test_a_sliced_adapter_obeys_both(adapters, tmp_path, setting, keep):
    base, adapter = adapters("llama", setting)
    taia.splice(base, adapter, tmp_path / "out", keep=keep)
    assert not vllm_faults(tmp_path / "out", linear_names(load(base)))
    assert not llama_cpp_faults(tmp_path / "out")
    opened = read_adapter(adapter)
    for module in opened.modules.values():
        if "layers.1.self_attn" in module.name:
            a, b = opened.factors(module)
            strength = 1 if keep == "attention" else 0.5
            expected = torch.from_numpy(strength * module.scale * (b @ a))
            found = delta_by_rule(tmp_path / "out", module.name)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "qwen3" else pytest.mark.slow) for f in FAMILIES]
)
def test_an_extracted_adapter_obeys_both(pair, tmp_path, family):
    base, tuned = pair(family)
    keep = "attention.q + attention.k + attention.v + attention.qkv + attention.o"
    kept = [p for p in keep.split(" + ") if p.partition(".")[2] in projections(base)]
    taia.extract(base, tuned, tmp_path / "out", 8, " + ".join(kept))
    whole = json.loads((tmp_path / "out" / "extract.json").read_text())["whole"]
    faults = vllm_faults(tmp_path / "out", linear_names(load(base)))
    assert bool(faults) == bool(whole)  # biases, of families that have them
    if not whole:
        assert not llama_cpp_faults(tmp_path / "out")


def projections(base):
    from taia.checkpoint import open_checkpoint
    from taia.kinds import classify_all

    checkpoint = open_checkpoint(base)
    addresses = classify_all(checkpoint.tensors, checkpoint.model_type).values()
    return {address.projection for address in addresses}


def test_the_rules_find_what_they_are_for(pair, tmp_path):
    """An adapter that PEFT alone reads breaks them: the tests above are not empty."""
    base, _ = pair("qwen2")
    for name, settings in {
        "dora": {"use_dora": True},
        "bias": {"bias": "lora_only"},
        "whole": {"modules_to_save": ["lm_head"]},
        "ranks": {"rank_pattern": {"q_proj": 8}},
    }.items():
        adapter = save_adapter(base, tmp_path / name, r=4, **settings)
        assert vllm_faults(adapter, linear_names(load(base))), name
        assert bool(llama_cpp_faults(adapter)) == (name != "ranks"), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "exact"), [(8, True), (1, True), (6, False), (5, False)])
def test_a_baked_scale_costs_a_16_bit_adapter_nothing(adapters, tmp_path, dtype, alpha, exact):
    """Powers of two keep dtype and bits; else B is float32 and off by at most 2**-24."""
    _, adapter = adapters("llama", "plain")
    half = tmp_path / "half"
    half.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (half / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    stored = load_file(adapter / "adapter_model.safetensors")
    stored = {key: tensor.to(dtype) for key, tensor in stored.items()}
    save_file(stored, half / "adapter_model.safetensors")
    taia.slice_adapter(half, tmp_path / "out", keep="attention")
    sliced = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in sliced.items():
        wanted = stored[key].double() * (alpha / config["r"] if "lora_B" in key else 1)
        if "lora_A" in key or exact:
            assert tensor.dtype == dtype
            assert torch.equal(tensor.double(), wanted)
        else:
            assert tensor.dtype == torch.float32
            assert ((tensor.double() - wanted).abs() <= wanted.abs() * 2**-24).all()
