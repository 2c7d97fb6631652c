"""Two GGUF files spliced: the laws, what is refused, and what is found afterwards."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_tools import large, llama_fields, llama_tensors, read, tiny_llama, write_gguf

import taia
from taia.errors import MismatchError, OutputError, SourceError, VerificationError
from taia.gguf_kinds import classify_gguf
from taia.plan import Origin

QUANTISED = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1, Type.MXFP4]


def pair_of(folder: Path, kind: Type = Type.Q8_0, other: Type | None = None, **options):
    base = tiny_llama(folder / "base.gguf", 0, kind, **options)
    return base, tiny_llama(folder / "tuned.gguf", 1, kind if other is None else other, **options)


@pytest.fixture(scope="module", params=QUANTISED, ids=lambda kind: kind.name)
def files(request, tmp_path_factory):
    return pair_of(tmp_path_factory.mktemp(request.param.name), request.param)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return pair_of(tmp_path_factory.mktemp("two"))


def test_all_is_the_very_file_of_the_tuned_model(files, tmp_path):
    base, tuned = files
    taia.splice(base, tuned, tmp_path / "out.gguf", "all")
    assert (tmp_path / "out.gguf").read_bytes() == tuned.read_bytes()


def test_none_is_the_base_with_the_fields_of_the_tuned_model(files, tmp_path):
    base, tuned = files
    out = tmp_path / "out.gguf"
    taia.splice(base, tuned, out, "none")
    theirs = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(base).tensors}
    assert {t.name: t.data.tobytes() for t in gguf.GGUFReader(out).tensors} == theirs
    assert gguf.GGUFReader(out).get_field("general.name").contents() == "tuned"


def test_unpacking_a_splice_is_splicing_what_was_unpacked(files, tmp_path):
    base, tuned = files
    out = tmp_path / "out.gguf"
    receipt = taia.splice(base, tuned, out, "attention + ffn[0:1]", hash=True)
    kinds = classify_gguf(read(base), "llama")
    first, second, spliced = read(base), read(tuned), read(out)
    for name, values in spliced.items():
        address = kinds[name]
        kept = address.kind == "attention" or (address.kind == "ffn" and address.layer == 0)
        assert np.array_equal(values, (second if kept else first)[name]), name
    assert {entry.origin for entry in receipt.tensors} == {"base", "tuned"}
    assert taia.verify(out) == receipt


def test_alignment_and_order_are_the_tuned_file_s(tmp_path):
    base = tiny_llama(tmp_path / "base.gguf", 0, Type.Q8_0, alignment=8)
    tensors = dict(reversed(llama_tensors(1).items()))
    tuned = write_gguf(tmp_path / "tuned.gguf", tensors, large(Type.Q8_0),
                       fields=llama_fields(), alignment=256)  # fmt: skip
    taia.splice(base, tuned, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.alignment == 256
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    assert all(tensor.data_offset % 256 == 0 for tensor in reader.tensors)
    first, second = read(base), read(tuned)
    for name, values in read(tmp_path / "out.gguf").items():
        assert np.array_equal(
            values, (second if "attn_" in name and "norm" not in name else first)[name]
        )
    taia.verify(tmp_path / "out.gguf")


def test_floats_are_blended_and_quantised_tensors_only_if_asked(two, tmp_path):
    base, tuned = two
    out = tmp_path / "out.gguf"
    taia.splice(base, tuned, out, "norm*0.5")
    first, second, mixed = read(base), read(tuned), read(out)
    for name, values in mixed.items():
        half = (first[name] + second[name]) / 2 if "norm" in name else first[name]
        assert np.allclose(values, half, atol=1e-6), name
    with pytest.raises(MismatchError, match=r"attn_q\.weight and 7 more: Q8_0 .*--requantize"):
        taia.splice(base, tuned, tmp_path / "no.gguf", "attention*0.5")
    taia.splice(base, tuned, out, "attention*0.5", requantize=True, overwrite=True)
    name = "blk.1.attn_q.weight"
    wanted = (first[name] + second[name]) / 2
    packed = gguf.quants.quantize(
        first[name] + np.float32(0.5) * (second[name] - first[name]), Type.Q8_0
    )
    assert np.array_equal(read(out)[name], gguf.dequantize(packed, Type.Q8_0))
    assert np.abs(read(out)[name] - wanted).max() <= np.abs(wanted).max() / 127
    taia.verify(out)


def test_types_that_differ_are_refused_or_converted(tmp_path):
    base, tuned = pair_of(tmp_path, Type.Q5_0, Type.Q8_0)
    out = tmp_path / "out.gguf"
    with pytest.raises(MismatchError, match=r"types differ: base Q5_0, tuned Q8_0.*--requantize"):
        taia.splice(base, tuned, out)
    assert list(tmp_path.glob("out*")) == []
    receipt = taia.splice(base, tuned, out, requantize=True)
    name = "blk.0.attn_v.weight"
    made = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}[name]
    assert made.tensor_type == Type.Q5_0
    assert np.array_equal(made.data, gguf.quants.quantize(read(tuned)[name], Type.Q5_0))
    assert {entry.origin for entry in receipt.tensors} == {"base", "blend"}
    taia.verify(out)


def test_the_file_type_follows_the_tensors(tmp_path):
    def fields(kind):
        return lambda writer: (llama_fields()(writer), writer.add_file_type(kind))

    base = tiny_llama(tmp_path / "base.gguf", 0, Type.Q8_0, fields=fields(7))
    tuned = tiny_llama(tmp_path / "tuned.gguf", 1, Type.F16, fields=fields(1))
    taia.splice(base, tuned, tmp_path / "out.gguf", requantize=True)
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.file_type").contents() == 7
    taia.verify(tmp_path / "out.gguf")


def test_what_the_library_cannot_pack_is_refused_by_name(tmp_path):
    base, tuned = (tiny_llama(tmp_path / f"{name}.gguf", 0, Type.F32) for name in ("b", "t"))
    for path, kind in ((base, Type.Q4_K), (tuned, Type.Q6_K)):
        _, width = gguf.GGML_QUANT_SIZES[kind]
        writer = gguf.GGUFWriter(path, "llama")
        llama_fields()(writer)
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, width), np.uint8), raw_dtype=kind)
        for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
            getattr(writer, f"write_{step}")()
        writer.close()
    with pytest.raises(MismatchError, match=r"does not pack Q4_K.*llama-quantize"):
        taia.splice(base, tuned, tmp_path / "out.gguf", requantize=True)
    assert not (tmp_path / "out.gguf").exists()
    taia.splice(base, base, tmp_path / "same.gguf")


def test_models_that_do_not_fit_are_refused(two, tmp_path):
    base, _ = two

    def planned(path):
        return taia.plan(base, path).faults

    other = tiny_llama(tmp_path / "qwen.gguf", 1, Type.Q8_0, architecture="qwen2")
    assert planned(other) == ("architectures differ: base llama, tuned qwen2",)
    heads = tiny_llama(tmp_path / "heads.gguf", 1, Type.Q8_0, fields=lambda w: (
        llama_fields()(w), w.add_key_length(8)))  # fmt: skip
    assert "llama.attention.key_length differs: base None, tuned 8" in planned(heads)
    less = tiny_llama(tmp_path / "less.gguf", 1, Type.Q8_0, head=False)
    assert "output.weight: in the base, not in the tuned model" in planned(less)
    words = write_gguf(tmp_path / "words.gguf", llama_tensors(1, words=16), large(Type.Q8_0),
                       fields=llama_fields(words=16))  # fmt: skip
    assert any("shapes differ: base [8, 64], tuned [16, 64]" in fault for fault in planned(words))


def test_settings_that_differ_are_noted(two, tmp_path):
    base, alike = two

    def fields(writer):
        llama_fields()(writer)
        del writer.kv_data[0]["llama.attention.layer_norm_rms_epsilon"]
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_sliding_window_pattern([True, False])

    tuned = tiny_llama(tmp_path / "tuned.gguf", 1, Type.Q8_0, fields=fields)
    (note,) = taia.plan(base, tuned, "ffn").notes
    for told in (
        "llama.attention.layer_norm_rms_epsilon (1e-05 and 1e-06)",
        "llama.rope.freq_base (not stated and 1e+06)",
        "llama.rope.scaling.type (not stated and yarn)",
        "llama.attention.sliding_window_pattern (not stated and a list)",
        "weights of the base will run under it",
    ):
        assert told in note
    heard: list[str] = []
    taia.splice(base, tuned, tmp_path / "out.gguf", "ffn", on_note=heard.append)
    assert heard == [note]
    assert taia.plan(base, tuned, "all").notes == ()
    assert taia.plan(base, alike, "ffn").notes == ()


def test_other_words_need_their_rows(two, tmp_path):
    base, _ = two

    def words(writer):
        llama_fields()(writer)
        del writer.kv_data[0]["tokenizer.ggml.tokens"]
        writer.add_token_list([f"v{word}" for word in range(8)])

    tuned = tiny_llama(tmp_path / "words.gguf", 1, Type.Q8_0, fields=words)
    with pytest.raises(MismatchError, match=r"vocabularies differ.*embedding"):
        taia.splice(base, tuned, tmp_path / "out.gguf")
    taia.splice(base, tuned, tmp_path / "out.gguf", "attention + embedding + head")


def test_a_tied_head_has_one_strength(tmp_path):
    base, tuned = pair_of(tmp_path, head=False)
    with pytest.raises(MismatchError, match="tied to the embedding"):
        taia.splice(base, tuned, tmp_path / "out.gguf", "all - head")
    taia.splice(base, tuned, tmp_path / "out.gguf", "all - head - embedding")


def test_where_it_may_be_written(two, tmp_path):
    base, tuned = two
    with pytest.raises(OutputError, match=r"name it out\.gguf"):
        taia.splice(base, tuned, tmp_path / "out")
    with pytest.raises(OutputError, match="is one of the two models"):
        taia.splice(base, tuned, tuned, overwrite=True)
    out = tmp_path / "new" / "out.gguf"
    taia.splice(base, tuned, out)
    with pytest.raises(OutputError, match="--overwrite"):
        taia.splice(base, tuned, out, "ffn")
    taia.splice(base, tuned, out, "ffn", overwrite=True)
    assert taia.verify(out).selection == "ffn"
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.gguf", "out.gguf.taia.json"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="--requantize is for two GGUF files"):
        taia.plan(tmp_path, tuned, requantize=True)
    with pytest.raises(OutputError, match="a GGUF file comes of two GGUF files"):
        taia.splice(tmp_path, tuned, tmp_path / "other.gguf")


def test_nothing_is_left_of_a_failure(two, tmp_path, monkeypatch):
    import taia.gguf_splice as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "copy_range", full)
    with pytest.raises(OutputError, match="No space left"):
        taia.splice(*two, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hashed", [False, True])
def test_verify_finds_single_bits_anywhere(two, tmp_path, hashed):
    out = tmp_path / "out.gguf"
    sources = [Path(shutil.copy(file, tmp_path)) for file in two]
    taia.splice(*sources, out, "attention", hash=hashed)
    whole, draw = out.read_bytes(), random.Random(1)
    if hashed:
        for file in sources:
            file.unlink()
    taia.verify(out)
    for at in [0, 4, 8, 16, len(whole) - 1, *draw.sample(range(len(whole)), 40)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << draw.randrange(8)
        out.write_bytes(changed)
        with pytest.raises(VerificationError):
            taia.verify(out)
    for other in (whole[:-1], whole + b"\0"):
        out.write_bytes(other)
        with pytest.raises(VerificationError):
            taia.verify(out)


def test_verify_finds_what_else_is_wrong(two, tmp_path):
    base, tuned = (Path(shutil.copy(file, tmp_path)) for file in two)
    out = tmp_path / "out.gguf"
    with pytest.raises(VerificationError, match=r"no out\.gguf\.taia\.json"):
        taia.verify(out)
    taia.splice(base, base, out)
    with pytest.raises(VerificationError, match="every one equals the base's"):
        taia.verify(out)
    taia.splice(base, tuned, out, overwrite=True)
    receipt = tmp_path / "out.gguf.taia.json"
    told = receipt.read_text()
    receipt.write_text(told.replace('"selection": "attention"', '"selection": "ffn"'))
    with pytest.raises(VerificationError, match="edited after it was written"):
        taia.verify(out)
    receipt.write_text(told)
    tuned.write_bytes(tuned.read_bytes())
    with pytest.raises(VerificationError, match="the source changed since"):
        taia.verify(out)


def test_the_plan_in_numbers(two):
    planned = taia.plan(*two)
    totals = planned.totals["all"]
    assert totals["tensors"] == len(read(two[0]))
    assert totals["base"] + totals["tuned"] == sum(t.bytes for t in planned.base.tensors.values())
    assert {d.source for d in planned.decisions} == {Origin.BASE, Origin.TUNED}
    assert json.dumps(planned.to_json())


@pytest.mark.slow
def test_the_command_line_and_what_it_imports(two, tmp_path):
    base, tuned = map(str, two)
    taia_command = str(Path(sys.executable).with_name("taia"))

    def run(*words):
        return subprocess.run([taia_command, *words], cwd=tmp_path, capture_output=True, text=True,
                              check=False)  # fmt: skip

    assert "attention" in run("plan", base, tuned).stdout
    assert run("splice", base, tuned, "out.gguf", "--requantize").returncode == 0
    assert run("verify", "out.gguf").returncode == 0
    assert run("splice", base, tuned, "out").returncode == 2
    code = (
        "import sys, taia\n"
        f"taia.splice({base!r}, {tuned!r}, 'quiet.gguf')\n"
        "assert not {'numpy', 'torch', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}}, "does not name one base and one tuned file"),
        ({"path": "x"}, "not the place"),
    ],
)
def test_a_forged_receipt_is_one_message(two, tmp_path, change, message):
    """Whoever edits a receipt can make its own digest again."""
    out = tmp_path / "out.gguf"
    receipt = taia.splice(*two, out)
    forged = dataclasses.replace(receipt, tuned=dataclasses.replace(receipt.tuned, **change))
    forged.write(out)
    with pytest.raises(VerificationError, match=message):
        taia.verify(out)
