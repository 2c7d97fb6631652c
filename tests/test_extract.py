"""A full fine-tune's kept deltas as an adapter: exact at full rank, its error told at any."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from adapter_tools import close, load, logits
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from peft import PeftModel
from safetensors.torch import load_file, save_file

import taia
from taia.errors import VerificationError
from taia.factorise import factorise


def spliced(base, tuned, out, keep):
    taia.splice(base, tuned, out, keep=keep)
    return logits(load(out))


QUICK = {("llama", "attention"), ("qwen2", "all"), ("gpt2", "all - embedding - head")}
EVERY = [
    pytest.param(family, keep, marks=[] if (family, keep) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for keep in ("attention", "all - embedding - head", "ffn*0.5 + router")
    if not (family != "mixtral" and "router" in keep)
] + [("qwen2", "all")]


@pytest.mark.parametrize(("model_type", "keep"), EVERY)
def test_full_rank_is_the_splice(pair, tmp_path, model_type, keep):
    base, tuned = pair(model_type)
    extraction = taia.extract(base, tuned, tmp_path / "adapter", None, keep)
    assert extraction.error < 1e-5
    expected = spliced(base, tuned, tmp_path / "spliced", keep)
    model = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert torch.allclose(logits(model), expected, atol=1e-4)
    taia.verify(tmp_path / "adapter")


def test_the_error_that_is_told_is_the_error_that_is(pair, tmp_path):
    base, tuned = pair("llama")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    errors = []
    for rank in (1, 4, 16):
        out = tmp_path / str(rank)
        extraction = taia.extract(base, tuned, out, rank)
        factors = load_file(out / "adapter_model.safetensors")
        told = json.loads((out / "extract.json").read_text())
        assert told == json.loads(json.dumps(extraction.to_json()))
        for row in told["matrices"]:
            stem = f"base_model.model.{row['name'].removesuffix('.weight')}.lora_"
            delta = after[row["name"]] - before[row["name"]]
            lost = delta - factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
            assert row["error"] == pytest.approx(
                float(lost.norm() / delta.norm()), rel=1e-4, abs=1e-6
            )
            best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
            assert row["error"] == pytest.approx(
                float(best), rel=1e-4, abs=1e-6
            )  # Eckart and Young
        errors.append(extraction.error)
    assert errors == sorted(errors, reverse=True)


def test_an_extracted_adapter_is_portable(pair, tmp_path):
    base, tuned = pair("llama")
    taia.extract(base, tuned, tmp_path / "out", 8)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    taia.slice_adapter(tmp_path / "out", tmp_path / "sliced", keep="attention.q")  # our own reader
    model = load(base)
    with taia.attach(model, tmp_path / "out").using("all"):
        attached = logits(model)
    assert close(attached, logits(PeftModel.from_pretrained(load(base), tmp_path / "out")))


def test_stacked_and_separate_experts(pair, tmp_path):
    """mixtral stores its experts one by one and runs them stacked: PEFT's target_parameters."""
    base, tuned = pair("mixtral")
    extraction = taia.extract(base, tuned, tmp_path / "out", 4, "ffn")
    assert {len(row.shape) for row in extraction.matrices} == {3}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert len(config["target_parameters"]) == 6
    model = load(base)
    with taia.attach(model, tmp_path / "out").using("all"):
        attached = logits(model)
    assert close(attached, logits(PeftModel.from_pretrained(load(base), tmp_path / "out")))


