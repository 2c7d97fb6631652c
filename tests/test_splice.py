"""The laws of splicing, on every family, against state dicts mixed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from layout_tools import write
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import taia
from taia.kinds import Kind

EXACT = ["attention", "ffn", "all - ffn", "all", "none"]


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def mixed_by_hand(base: Path, tuned: Path, keep: str):
    """Load both, and take from the tuned state dict what the run-time names say is kept.

    The kinds here are told by attribute names of the modules, not by taia.
    """
    model, other = load(base), load(tuned).state_dict()
    attention = ("attn", "attention.")
    ffn = ("mlp", "block_sparse_moe", "feed_forward")

    def kind(name: str) -> str:
        parts = name.split(".")
        if "norm" in name.split(".")[-2] and not {"q_norm", "k_norm"} & set(parts):
            return "norm"
        if parts[-2] in ("ln_1", "ln_2", "ln_f"):
            return "norm"
        if any(a in name for a in attention) and "layernorm" not in name:
            return "attention"
        if any(f in name for f in ffn):
            return "router" if parts[-2] == "gate" else "ffn"
        return "other"

    kept = {
        "attention": lambda k: k == "attention",
        "ffn": lambda k: k == "ffn",
        "all - ffn": lambda k: k != "ffn",
        "all": lambda _: True,
        "none": lambda _: False,
    }[keep]
    state = model.state_dict()
    model.load_state_dict({n: other[n] if kept(kind(n)) else state[n] for n in state})
    return model


def logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randint(3, 60, (2, 12))).logits


QUICK = [("llama", "attention"), ("gpt2", "all - ffn"), ("mixtral", "ffn")]
EVERY = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in product(FAMILIES, EXACT)
]


@pytest.mark.parametrize(("model_type", "keep"), EVERY)
def test_spliced_logits_equal_the_state_dict_mixed_by_hand(pair, tmp_path, model_type, keep):
    base, tuned = pair(model_type)
    receipt = taia.splice(base, tuned, tmp_path / "out", keep=keep)
    expected = logits(mixed_by_hand(base, tuned, keep))
    assert torch.equal(logits(load(tmp_path / "out")), expected)
    assert taia.verify(tmp_path / "out") == receipt


@pytest.mark.parametrize(("keep", "source"), [("all", "tuned"), ("none", "base")])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_all_is_tuned_and_none_is_base_bit_for_bit(pair, tmp_path, model_type, keep, source):
    base, tuned = pair(model_type)
    taia.splice(base, tuned, tmp_path / "out", keep=keep)
    expected = tensors({"base": base, "tuned": tuned}[source])
    actual = tensors(tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blend_is_within_one_unit_in_the_last_place(pair, tmp_path, dtype):
    base, tuned = pair("llama", dtype)
    taia.splice(base, tuned, tmp_path / "out", keep="attention*0.3 + ffn*linear(0.2, 1.4)")
    old, new, out = tensors(base), tensors(tuned), tensors(tmp_path / "out")
    strength = {0: 0.2, 1: 0.8, 2: 1.4}
    for name in out:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        s = 0.3 if "self_attn" in name else strength[layer] if ".mlp." in name else 0.0
        by_torch = old[name].float() + s * (new[name].float() - old[name].float())
        expected = by_torch.to(out[name].dtype)
        step = (torch.nextafter(expected.abs(), expected.abs() + 1) - expected.abs()).double()
        assert ((out[name].double() - expected.double()).abs() <= step).all(), name
    taia.verify(tmp_path / "out")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_selection_and_its_complement_cover_every_tensor_once(pair, model_type):
    base, tuned = pair(model_type)
    kept = taia.plan(base, tuned, keep="attention").decisions
    rest = taia.plan(base, tuned, keep="all - attention").decisions
    assert [d.name for d in kept] == [d.name for d in rest]
    assert all(a.strength + b.strength == 1 for a, b in zip(kept, rest, strict=True))
    assert {d.address.kind for d in kept if d.strength} == {Kind.ATTENTION}


def test_splicing_is_idempotent(pair, tmp_path):
    base, tuned = pair("qwen2")
    taia.splice(base, tuned, tmp_path / "once", keep="attention")
    taia.splice(base, tmp_path / "once", tmp_path / "twice", keep="attention")
    once, twice = tensors(tmp_path / "once"), tensors(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_shards_keep_the_layout_of_the_base(pair, tmp_path):
    base, tuned = pair("llama", shard="20KB")
    files = sorted(f.name for f in base.glob("*.safetensors"))
    assert len(files) > 1
    taia.splice(base, tuned, tmp_path / "out", keep="attention")
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == files
    assert torch.equal(
        logits(load(tmp_path / "out")), logits(mixed_by_hand(base, tuned, "attention"))
    )
    taia.verify(tmp_path / "out")


def test_shards_may_be_cut_differently_in_base_and_tuned(pair, tmp_path):
    base, _ = pair("llama", shard="20KB")
    _, tuned = pair("llama")
    taia.splice(base, tuned, tmp_path / "out", keep="ffn")
    assert torch.equal(logits(load(tmp_path / "out")), logits(mixed_by_hand(base, tuned, "ffn")))


def test_configuration_and_card_come_along(pair, tmp_path):
    base, tuned = pair("llama")
    taia.splice(base, tuned, tmp_path / "out", keep="attention + ffn[0:1]*0.5")
    out = tmp_path / "out"
    assert (out / "config.json").read_bytes() == (tuned / "config.json").read_bytes()
    assert (out / "generation_config.json").is_file()
    card = (out / "README.md").read_text()
    assert "selection: attention + ffn[0:1]*0.5" in card
    assert "tags: [taia, merge]" in card
    assert str(base.parent) not in card
    receipt = json.loads((out / "taia.json").read_text())
    assert receipt["selection"] == "attention + ffn[0:1]*0.5"
    first = receipt["tensors"][0]
    assert {"name", "file", "start", "stop", "origin", "from_file", "from_start"} <= first.keys()


def test_progress_reaches_the_total(pair, tmp_path):
    seen = []
    taia.splice(*pair("llama"), tmp_path / "out", on_progress=lambda *c: seen.append(c))
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_file_that_shrinks_while_it_is_copied_leaves_nothing(pair, tmp_path, monkeypatch):
    base, tuned = pair("llama")
    copy = tmp_path / "tuned"
    copy.mkdir()
    for file in tuned.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    planned = taia.plan(base, copy, keep="all")
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    from taia.splice import execute

    with pytest.raises(taia.TaiaError, match="shorter"):
        execute(planned, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["tuned"]


def test_an_interrupt_leaves_nothing(pair, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taia.splice(*pair("llama"), tmp_path / "out", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_path_imports_no_torch(pair, tmp_path):
    base, tuned = pair("llama", "bfloat16")
    code = (
        "import sys, taia; base, tuned, out = sys.argv[1:]\n"
        "taia.splice(base, tuned, out, keep='attention + ffn*0.5'); taia.verify(out)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(base), str(tuned), str(tmp_path / "out")], check=True
    )


def test_a_strength_beyond_the_dtype_is_refused(pair, tmp_path):
    base, tuned = pair("llama", "float16")
    with pytest.raises(taia.TaiaError, match="no longer a finite"):
        taia.splice(base, tuned, tmp_path / "out", keep="all*1e7")
    assert list(tmp_path.iterdir()) == []


def test_a_companion_never_overwrites_weights(pair, tmp_path):
    """Shards may have any name, and some names are those of tokenizer files."""
    for name, folder in zip(("base", "tuned"), pair("llama"), strict=True):
        copy = write(tmp_path / name, tensors(folder), folder)
        shard = (copy / "model.safetensors").rename(copy / "tokenizer_1.safetensors")
        index = {"weight_map": dict.fromkeys(tensors(folder), shard.name)}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    taia.splice(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", keep="none")
    taia.verify(tmp_path / "out")
