"""A source that is saved again while it is read leaves nothing, nor does an unfit name."""

from __future__ import annotations

import contextlib
import importlib
import os

import pytest

import taia
from taia.errors import TaiaError

# PEFT says so each time an adapter is saved for a base that is not on the hub
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


@pytest.mark.parametrize("way", ["slice", "merge", "extract"])
def test_a_source_that_is_saved_again_while_it_is_read_leaves_nothing(
    pair, adapters, tmp_path, monkeypatch, way
):
    base, adapter = adapters("llama", "plain")
    changing = adapter / "adapter_model.safetensors"
    if way == "extract":
        changing = pair("llama")[1] / "model.safetensors"
    before = changing.stat()
    name = {"slice": "taia.slicing", "merge": "taia.splice", "extract": "taia.extract"}[way]
    module = importlib.import_module(name)
    staged = module.staged_folder

    @contextlib.contextmanager
    def meanwhile(*arguments, **options):
        with staged(*arguments, **options) as folder:
            os.utime(changing, ns=(0, 0))
            yield folder

    def carry_out():
        if way == "extract":
            taia.extract(*pair("llama"), tmp_path / "out", 2)
        else:
            taia.splice(base, adapter, tmp_path / "out", merge=way == "merge")

    monkeypatch.setattr(module, "staged_folder", meanwhile)
    try:
        with pytest.raises(TaiaError, match="changed while it was read"):
            carry_out()
        assert not any(tmp_path.iterdir())
    finally:
        os.utime(changing, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_folder_called_as_a_gguf_file_is_refused(adapters, pair, tmp_path):
    with pytest.raises(TaiaError, match="name a folder"):
        taia.slice_adapter(adapters("llama", "plain")[1], tmp_path / "out.gguf")
    with pytest.raises(TaiaError, match="name a folder"):
        taia.extract(*pair("llama"), tmp_path / "out.gguf", 2)
    assert not any(tmp_path.iterdir())
