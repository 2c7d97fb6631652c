"""Quantised checkpoints with the tensors that the quantisers of transformers store."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, SMALL, build
from layout_tools import tensors, write

import taia
from taia.checkpoint import Tensor
from taia.folded import folded_faults
from taia.kinds import classify_all
from taia.quantised import modules

BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def linears(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if name.endswith("_proj.weight")]


def fp8_blocks(state):
    """Block-wise FP8, as DeepSeek-V3 stores it."""
    out = dict(state)
    for name in linears(state):
        rows, columns = (-(-n // 16) for n in state[name].shape)
        out[name] = state[name].to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = torch.rand(rows, columns)
    return out


def fp8_tensors(state):
    """Per-tensor FP8 of compressed-tensors."""
    out = dict(state)
    for name in linears(state):
        out[name] = state[name].to(torch.float8_e4m3fn)
        out[f"{name}_scale"] = torch.rand(1)
        out[f"{name.removesuffix('weight')}input_scale"] = torch.rand(1)
    return out


def packed(state):
    """4 bits of compressed-tensors, packed."""
    out = dict(state)
    for name in linears(state):
        weight = out.pop(name)
        rows, columns = weight.shape
        out[f"{name}_packed"] = torch.randint(-9, 9, (rows, columns // 8), dtype=torch.int32)
        out[f"{name}_scale"] = torch.rand(rows, columns // 16)
        out[f"{name}_shape"] = torch.tensor(weight.shape)
    return out


def gptq(state):
    out = dict(state)
    for name in linears(state):
        weight, module = out.pop(name), name.removesuffix(".weight")
        rows, columns = weight.shape
        out[f"{module}.qweight"] = torch.randint(-9, 9, (columns // 8, rows), dtype=torch.int32)
        out[f"{module}.qzeros"] = torch.randint(-9, 9, (1, rows // 8), dtype=torch.int32)
        out[f"{module}.scales"] = torch.rand(1, rows).half()
        out[f"{module}.g_idx"] = torch.arange(columns, dtype=torch.int32)
    return out


def awq(state, norms=torch.ones_like):
    """AWQ, with norms of one set of folded scales."""
    return {name: norms(t) if "norm" in name else t
            for name, t in gptq(state).items() if not name.endswith("g_idx")}  # fmt: skip


def nf4(state):
    """bitsandbytes 4 bit with nested statistics; the state is JSON, so its length varies."""
    out = dict(state)
    for name in linears(state):
        weight = out[name]
        told = json.dumps({"blocksize": 64, "offset": float(weight.sum())}).encode()
        told += b" " * int(torch.randint(0, 9, ()))
        out[name] = torch.randint(0, 255, (weight.numel() // 2, 1), dtype=torch.uint8)
        out[f"{name}.absmax"] = torch.randint(0, 255, (weight.numel() // 64,), dtype=torch.uint8)
        out[f"{name}.quant_map"] = torch.rand(16)
        out[f"{name}.nested_absmax"] = torch.rand(1)
        out[f"{name}.nested_quant_map"] = torch.rand(256)
        out[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(told), dtype=torch.uint8)
    return out


def int8(state):
    out = dict(state)
    for name in linears(state):
        out[name] = torch.randint(-9, 9, state[name].shape, dtype=torch.int8)
        out[name.replace(".weight", ".SCB")] = torch.rand(state[name].shape[0])
        out[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
    return out


FORMATS = {
    "fp8-blocks": (fp8_blocks, BLOCK),
    "fp8-tensors": (fp8_tensors, {"quant_method": "compressed-tensors", "format": "float"}),
    "packed": (packed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True,
                  "bnb_4bit_quant_type": "nf4", "_load_in_4bit": True}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantised(pair, tmp_path_factory):
    """A function (format, changed settings) -> folders of a base and of a tuned checkpoint."""
    made = {}

    def make(name: str, **changes) -> tuple[Path, Path]:
        key = (name, repr(changes))
        if key not in made:
            pack, settings = FORMATS[name]
            root = tmp_path_factory.mktemp(name)
            torch.manual_seed(len(made))
            made[key] = tuple(
                write(root / side, pack(tensors(folder)), folder,
                      quantization_config=settings | changes)
                for side, folder in zip(("base", "tuned"), pair("llama"), strict=True)
            )  # fmt: skip
        return made[key]

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_the_tensors_of_a_module_travel_together(quantised, pair, tmp_path, name):
    base, tuned = quantised(name)
    old, new = tensors(base), tensors(tuned)
    for keep, side in (
        ("all", lambda _: True), ("none", lambda _: False),
        ("attention", lambda n: "self_attn" in n),
        ("attention.q", lambda n: "q_proj" in n),
        ("ffn[1:2]", lambda n: "layers.1.mlp" in n),
    ):  # fmt: skip
        taia.splice(base, tuned, tmp_path / "out", keep=keep, overwrite=True)
        taia.verify(tmp_path / "out")
        out = tensors(tmp_path / "out")
        assert out.keys() == old.keys()
        for stored, tensor in out.items():
            expected = (new if side(stored) else old)[stored]
            assert tensor.dtype == expected.dtype
            assert tensor.shape == expected.shape
            assert tensor.view(torch.uint8).equal(expected.view(torch.uint8)) or not tensor.dim()
    held = modules(old)
    assert len(set(held.values())) == len(linears(tensors(pair("llama")[0])))
    assert all("_proj" in stored for stored in held)


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_not_blended_and_the_rest_is(quantised, tmp_path, name):
    base, tuned = quantised(name)
    with pytest.raises(taia.TaiaError, match="quantised weights are taken whole"):
        taia.splice(base, tuned, tmp_path / "out", keep="attention*0.5")
    taia.splice(base, tuned, tmp_path / "out", keep="attention + norm*0.5")
    taia.verify(tmp_path / "out")


def test_a_layer_with_folded_scales_is_taken_whole(pair, tmp_path):
    settings = FORMATS["awq"][1]
    for side, folder in zip(("base", "tuned"), pair("llama"), strict=True):
        state = awq(tensors(folder), norms=lambda norm: norm)
        write(tmp_path / side, state, folder, quantization_config=settings)
    models = tmp_path / "base", tmp_path / "tuned"
    for keep in ("attention", "ffn", "attention + norm", "all - norm"):
        with pytest.raises(taia.TaiaError, match=r"layer 0 .*: its norms differ"):
            taia.splice(*models, tmp_path / "out", keep=keep)
    whole = ("all", "none", "attention[1:2] + ffn[1:2] + norm[1:2]", "embedding + head")
    for keep in whole:
        taia.splice(*models, tmp_path / "out", keep=keep, overwrite=True)
        taia.verify(tmp_path / "out")


def test_projections_that_scale_each_other_are_taken_together(quantised, tmp_path):
    base, tuned = quantised("awq")
    for keep in ("attention.v", "attention - attention.o", "ffn.up"):
        with pytest.raises(taia.TaiaError, match="hold scales of each other"):
            taia.splice(base, tuned, tmp_path / "out", keep=keep)
    taia.splice(base, tuned, tmp_path / "out", keep="attention.v + attention.o + ffn.gate")


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """Two gpt-oss checkpoints with their experts as MXFP4: blocks of 4-bit pairs, and scales."""
    root = tmp_path_factory.mktemp("mxfp4")
    for seed, name in enumerate(("base", "tuned")):
        FAMILIES["gpt_oss"] = {**SMALL, "head_dim": 8, "num_local_experts": 4,
                               "num_experts_per_tok": 2, "intermediate_size": 32}  # fmt: skip
        build("gpt_oss", seed, "bfloat16").save_pretrained(root / f"{name}-plain")
        state = tensors(root / f"{name}-plain")
        for stored in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = state.pop(stored).shape
            shape = (experts, rows, columns // 32)
            state[f"{stored}_blocks"] = torch.randint(0, 255, (*shape, 16), dtype=torch.uint8)
            state[f"{stored}_scales"] = torch.randint(0, 255, shape, dtype=torch.uint8)
        settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        write(root / name, state, root / f"{name}-plain", quantization_config=settings)
    return root


def test_blocks_and_scales_of_experts_travel_together(mxfp4, tmp_path):
    base, tuned = mxfp4 / "base", mxfp4 / "tuned"
    old, new = tensors(base), tensors(tuned)
    assert any(name.endswith("gate_up_proj_blocks") for name in old)
    taia.splice(base, tuned, tmp_path / "out", keep="ffn.gate_up + attention*0.5")
    taia.verify(tmp_path / "out")
    for name, tensor in tensors(tmp_path / "out").items():
        if "self_attn" not in name:
            side = new if "gate_up_proj" in name else old
            assert torch.equal(tensor, side[name]), name
    for keep in ("ffn*0.5", "ffn.up", "ffn.gate"):
        with pytest.raises(taia.TaiaError, match=r"mlp\.experts\.gate_up_proj: "):
            taia.splice(base, tuned, tmp_path / "refused", keep=keep)


def test_unpacked_experts_are_not_mixed_with_packed_ones(mxfp4, tmp_path):
    for first, second in (("base", "tuned-plain"), ("base-plain", "tuned")):
        with pytest.raises(taia.TaiaError, match=r"is quantised \(mxfp4\)"):
            taia.splice(mxfp4 / first, mxfp4 / second, tmp_path / "out")


def test_formats_and_settings_are_not_mixed(quantised, pair, tmp_path):
    plain, _ = pair("llama")
    for first, second, words in (
        (quantised("gptq")[0], plain, "the base is quantised (gptq), the tuned model is not"),
        (plain, quantised("nf4")[0], "the tuned model is quantised (bitsandbytes)"),
        (quantised("gptq")[0], quantised("awq")[1], "base gptq, tuned awq"),
        (quantised("gptq")[0], quantised("gptq", group_size=64)[1], "group_size 32 and 64"),
    ):
        with pytest.raises(taia.TaiaError) as caught:
            taia.splice(first, second, tmp_path / "out")
        assert words in str(caught.value)
        assert "save both in one format" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_settings_that_say_nothing_may_differ(quantised):
    base, _ = quantised("fp8-blocks", modules_to_not_convert=["lm_head", "a"])
    _, tuned = quantised("fp8-blocks", modules_to_not_convert=["a", "lm_head"], _private=1)
    taia.plan(base, tuned).refuse_faults()


@pytest.mark.parametrize("name", FORMATS)
def test_a_setting_that_is_null_is_one_that_is_not_there(quantised, name):
    (base, tuned), (empty, filled) = quantised(name), quantised(name, model_seqlen=None)
    taia.plan(base, filled).refuse_faults()
    taia.plan(empty, tuned).refuse_faults()


def test_a_quantised_checkpoint_is_known_without_settings(quantised, pair, tmp_path):
    plain, _ = pair("llama")
    bare = write(tmp_path / "bare", tensors(quantised("fp8-blocks")[0]), plain)
    with pytest.raises(taia.TaiaError, match="by its tensors"):
        taia.plan(bare, plain).refuse_faults()


def test_a_scale_that_is_missing_is_told(quantised, tmp_path):
    base, tuned = quantised("fp8-blocks")
    state = tensors(tuned)
    del state["model.layers.1.mlp.up_proj.weight_scale_inv"]
    short = write(tmp_path / "short", state, tuned)
    with pytest.raises(taia.TaiaError, match=r"up_proj\.weight_scale_inv: in the base, not in"):
        taia.plan(base, short).refuse_faults()


def checkpoint(model_type: str, modules: list[str]) -> SimpleNamespace:
    """What is asked of an AWQ checkpoint, of one layer of these modules, with no norms."""
    tensors = {f"model.layers.0.{name}.qweight": None for name in modules}
    return SimpleNamespace(
        config={"quantization_config": {"quant_method": "awq"}}, tensors=tensors, path=Path("gone"),
        model_type=model_type,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "modules", "kept", "words"),
    [
        ("phi3", ["self_attn.qkv_proj", "self_attn.o_proj"], "o_proj", "o and qkv"),
        ("phi3", ["mlp.gate_up_proj", "mlp.down_proj"], "down_proj", "down and gate_up"),
        ("llama", ["mlp.up_proj", "mlp.down_proj"], "up_proj", "down and up"),
        ("llama", ["self_attn.q_proj", "self_attn.o_proj"], "q_proj", ""),
    ],
)
def test_fused_projections_hold_scales_too(model_type, modules, kept, words):
    found = checkpoint(model_type, modules)
    addresses = classify_all(found.tensors, model_type)
    strengths = {name: float(kept in name) for name in found.tensors}
    faults = folded_faults(found, found, addresses, strengths)
    assert [words in fault for fault in faults] == [True] * bool(words)


def test_what_else_reads_a_norm_is_of_its_layer(tmp_path):
    names = ["linear_attn.in_proj_qkvz.qweight", "mlp.gate.weight", "mlp.experts.0.up_proj.qweight"]
    norm = Tensor("model.layers.0.input_layernorm.weight", "F32", (2,), "w", 0, 8)
    base, tuned = checkpoint("qwen3_next", []), checkpoint("qwen3_next", [])
    for number, side in enumerate((base, tuned)):
        side.path = tmp_path / str(number)
        side.path.mkdir()
        (side.path / "w").write_bytes(bytes([number]) * 8)
        side.tensors = {f"model.layers.0.{name}": None for name in names} | {norm.name: norm}
    addresses = classify_all(base.tensors, "qwen3_next")
    for dropped in names:
        strengths = {name: float(not name.endswith(dropped)) for name in base.tensors}
        assert "its norms differ" in folded_faults(base, tuned, addresses, strengths)[0]
    assert not folded_faults(base, tuned, addresses, dict.fromkeys(base.tensors, 1.0))