@pytest.mark.parametrize("keep", ["ffn", "router", "attention + router + ffn"])
def test_experts_and_routers_that_the_base_stores_otherwise_merge_back(pair, tmp_path, keep):
    """mixtral's live `mlp.gate` lies in `block_sparse_moe.gate`, its experts one by one."""
    base, tuned = pair("mixtral")
    taia.extract(base, tuned, tmp_path / "extracted", None, keep)
    taia.splice(base, tmp_path / "extracted", tmp_path / "sliced", keep)
    taia.splice(base, tmp_path / "sliced", tmp_path / "merged", keep, merge=True)
    taia.splice(base, tuned, tmp_path / "spliced", keep)
    assert close(logits(load(tmp_path / "merged")), logits(load(tmp_path / "spliced")))
    taia.verify(tmp_path / "merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_delta_without_a_size_is_one_message(pair, tmp_path, value):
    base, tuned = pair("llama")
    shutil.copytree(tuned, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.self_attn.q_proj.weight"][3, 4] = value
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(taia.TaiaError, match="its delta is not finite"):
        taia.extract(base, tmp_path / "broken", tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_vectors_are_whole_and_told(pair, tmp_path):
    base, tuned = pair("qwen2")
    extraction = taia.extract(base, tuned, tmp_path / "out", 4, "attention + norm")
    assert {name.rpartition(".")[2] for name in extraction.whole} == {"weight", "bias"}
    assert "vLLM does not" in (tmp_path / "out" / "README.md").read_text()
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    after = load_file(tuned / "model.safetensors")
    key = "base_model.model.model.norm.weight"
    assert torch.equal(stored[key], after["model.norm.weight"])


def test_what_did_not_change_takes_no_room(pair, tmp_path):
    base, _ = pair("llama")
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] += 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    extraction = taia.extract(base, tuned, tmp_path / "out", 8, "all")
    assert [row.name for row in extraction.matrices] == ["model.layers.1.self_attn.q_proj.weight"]
    assert extraction.error < 1e-5  # a delta of rank 1
    with pytest.raises(taia.TaiaError, match="nothing that 'ffn' keeps"):
        taia.extract(base, tuned, tmp_path / "none", 8, "ffn")
    assert not (tmp_path / "none").exists()


def test_a_tied_end_and_an_adapter_are_refused(pair, adapters, tmp_path):
    base, tuned = pair("llama")
    with pytest.raises(taia.TaiaError, match="'- embedding - head'"):
        taia.extract(base, tuned, tmp_path / "out", 4, "all")
    with pytest.raises(taia.TaiaError, match="is an adapter already"):
        taia.extract(*adapters("llama", "plain"), tmp_path / "out", 4)
    with pytest.raises(taia.TaiaError, match="the least is 1"):
        taia.extract(base, tuned, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_attention_of_three_dimensions_is_refused_by_name(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "xlnet", d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64
    )
    for seed, name in enumerate(["base", "tuned"]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    with pytest.raises(taia.TaiaError, match="cannot be a LoRA adapter") as caught:
        taia.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 8, "attention.q")
    assert "transformer.layer.1.rel_attn.q: [32, 4, 8] is no parameter of an" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_every_error(pair, tmp_path):
    import subprocess
    import sys

    base, tuned = pair("llama")
    words = [sys.executable, "-m", "taia", "splice", str(base), str(tuned)]

    def run(*options):
        command = [*words, *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(tmp_path / "one", "--extract", 4)
    assert done.returncode == 0, done.stderr
    assert "12 matrices at rank 4; relative error 0." in done.stdout
    done = run(tmp_path / "two", "--extract", "full", "--json")
    assert json.loads(done.stdout)["error"] < 1e-5
    for wrong in ("none", "0"):
        assert run(tmp_path / "three", "--extract", wrong).returncode == 2
    assert run(tmp_path / "three", "--extract", 4, "--merge").returncode == 2
    assert not (tmp_path / "three").exists()


def test_the_same_models_give_the_same_bytes_and_an_edit_is_found(pair, tmp_path):
    base, tuned = pair("llama", "bfloat16")
    for name in ("one", "two"):
        taia.extract(base, tuned, tmp_path / name, 4)
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    raw = bytearray(one)
    raw[-1] ^= 1
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(VerificationError, match="not those that were written"):
        taia.verify(tmp_path / "one")


@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 12)),
                elements=st.floats(-8, 8, width=32)),
    st.integers(1, 14),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_factors_are_the_nearest_of_their_rank(matrix, rank):
    a, b = factorise(matrix, rank)
    assert a.shape == (rank, matrix.shape[1])
    assert b.shape == (matrix.shape[0], rank)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    lost = np.linalg.norm(matrix - b @ a)
    assert lost <= np.linalg.norm(values[rank:]) + 1e-4 * (1 + np.linalg.norm(matrix))


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_projection_is_near_the_exact_decomposition(decay):
    """Even of noise, whose singular values hardly fall, at most 2 % more is lost."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((300, 400)).astype(np.float32)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    if decay:
        matrix = ((left * np.arange(1, 301) ** -decay) @ right).astype(np.float32)
    values = np.linalg.svd(matrix, compute_uv=False)
    a, b = factorise(matrix, 16)
    assert np.linalg.norm(matrix - b @ a) <= 1.02 * np.linalg.norm(values[16:])


def test_full_rank_of_16_bits_loses_nothing_to_rounding(pair, tmp_path):
    base, tuned = pair("llama", "bfloat16")
    extraction = taia.extract(base, tuned, tmp_path / "adapter", None)
    assert extraction.error < 1e-5
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    taia.splice(base, tuned, tmp_path / "spliced")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base, tmp_path / "spliced")
    )
    for row in extraction.matrices:
        stem = f"base_model.model.{row.name.removesuffix('.weight')}.lora_"
        delta = factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
        made = before[row.name].float() + delta
        assert torch.allclose(made, after[row.name].float(), rtol=0, atol=1e-6)
    taia.verify(tmp_path / "adapter")
    small = taia.extract(base, tuned, tmp_path / "small", 2)
    factors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}
    assert small.error > 0.1


def test_an_embedding_inside_attention_is_extracted_as_one(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    extraction = taia.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", None)
    assert any("relative_attention_bias" in row.name for row in extraction.matrices)
    taia.splice(tmp_path / "base", tmp_path / "tuned", tmp_path / "spliced")
    model = PeftModel.from_pretrained(
        T5ForConditionalGeneration.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    expected = T5ForConditionalGeneration.from_pretrained(tmp_path / "spliced").state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_settings_that_differ_are_told_for_what_they_mean_to_an_adapter(pair, tmp_path):
    base, tuned = pair("llama")
    shutil.copytree(tuned, tmp_path / "tuned")
    changed = json.loads((tuned / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(changed))
    notes = []
    taia.extract(base, tmp_path / "tuned", tmp_path / "adapter", 2, on_note=notes.append)
    assert len(notes) == 1
    assert "rms_norm_eps (1e-06 and 0.5); an adapter has none and runs under the base's" in notes[0]
