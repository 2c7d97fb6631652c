"""Kinds of GGUF names: every name of the library, and the same parts as in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES

from taia import kinds
from taia.errors import KindError
from taia.gguf_kinds import architectures, classify_gguf, quantisation_types
from taia.kinds import Kind

ROOT = Path(__file__).parents[1]

ALIASES = {
    "gemma3_text": "gemma3", "gemma3n_text": "gemma3n", "gemma4_text": "gemma4",
    "mixtral": "llama", "mistral": "llama", "phi": "phi2", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "cohere": "command-r", "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe", "llama4_text": "llama4", "glm": "chatglm",
}  # fmt: skip
"""Model types whose architecture has another name in llama.cpp; the rest differ by - and _."""


def parts(address: kinds.Address) -> tuple[object, ...]:
    return address.kind, address.layer, address.projection, address.tower


def architecture_of(model_type: str) -> MODEL_ARCH | None:
    plain = {
        name.replace("-", "").replace("_", ""): arch for arch, name in MODEL_ARCH_NAMES.items()
    }
    name = ALIASES.get(model_type, model_type)
    return plain.get(name.replace("-", "").replace("_", "").replace(".", ""))


def test_every_name_of_the_library_has_an_address():
    assert set(architectures()) == set(MODEL_ARCH_NAMES.values())
    names = [TENSOR_NAMES[tensor].format(bid=3) for tensor in MODEL_TENSOR]
    for suffix in ("", ".weight", ".bias"):
        found = classify_gguf([name + suffix for name in names], "llama")
        assert len(found) == len(set(names))
    print(f"{len(names)} tensors of {len(architectures())} architectures, 0 unclassified")


def test_the_shipped_table_is_current():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "derive_gguf_kinds.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_types_and_their_sizes_are_the_library_s():
    told = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert quantisation_types() == told


def test_a_gguf_name_is_the_same_part_as_the_name_it_was_made_from():
    """Every name of kinds.json that the library maps to a GGUF name, both ways classified."""
    compared, families, differ = 0, set(), []
    for model_type in kinds.model_types():
        arch = architecture_of(model_type)
        if arch is None:
            continue
        names = gguf.get_tensor_name_map(arch, 4)
        family = kinds._family(model_type, None)
        for key in family.rows:
            name = key.replace("*", "1", 1).replace("*", "0")
            mapped = names.get_name(name, (".weight", ".bias"))
            if mapped is None:
                continue
            ours = kinds.classify(name, model_type)
            context = [mapped, "blk.1.ssm_a"] if ours.kind is Kind.MIXER else [mapped]
            theirs = classify_gguf(context, MODEL_ARCH_NAMES[arch])[mapped]
            compared, families = compared + 1, families | {model_type}
            if parts(ours) != parts(theirs):
                differ.append((model_type, name, mapped, ours, theirs))
    print(f"{compared} names of {len(families)} model types, {len(differ)} differ")
    assert differ == []
    assert len(families) > 50


def test_norms_are_norms_and_those_inside_attention_are_attention():
    names = ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.post_attention_norm.weight",
             "blk.0.post_ffw_norm.weight", "output_norm.weight"]  # fmt: skip
    assert {a.kind for a in classify_gguf(names, "gemma3").values()} == {Kind.NORM}
    names = ["blk.0.attn_q_norm.weight", "blk.0.attn_kv_a_norm.weight", "blk.0.attn_sinks.weight"]
    assert {a.kind for a in classify_gguf(names, "deepseek2").values()} == {Kind.ATTENTION}


def test_experts_stacked_or_one_by_one_and_their_routers():
    names = ["blk.1.ffn_gate_exps.weight", "blk.1.ffn_gate.3.weight", "blk.1.ffn_gate_shexp.weight"]
    for address in classify_gguf(names, "llama").values():
        assert parts(address) == (Kind.FFN, 1, "gate", "language")
    routers = ["blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias"]
    assert {a.kind for a in classify_gguf(routers, "llama").values()} == {Kind.ROUTER}


def test_linear_attention_is_a_mixer_in_its_layers_alone():
    names = [
        "blk.0.attn_qkv.weight",
        "blk.0.ssm_a",
        "blk.0.attn_gate.weight",
        "blk.1.attn_q.weight",
    ]
    found = classify_gguf(names, "qwen3next")
    assert [address.kind for address in found.values()] == [Kind.MIXER] * 3 + [Kind.ATTENTION]


def test_layers_behind_the_last_one_are_other():
    names = ["blk.46.attn_q.weight", "blk.45.attn_q.weight", "output.weight"]
    found = classify_gguf(names, "glm4moe", layers=46)
    assert [a.kind for a in found.values()] == [Kind.OTHER, Kind.ATTENTION, Kind.HEAD]


def test_unknown_names_and_architectures_are_told():
    with pytest.raises(KindError, match=r"lama: not an architecture.*llama"):
        classify_gguf([], "lama")
    with pytest.raises(KindError, match=r"(?s)2 of 3 .*blk\.0\.attn_x.*blk\.9999999999\."):
        classify_gguf(
            ["output.weight", "blk.0.attn_x.weight", "blk.9999999999.attn_q.weight"], "llama"
        )


def test_classifying_imports_neither_numpy_nor_the_library():
    code = (
        "import sys\nfrom taia.gguf_kinds import classify_gguf\n"
        "import taia.gguf_header, taia.gguf_plan\n"
        "assert not {'numpy', 'gguf', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_is_data():
    table = json.loads((ROOT / "src" / "taia" / "gguf_kinds.json").read_text())
    assert table["gguf"].split(".")[0].isdigit()
