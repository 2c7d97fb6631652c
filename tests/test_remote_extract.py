"""Extractions from models on a web server: the same adapter, and no more bytes than it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build
from remote_tools import Proxy, nginx
from safetensors.torch import load_file

import taia


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pairs of a dense model, and of one whose experts are stored one by one."""
    folder = tmp_path_factory.mktemp("served")
    for model_type in ("llama", "mixtral"):
        for name, seed in (("base", 0), ("tuned", 1)):
            build(model_type, seed).save_pretrained(folder / f"{model_type}-{name}")
    return folder


@pytest.fixture(scope="module")
def server(root, tmp_path_factory):
    with nginx(root, tmp_path_factory.mktemp("nginx")) as port:
        proxy = Proxy(port)
        yield proxy
        proxy.close()


@pytest.mark.parametrize(
    ("model_type", "keep"),
    [("llama", "attention"), ("llama", "ffn[1:2]"), ("mixtral", "ffn[0:1]"), ("mixtral", "ffn.up")],
)
@pytest.mark.parametrize("remote", ["base", "tuned", "both"])
def test_the_adapter_is_that_of_the_models_on_this_disk(
    server, root, tmp_path, monkeypatch, model_type, keep, remote
):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    here = [root / f"{model_type}-{side}" for side in ("base", "tuned")]
    there = [
        f"{server.url}/{model_type}-{side}" if remote in (side, "both") else folder
        for side, folder in zip(("base", "tuned"), here, strict=True)
    ]
    taia.extract(*here, tmp_path / "here", 4, keep)
    taia.extract(*there, tmp_path / "there", 4, keep)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("there", "here")
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
