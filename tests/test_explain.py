"""What a checkpoint is made of is found again, selection and all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taia
from taia.kinds import classify
from taia.selection_of import selection_of


@pytest.mark.parametrize(
    "keep",
    [
        "attention",
        "all - ffn - router",
        "all",
        "none",
        "ffn[0:2]",
        "attention.q + attention.v",
        "all*0.5",
        "attention + ffn*0.3",
        "attention*0.25 + ffn[1:3]*0.7",
        "ffn*linear(0.2, 0.8)",
        "all*linear(0.25, 1)",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_selection_is_found_again(pair, tmp_path, keep, dtype):
    base, tuned = pair("llama", dtype)
    receipt = taia.splice(base, tuned, tmp_path / "out", keep=keep)
    found = taia.explain(base, tuned, tmp_path / "out")
    assert found.selection is not None
    again = {d.name: d.strength for d in taia.plan(base, tuned, keep=found.selection).decisions}
    near = 2e-3 if dtype == "bfloat16" else 1e-6
    assert all(abs(again[e.name] - e.strength) <= near for e in receipt.tensors), found.selection
    assert {"neither", "missing", "added"} & {part.match for part in found.parts} == set()


def test_what_is_neither_is_said(pair, tmp_path):
    from safetensors.numpy import load_file, save_file

    base, tuned = pair("llama")
    out = tmp_path / "out"
    taia.splice(base, tuned, out, keep="attention")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 2
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = taia.explain(base, tuned, out)
    parts = {part.name: part for part in found.parts}
    assert found.selection is None
    assert parts[name].match == "neither"
    assert parts[name].residual > 0.1
    assert parts["model.norm.weight"].match == "missing"
    assert parts["extra"].match == "added"
    assert found.totals["all"]["neither"] == 1
    assert json.loads(json.dumps(found.to_json()))["selection"] is None


def test_base_and_tuned_alike_are_both(pair, tmp_path):
    base, _ = pair("llama")
    shutil.copytree(base, tmp_path / "same")
    found = taia.explain(base, tmp_path / "same", base)
    assert {part.match for part in found.parts} == {"both"}
    assert found.selection == "none"


def test_the_command(pair, tmp_path: Path, capsys, monkeypatch):
    from taia.cli import main

    base, tuned = pair("llama")
    out = tmp_path / "out"
    taia.splice(base, tuned, out, keep="attention + ffn*0.3")

    def run(*words: str) -> str:
        line = ["taia", "plan", str(base), str(tuned), "--against", str(out), *words]
        monkeypatch.setattr("sys.argv", line)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    told = run()
    assert "the same as --keep 'attention + ffn*0.3'" in told
    assert "blend" in told
    assert json.loads(run("--json"))["selection"] == "attention + ffn*0.3"


NAMES = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(4)
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
    ),
]
ADDRESSES = {name: classify(name, "llama") for name in NAMES}


@given(st.lists(st.sampled_from([0.0, 1.0, 0.5, 0.125, None]), min_size=19, max_size=19))
@settings(max_examples=200, deadline=None)
def test_whatever_is_found_has_these_strengths(values):
    strengths = dict(zip(ADDRESSES.values(), values, strict=True))
    text = selection_of(strengths)
    if text is not None:
        given = taia.Selection.parse(text).strengths(strengths)
        assert all(v is None or given[a] == v for a, v in strengths.items())


def _swapped(out: Path, source: Path, names) -> None:
    """Put the tensors `names` of `source` into `out`."""
    from safetensors.numpy import load_file, save_file

    tensors, others = (load_file(folder / "model.safetensors") for folder in (out, source))
    save_file(tensors | {n: others[n] for n in names}, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "where"),
    [("self_attn.{}_proj.bias", "qkv"), ("post_attention_layernorm.weight", "-")],
)
def test_tensors_of_one_address_that_differ_have_no_selection(pair, tmp_path, part, where):
    base, tuned = pair("qwen2")
    taia.splice(base, tuned, tmp_path / "out", keep="attention + norm")
    _swapped(tmp_path / "out", base, [f"model.layers.1.{part.format(x)}" for x in where])
    found = taia.explain(base, tuned, tmp_path / "out")
    assert found.selection is None
    assert "every selection gives the two one strength" in found.reason
    assert any(f"model.layers.1.{part.format(x)}" in found.reason for x in where)
    assert found.to_json()["reason"] == found.reason


def test_a_tied_head_is_kept_with_its_embedding(pair, tmp_path):
    base, tuned = pair("llama")
    receipt = taia.splice(base, tuned, tmp_path / "out", keep="ffn + embedding + head")
    found = taia.explain(base, tuned, tmp_path / "out")
    assert found.selection is not None
    again = taia.plan(base, tuned, keep=found.selection)
    assert not again.faults
    assert [d.source for d in again.decisions] == [e.origin for e in receipt.tensors]


def test_a_part_of_a_fused_tensor_has_no_selection(pair, tmp_path):
    base, tuned = pair("phi3")
    taia.splice(base, tuned, tmp_path / "out", keep="attention.q")
    found = taia.explain(base, tuned, tmp_path / "out")
    assert found.selection is None
    assert found.totals["attention"]["neither"] == 3


@given(
    st.sampled_from(["attention", "all - norm", "all*0.5", "ffn[1:]*0.25 + norm"]),
    st.sets(st.integers(0, 40), max_size=2),
    st.sampled_from(["base", "tuned"]),
)
@settings(max_examples=30, deadline=None)
def test_a_named_selection_makes_every_tensor(pair, tmp_path_factory, keep, odd, of):
    base, tuned = pair("qwen2")
    out = tmp_path_factory.mktemp("explained") / "out"
    receipt = taia.splice(base, tuned, out, keep=keep)
    strengths = {entry.name: entry.strength for entry in receipt.tensors}
    names = {list(strengths)[place % len(strengths)] for place in odd}
    _swapped(out, {"base": base, "tuned": tuned}[of], names)
    wanted = strengths | dict.fromkeys(names, {"base": 0.0, "tuned": 1.0}[of])
    found = taia.explain(base, tuned, out)
    assert found.selection or wanted != strengths
    assert (found.selection is None) == bool(found.reason)
    if found.selection is not None:
        again = taia.plan(base, tuned, keep=found.selection)
        assert {d.name: d.strength for d in again.decisions} == pytest.approx(wanted)
