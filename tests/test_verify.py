"""Whatever was changed after a splice, verify finds it."""

from __future__ import annotations

import json
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
