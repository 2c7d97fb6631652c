"""LoRA adapters in GGUF files: sliced, and refused where llama.cpp would refuse or ignore."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_tools import read, tiny_adapter, tiny_llama, write_gguf

import taia
from taia.errors import MismatchError, SourceError
from taia.gguf_kinds import classify_gguf
from taia.load import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "base.gguf", 0, Type.Q8_0)


def deltas(path) -> dict[str, np.ndarray]:
    """alpha / rank * B A of every pair, as llama.cpp adds it."""
    tensors = read(path)
    alpha = gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents()
    found = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        found[name] = alpha / b.shape[-1] * b @ a
    return found


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_what_is_kept_has_its_strength_and_the_rest_is_gone(base, tmp_path, kind):
    whole = tiny_adapter(tmp_path / "adapter.gguf", 0, kind)
    out = tmp_path / "out.gguf"
    receipt = taia.splice(base, whole, out, "attention*0.5 + ffn.up[0:1]", hash=True)
    before, after = deltas(whole), deltas(out)
    kinds = classify_gguf(before, "llama")
    for name, address in kinds.items():
        up = (address.projection, address.layer) == ("up", 0)
        strength = 0.5 if address.kind == "attention" else float(up)
        assert (name in after) == (strength != 0)
        if name in after:
            assert np.array_equal(after[name], np.float32(strength) * before[name])
    fields = gguf.GGUFReader(out).fields
    theirs = gguf.GGUFReader(whole).fields
    for key in (key for key in fields if not key.startswith("GGUF.")):
        assert fields[key].contents() == theirs[key].contents()
    assert taia.verify(out) == receipt
    assert {entry.origin for entry in receipt.tensors} == {"tuned", "blend"}


def test_all_is_the_very_file(base, tmp_path):
    whole = tiny_adapter(tmp_path / "adapter.gguf", 0)
    taia.splice(base, whole, tmp_path / "out.gguf", "all")
    assert (tmp_path / "out.gguf").read_bytes() == whole.read_bytes()


def test_quantised_factors_are_taken_whole(base, tmp_path):
    whole = tiny_adapter(tmp_path / "adapter.gguf", 0, Type.Q8_0, rank=32)
    taia.splice(base, whole, tmp_path / "out.gguf")
    with pytest.raises(MismatchError, match=r"lora_b: Q8_0 is taken whole, not at 0\.5"):
        taia.splice(base, whole, tmp_path / "half.gguf", "attention*0.5")


def test_a_strength_that_is_too_large(base, tmp_path):
    whole = tiny_adapter(tmp_path / "adapter.gguf", 0, Type.F16)
    with pytest.raises(MismatchError, match="no longer a finite"):
        taia.splice(base, whole, tmp_path / "out.gguf", "attention*1000000")
    assert not (tmp_path / "out.gguf").exists()


def refused(base, path, tensors, *, kind="lora", alpha=True, architecture="llama"):
    def fields(writer):
        writer.add_type("adapter")
        writer.add_string("adapter.type", kind)
        if alpha:
            writer.add_float32("adapter.lora.alpha", 8.0)

    shaped = {name: np.zeros(shape) for name, shape in tensors.items()}
    return taia.plan(
        base, write_gguf(path, shaped, architecture=architecture, fields=fields)
    ).faults


def test_what_does_not_fit_is_told(base, tmp_path):
    path, at = tmp_path / "a.gguf", "blk.0.attn_q.weight.lora_"
    good = {f"{at}a": (4, 64), f"{at}b": (64, 4)}
    assert refused(base, path, good) == ()
    assert "adapter.type is 'x'" in refused(base, path, good, kind="x")[0]
    assert refused(base, path, good, alpha=False) == ("adapter.lora.alpha is missing",)
    assert "architectures differ" in refused(base, path, good, architecture="qwen2")[0]
    assert "only one of" in refused(base, path, {f"{at}a": (4, 64)})[0]
    assert "do not fit" in refused(base, path, good | {f"{at}b": (32, 4)})[0]
    assert "do not fit" in refused(base, path, good | {f"{at}a": (8, 64)})[0]
    assert "not stored in the base" in refused(
        base, path, good | {"blk.7.attn_q.weight.lora_a": (4, 64)})[0]  # fmt: skip


def test_factors_of_an_embedding_have_the_shapes_that_llama_cpp_asks_for(base, tmp_path):
    """Of A, words before rank: its rows are looked up as those of the embedding are."""
    path, at = tmp_path / "a.gguf", "token_embd.weight.lora_"
    words, width = read(base)["token_embd.weight"].shape
    assert words != width
    query = {f"blk.0.attn_q.weight.lora_{side}": shape for side, shape in
             (("a", (4, width)), ("b", (width, 4)))}  # fmt: skip
    assert refused(base, path, query | {f"{at}a": (words, 4), f"{at}b": (width, 4)}) == ()
    for a, b in (((4, words), (width, 4)), ((words, 4), (width, 8)), ((width, 4), (words, 4))):
        assert "do not fit" in refused(base, path, query | {f"{at}a": a, f"{at}b": b})[0]


def test_nothing_kept_and_wrong_places(base, tmp_path):
    whole = tiny_adapter(tmp_path / "adapter.gguf", 0)
    with pytest.raises(MismatchError, match="it changes attention, ffn"):
        taia.splice(base, whole, tmp_path / "out.gguf", "norm")
    with pytest.raises(SourceError, match="the base is a model"):
        taia.splice(whole, base, tmp_path / "out.gguf")
    with pytest.raises(SourceError, match="--merge is for adapters"):
        taia.splice(base, whole, tmp_path / "out", merge=True)
    with pytest.raises(SourceError, match="its base is a GGUF file"):
        load_model(whole)
