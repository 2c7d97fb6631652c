"""LoRA on stacked experts: the keys name no parameter, and yet each finds its own."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from adapter_tools import close, load, logits, save_peft
from conftest import SMALL
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import taia
from taia.adapter import read_adapter
from taia.stacked import IN_OUT_TYPES, ORDER

pytestmark = [
    # PEFT says so each time an adapter is saved for a base that is not on the hub
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    # its patterns are compared with modules alone
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
]

EXPERTS = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                "intermediate_size": 32},  # square, as in the real one: (experts, in, out)
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip
PARAMETERS = {
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "llama4_text": ["feed_forward.experts.down_proj"],
}


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """A function (model_type, settings) -> folders of a base with stacked experts, an adapter."""
    made: dict[str, tuple] = {}

    def make(model_type, **settings):
        key = f"{model_type}{settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(model_type, **(SMALL | EXPERTS[model_type]))
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder / "base")
            fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"],
                      "target_parameters": PARAMETERS[model_type]}  # fmt: skip
            peft = LoraConfig(**(fields | settings))
            made[key] = folder / "base", save_peft(folder / "base", folder / "adapter", peft)
        return made[key]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXPERTS)
def test_stacked_experts_merge_slice_and_attach(stacked, tmp_path, model_type):
    base, adapter = stacked(model_type)
    taia.splice(base, adapter, tmp_path / "merged", keep="all", merge=True)
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    for keep in ("ffn", "attention", "ffn[0]*0.5 + attention"):
        out = tmp_path / keep
        taia.splice(base, adapter, out, keep=keep)
        sliced = logits(PeftModel.from_pretrained(load(base), out))
        model = load(base)
        plain = logits(model)
        live = taia.attach(model, adapter)
        with live.using(keep):
            assert close(logits(model), sliced)
        assert torch.equal(logits(model), plain)
        live.close()
        assert torch.equal(logits(model), plain)
        taia.splice(base, adapter, tmp_path / f"{keep} merged", keep=keep, merge=True)
        assert close(logits(load(tmp_path / f"{keep} merged")), sliced)
        taia.verify(out)


def test_one_of_two_parameters_moves_to_the_outermost_wrapper(stacked, tmp_path):
    base, adapter = stacked("gpt_oss", rank_pattern={"mlp.experts.down_proj": 2})
    assert {type(c).__name__ for c in read_adapter(adapter).modules.values()} == {
        "LoraModule", "StackedModule"
    }  # fmt: skip
    full = load_file(adapter / "adapter_model.safetensors")
    assert any(".experts.base_layer.lora_A" in key for key in full)
    for keep in ("ffn.gate_up", "ffn.down"):
        taia.splice(base, adapter, tmp_path / keep, keep=keep)
        keys = load_file(tmp_path / keep / "adapter_model.safetensors")
        assert not any("base_layer" in key for key in keys)
        sliced = logits(PeftModel.from_pretrained(load(base), tmp_path / keep))
        taia.splice(base, adapter, tmp_path / f"{keep} merged", keep=keep, merge=True)
        assert close(logits(load(tmp_path / f"{keep} merged")), sliced)


def test_the_tables_are_what_transformers_has():
    """Orientation and order of the parameters, read from the sources of transformers."""
    from pathlib import Path

    import transformers.models

    transposed, orders = set(), set()
    for file in Path(inspect.getfile(transformers.models)).parent.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "is_transposed=True" in text:
            transposed.add(file.parent.name)
        for body in re.split(r"\nclass ", text)[1:]:
            if "xperts" in body.partition("(")[0]:
                names = re.findall(r"self\.(\w+) = nn\.Parameter\(", body)
                if len(names) > 1:
                    orders.add(tuple(names))
    assert transposed <= IN_OUT_TYPES
    for order in orders:
        assert list(order) == sorted(order, key=ORDER.index)


@pytest.mark.parametrize(
    "model_type", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def test_experts_that_the_base_stores_one_by_one(tmp_path, model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "num_local_experts": 4,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
    }
    config = AutoConfig.for_model(model_type, **(SMALL | sizes))
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = save_peft(
        base,
        tmp_path / "adapter",
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets),
    )
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    taia.splice(base, adapter, tmp_path / "merged", keep="all", merge=True)
    found = load(tmp_path / "merged").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    taia.splice(base, adapter, tmp_path / "half", keep="ffn*0.5", merge=True)
    taia.verify(tmp_path / "half")
    taia.splice(base, adapter, tmp_path / "sliced", keep="ffn*0.5")
    sliced = PeftModel.from_pretrained(load(base), tmp_path / "sliced")
    assert close(logits(sliced), logits(load(tmp_path / "half")))
