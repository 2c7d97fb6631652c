"""Parts of fused projections: the rows that are taken are those that the model reads as such."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from layout_tools import tensors, write

import taia
from taia.fused import Cut, cut_of
from taia.kinds import classify_all
from taia.selection import PARTS

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from derive_fused import TABLE, derive, fused_types
from small_models import small

TABLE_NOW = json.loads(TABLE.read_text())["models"]
NEEDED = ["phi3", "gpt2", "gpt_neox", "falcon", "gpt_oss", "mixtral"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function model_type -> folders of a base and of a tuned model, in the live layout."""
    folders = {}

    def make(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        if (model_type, dtype) not in folders:
            root = tmp_path_factory.mktemp(model_type)
            for name, seed in (("base", 0), ("tuned", 1)):
                model = small(model_type)
                torch.manual_seed(seed)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
                model.to(dtype).save_pretrained(root / name, save_original_format=False)
            folders[model_type, dtype] = (root / "base", root / "tuned")
        return folders[model_type, dtype]

    return make


def rows_by_law(model_type: str, name: str, address, axis: int) -> list[str]:
    from derive_fused import rows_of

    return rows_of(small(model_type).double(), name, address, model_type, axis)


def fused_of(folder: Path, model_type: str) -> dict[str, tuple]:
    """Stored name -> (address, cut) of every fused tensor of a checkpoint."""
    stored = tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    return {
        name: (address, cut_of(name, tuple(stored[name].shape), address, model_type, config))
        for name, address in classify_all(stored, model_type).items()
        if address.projection in PARTS
    }


UNSAVED = {"granitemoehybrid", "laguna", "zaya"}
"""Types whose small config transformers runs and refuses to save; their rows are proven below."""

CASES = [
    pytest.param(model_type, marks=[] if model_type in NEEDED else pytest.mark.slow)
    for model_type in TABLE_NOW
    if model_type not in UNSAVED
]


@pytest.mark.parametrize("model_type", CASES)
def test_each_part_takes_its_rows_and_no_others(made, tmp_path, model_type):
    base, tuned = made(model_type)
    old, new = tensors(base), tensors(tuned)
    fused = fused_of(base, model_type)
    known = {name: found for name, found in fused.items() if found[1] is not None}
    terms = {
        (a.kind.value, part, a.tower) for a, _ in known.values() for part in PARTS[a.projection]
    }
    unknown = [a for a, cut in fused.values() if cut is None]
    assert known
    for kind, part, tower in sorted(terms):
        if any((a.kind.value, a.tower) == (kind, tower) for a in unknown):
            continue  # refused, as the test of that says
        out = tmp_path / f"{kind}-{part}-{tower}"
        taia.splice(base, tuned, out, keep=f"{kind}.{part}@{tower}")
        taia.verify(out)
        got = tensors(out)
        for name, (address, cut) in known.items():
            here = (address.kind.value, address.tower) == (kind, tower)
            for start, stop, owner in cut.spans():
                rows = (*[slice(None)] * cut.axis, slice(start, stop))
                side = new if here and owner == part else old
                assert torch.equal(got[name][rows], side[name][rows]), (name, start)


def test_rows_of_no_elements(pair, tmp_path):
    name = "model.layers.0.self_attn.qkv_proj.weight"
    for side, folder in zip(("base", "tuned"), pair("phi3"), strict=True):
        state = tensors(folder)
        write(tmp_path / side, state | {name: torch.zeros(len(state[name]), 0)}, folder)
    taia.splice(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", keep="attention.q")
    taia.verify(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "gpt_neox", "gpt_oss"])
def test_the_rows_are_those_that_the_forward_pass_tells(made, model_type):
    base, _ = made(model_type)
    for name, (address, cut) in fused_of(base, model_type).items():
        if address.layer == 0 and not name.endswith(".bias"):
            parts = [part for start, stop, part in cut.spans() for _ in range(start, stop)]
            assert parts == rows_by_law(model_type, name, address, cut.axis), name


@pytest.mark.slow
def test_the_shipped_table_is_what_every_forward_pass_tells():
    found, left = derive(fused_types())
    print(f"{len(found)} of {len(fused_types())} model types; left out: {len(left)}")
    assert found == TABLE_NOW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_blend_at_their_own_strengths(made, tmp_path, dtype):
    base, tuned = made("phi3", dtype)
    keep = "attention.q + attention.k*0.3 + ffn.up*0.5 + ffn.gate*1.5"
    taia.splice(base, tuned, tmp_path / "out", keep=keep)
    taia.verify(tmp_path / "out")
    old, new, out = tensors(base), tensors(tuned), tensors(tmp_path / "out")
    wanted = {"q": 1.0, "k": 0.3, "v": 0.0, "up": 0.5, "gate": 1.5}
    for name, (_, cut) in fused_of(base, "phi3").items():
        for start, stop, part in cut.spans():
            a, b = old[name][start:stop].float(), new[name][start:stop].float()
            expected = (a + wanted[part] * (b - a)).to(dtype)
            if wanted[part] in (0, 1):
                assert torch.equal(out[name][start:stop], (b if wanted[part] else a).to(dtype))
            torch.testing.assert_close(out[name][start:stop], expected, rtol=1e-2, atol=1e-6)
    told = {t["name"]: t for t in taia.plan(base, tuned, keep).to_json()["tensors"]}
    row = told["model.layers.0.self_attn.qkv_proj.weight"]
    assert row["source"] == "blend"
    assert [s["projection"] for s in row["slices"]] == ["q", "k", "v"]
    assert "slices" not in told["model.norm.weight"]
    receipt = json.loads((tmp_path / "out" / "taia.json").read_text())
    lines = {t["name"]: t for t in receipt["tensors"]}
    assert lines[row["name"]]["parts"] == {"q": 1.0, "k": 0.3, "v": 0.0}


@pytest.mark.parametrize(("model_type", "whole", "parts"), [
    ("phi3", "attention.qkv", "attention.q + attention.k + attention.v"),
    ("phi3", "ffn", "ffn.gate + ffn.up + ffn.down"),
    ("gpt2", "attention", "attention.qkv + attention.o"),
    ("gpt_oss", "ffn.gate_up", "ffn.gate + ffn.up"),
])  # fmt: skip
def test_all_parts_alike_are_the_whole(made, model_type, whole, parts):
    base, tuned = made(model_type)
    first, second = (taia.plan(base, tuned, keep) for keep in (whole, parts))
    assert first.decisions == second.decisions
    assert not any(decision.parts for decision in first.decisions)


def test_the_name_of_a_fused_projection_names_its_parts_where_they_are_apart(pair):
    base, tuned = pair("llama")
    fused = taia.plan(base, tuned, "attention.qkv + ffn.gate_up").decisions
    apart = "attention.q + attention.k + attention.v + ffn.gate + ffn.up"
    assert fused == taia.plan(base, tuned, apart).decisions


def test_rows_that_are_not_known_are_refused_by_name(tmp_path):
    for name in ("base", "tuned"):
        small("deepseek_v3").save_pretrained(tmp_path / name)
    planned = taia.plan(tmp_path / "base", tmp_path / "tuned", "attention.k")
    with pytest.raises(taia.TaiaError) as caught:
        planned.refuse_faults()
    assert "self_attn.kv_b_proj.weight: k at 1, v at 0" in str(caught.value)
    assert "as in 'attention.kv'" in str(caught.value)
    taia.plan(tmp_path / "base", tmp_path / "tuned", "attention.q").refuse_faults()
    taia.plan(tmp_path / "base", tmp_path / "tuned", "attention.kv").refuse_faults()


def test_a_config_without_the_numbers_is_refused(made, tmp_path):
    base, tuned = made("gpt_neox")
    for name, folder in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        for file in folder.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        del config["num_attention_heads"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(taia.TaiaError, match="is not known for gpt_neox with this config"):
        taia.plan(tmp_path / "base", tmp_path / "tuned", "attention.q").refuse_faults()


@pytest.mark.parametrize("setting", ["all", "half"])
@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_a_merged_adapter_changes_the_rows_of_its_part(pair, tmp_path, model_type, setting):
    from adapter_tools import save_adapter

    base, _ = pair(model_type)
    target = {"phi3": "qkv_proj", "gpt2": "c_attn"}[model_type]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[target])
    strength = {"all": 1.0, "half": 0.5}[setting]
    taia.splice(base, adapter, tmp_path / "whole", keep=f"attention*{strength}", merge=True)
    taia.splice(base, adapter, tmp_path / "k", keep=f"attention.k*{strength}", merge=True)
    taia.verify(tmp_path / "k")
    old, whole, out = (tensors(folder) for folder in (base, tmp_path / "whole", tmp_path / "k"))
    seen = 0
    for name, (_, cut) in fused_of(base, model_type).items():
        for start, stop, part in cut.spans():
            rows = (*[slice(None)] * cut.axis, slice(start, stop))
            side = whole if part == "k" else old
            assert torch.equal(out[name][rows], side[name][rows])
            seen += part == "k" and not torch.equal(whole[name][rows], old[name][rows])
    assert seen


@pytest.mark.parametrize("model_type", ["phi3", "gpt2"])
def test_a_sliced_adapter_merges_to_the_rows_of_its_part(pair, tmp_path, model_type):
    from adapter_tools import save_adapter

    base, _ = pair(model_type)
    target = {"phi3": "qkv_proj", "gpt2": "c_attn"}[model_type]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[target])
    for index, keep in enumerate(("attention.k", "attention.q + attention.v*0.5")):
        sliced, merged, direct = (tmp_path / f"{name}{index}" for name in ("sliced", "out", "by"))
        taia.splice(base, adapter, sliced, keep=keep)
        taia.verify(sliced)
        taia.splice(base, sliced, merged, keep="all", merge=True)
        taia.splice(base, adapter, direct, keep=keep, merge=True)
        one, other = tensors(merged), tensors(direct)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(one[name], tensor) for name, tensor in tensors(base).items())


