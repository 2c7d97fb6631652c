"""Whatever was changed after a splice, verify finds it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import shutil
from pathlib import Path

import pytest

import taia
from taia.errors import VerificationError


@pytest.fixture
def spliced(pair, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Copies of base and tuned, and what was spliced from them, with a blend in it."""
    base, tuned = pair("llama")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(tuned, tmp_path / "tuned")
    out = tmp_path / "out"
    taia.splice(tmp_path / "base", tmp_path / "tuned", out, keep="attention + ffn[1]*0.5")
    return tmp_path / "base", tmp_path / "tuned", out


def found(out: Path) -> str:
    with pytest.raises(VerificationError) as caught:
        taia.verify(out)
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.mark.parametrize("origin", ["base", "tuned", "blend"])
def test_one_flipped_bit(spliced, origin):
    out = spliced[2]
    entry = next(e for e in taia.verify(out).tensors if e.origin == origin)
    file = out / entry.file
    raw = bytearray(file.read_bytes())
    raw[(entry.start + entry.stop) // 2] ^= 1
    file.write_bytes(raw)
    assert entry.name in found(out)


def test_a_missing_and_an_additional_tensor(spliced):
    from safetensors.numpy import load_file, save_file

    out = spliced[2]
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    message = found(out)
    assert "model.norm.weight: missing" in message
    assert "model.norm.extra: not in the receipt" in message


def test_other_files(spliced):
    out = spliced[2]
    (out / "config.json").write_text("{}")
    (out / "generation_config.json").unlink()
    (out / "pytorch_model.bin").write_bytes(b"")
    message = found(out)
    for words in ("config.json: altered", "generation_config.json: missing", "pytorch_model.bin"):
        assert words in message


def test_a_truncated_output(spliced):
    file = spliced[2] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "truncated" in found(spliced[2])


def test_a_missing_weight_file(spliced):
    (spliced[2] / "model.safetensors").unlink()
    assert "model.safetensors: missing" in found(spliced[2])


def test_a_receipt_that_claims_another_selection(spliced):
    path = spliced[2] / "taia.json"
    receipt = json.loads(path.read_text())
    receipt["selection"] = "ffn"
    path.write_text(json.dumps(receipt))
    assert "another source than its selection" in found(spliced[2])


def test_a_receipt_that_is_none(spliced):
    path = spliced[2] / "taia.json"
    path.write_text('{"selection": 3}')
    assert "not a valid receipt" in found(spliced[2])
    path.unlink()
    assert "taia did not write this folder" in found(spliced[2])


def test_a_source_that_changed_or_is_gone(spliced):
    base, tuned, out = spliced
    weights = tuned / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert "the source changed since" in found(out)
    shutil.rmtree(base)
    assert "the source is gone" in found(out)


def test_digests_make_the_sources_unnecessary(spliced, tmp_path):
    base, tuned, _ = spliced
    out = tmp_path / "hashed"
    receipt = taia.splice(base, tuned, out, keep="attention*0.7", hash=True)
    shutil.rmtree(base)
    shutil.rmtree(tuned)
    assert taia.verify(out) == receipt
    file = out / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 0x80
    file.write_bytes(raw)
    assert "its bytes are not those that were written" in found(out)


def test_an_output_that_keeps_nothing_new(pair, tmp_path):
    base, _ = pair("llama")
    shutil.copytree(base, tmp_path / "same")
    taia.splice(base, tmp_path / "same", tmp_path / "out", keep="attention")
    assert "the output is the base model" in found(tmp_path / "out")
    taia.splice(base, tmp_path / "same", tmp_path / "none", keep="none")
    taia.verify(tmp_path / "none")


def test_an_edited_receipt_is_found_whatever_was_edited(spliced):
    path = spliced[2] / "taia.json"
    text = path.read_text()
    path.write_text(text.replace(str(spliced[0]), str(spliced[0].parent / "another"), 1))
    assert "edited after it was written" in found(spliced[2])
    path.write_text(text + "\n")
    assert "edited after it was written" in found(spliced[2])
    path.write_text(text)
    taia.verify(spliced[2])


def test_receipts_of_format_1_with_sha256_still_verify(spliced):
    """What taia wrote before receipts named an algorithm and held a digest of themselves."""
    import hashlib

    out = spliced[2]
    raw = (out / "model.safetensors").read_bytes()
    receipt = json.loads((out / "taia.json").read_text())
    del receipt["content"], receipt["algorithm"]
    receipt["format"] = 1
    for entry in receipt["tensors"]:
        entry["digest"] = hashlib.sha256(raw[entry["start"] : entry["stop"]]).hexdigest()
    (out / "taia.json").write_text(json.dumps(receipt))
    shutil.rmtree(spliced[0])
    assert taia.verify(out).algorithm == "sha256"
    (out / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "its bytes are not those that were written" in found(out)


def test_digests_are_those_of_the_libraries(spliced, tmp_path):
    from blake3 import blake3

    base, tuned, _ = spliced
    receipt = taia.splice(base, tuned, tmp_path / "hashed", hash=True)
    raw = (tmp_path / "hashed" / "model.safetensors").read_bytes()
    assert receipt.algorithm == "blake3"
    for entry in receipt.tensors:
        assert entry.digest == blake3(raw[entry.start : entry.stop]).hexdigest()


def test_a_hashed_receipt_with_another_selection(spliced, tmp_path):
    base, tuned, _ = spliced
    out = tmp_path / "hashed"
    taia.splice(base, tuned, out, hash=True)
    path = out / "taia.json"
    path.write_text(path.read_text().replace('"selection": "attention"', '"selection": "ffn"'))
    message = found(out)
    assert "another source than its selection" in message
    assert "edited after it was written" in message


def test_every_fault_is_listed(spliced):
    out = spliced[2]
    file = out / "model.safetensors"
    raw = bytearray(file.read_bytes())
    entries = taia.verify(out).tensors
    assert len(entries) > 20
    for entry in entries:
        raw[entry.start] ^= 4
    file.write_bytes(raw)
    message = found(out)
    assert all(f"{entry.name}: differs from its source" in message for entry in entries)


def test_an_output_that_is_the_tuned_model_is_told(pair, tmp_path):
    base, tuned = pair("llama")
    taia.splice(base, tuned, tmp_path / "once", keep="attention")
    taia.splice(base, tmp_path / "once", tmp_path / "twice", keep="attention")
    notes: list[str] = []
    taia.verify(tmp_path / "twice", on_note=notes.append)
    assert "the output is the tuned model" in notes[0]
    taia.verify(tmp_path / "once", on_note=notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("tied", "words"), [(True, "no head is stored"), (False, "config.json ties it")]
)
def test_broken_ties(pair, tmp_path, tied, words):
    out = tmp_path / "out"
    taia.splice(*pair("llama", tie_word_embeddings=tied), out)
    taia.verify(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": not tied}))
    assert words in found(out)


def test_a_receipt_sends_nobody_to_the_hub(spliced):
    path = spliced[2] / "taia.json"
    receipt = json.loads(path.read_text())
    receipt["base"] = {"text": "x", "path": "some/model", "files": {}}
    path.write_text(json.dumps(receipt))
    assert "some/model: not the place of a source" in found(spliced[2])


@pytest.mark.slow
@pytest.mark.parametrize("digests", [False, True], ids=["sources", "digests"])
def test_each_of_a_thousand_random_flips(pair, tmp_path, digests):
    """One bit, anywhere in any file of the output: weights, header, configuration, receipt."""
    base, tuned = pair("llama", "bfloat16", shard="20KB")
    out = tmp_path / "out"
    taia.splice(base, tuned, out, keep="attention + ffn[1]*0.3", hash=digests)
    taia.verify(out)
    files = sorted(out.iterdir())
    sizes = [file.stat().st_size for file in files]
    chance = random.Random(0)
    missed = []
    for _ in range(1_000):
        file = chance.choices(files, sizes)[0]
        raw = bytearray(file.read_bytes())
        bit = chance.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        before = file.read_bytes()
        file.write_bytes(raw)
        try:
            taia.verify(out)
            missed.append((file.name, bit))
        except VerificationError:
            pass
        file.write_bytes(before)
    assert not missed
    taia.verify(out)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("named", ["by receipts of today", "by receipts without its files"])
def test_a_slice_without_its_base(adapters, tmp_path, digests, named):
    """With digests only the slice itself is looked at; without them the base that went is told."""
    base, adapter = adapters("llama", "plain")
    shutil.copytree(base, tmp_path / "base")
    out = tmp_path / "out"
    receipt = taia.splice(tmp_path / "base", adapter, out, hash=digests)
    assert receipt.base.files.keys() == {"config.json"}
    if named == "by receipts without its files":
        bare = dataclasses.replace(receipt, base=dataclasses.replace(receipt.base, files={}))
        bare.write(out)
    taia.verify(out)
    shutil.rmtree(tmp_path / "base")
    if digests:
        taia.verify(out)
    else:
        assert f"{tmp_path / 'base'}" in (told := found(out))
        assert "the source is gone" in told


def test_a_base_at_a_name_that_no_file_can_have(adapters, tmp_path):
    receipt = taia.splice(*adapters("llama", "plain"), tmp_path / "out")
    base = dataclasses.replace(receipt.base, path=f"/{'a' * 5_000}")
    for files in ({}, receipt.base.files):
        changed = dataclasses.replace(receipt, base=dataclasses.replace(base, files=files))
        changed.write(tmp_path / "out")
        assert "cannot be looked at" in found(tmp_path / "out")


def test_a_slice_whose_base_became_another(adapters, tmp_path):
    base, adapter = adapters("llama", "plain")
    shutil.copytree(base, tmp_path / "base")
    taia.splice(tmp_path / "base", adapter, tmp_path / "out")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert f"{config}: the source changed since" in found(tmp_path / "out")


def test_a_tensor_is_compared_in_parts(adapters, tmp_path, monkeypatch):
    base, adapter = adapters("llama", "plain")
    taia.splice(base, adapter, tmp_path / "out")
    monkeypatch.setattr(importlib.import_module("taia.verify"), "AT_ONCE", 7)
    taia.verify(tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert "differs from its source" in found(tmp_path / "out")