def test_rows_of_what_is_no_plain_lora_are_refused(adapters, pair, tmp_path):
    from adapter_tools import save_adapter

    base, _ = pair("phi3")
    adapter = save_adapter(base, tmp_path / "dora", target_modules=["qkv_proj"], use_dora=True)
    with pytest.raises(taia.TaiaError, match="only plain LoRA factors can be told apart"):
        taia.splice(base, adapter, tmp_path / "out", keep="attention.k")
    taia.splice(base, adapter, tmp_path / "out", keep="attention.q + attention.k + attention.v")
    taia.verify(tmp_path / "out")


def test_spans_tile_the_axis():
    for groups, sizes in product((1, 3), ((2, 1, 1), (1, 1))):
        cut = Cut(0, groups, tuple(zip("qkv", sizes, strict=False)))
        spans = cut.spans()
        assert [start for start, _, _ in spans] == [0, *(stop for _, stop, _ in spans[:-1])]
        assert spans[-1][1] == cut.length


def test_counts_that_no_model_has_are_refused(pair, adapters, tmp_path):
    """Heads that happen to divide the rows, below zero."""
    base, adapter = tmp_path / "base", adapters("phi3", "plain")[1]
    shutil.copytree(pair("phi3")[0], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_attention_heads": -3}))
    with pytest.raises(taia.TaiaError, match="which of its rows are whose is not known"):
        taia.splice(base, adapter, tmp_path / "out", "attention.q")
    (base / "config.json").write_text(json.dumps(config | {"architectures": {"a": 1}}))
    taia.extract(base, pair("phi3")[1], tmp_path / "extracted", 2)
