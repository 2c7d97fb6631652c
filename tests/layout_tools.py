"""Checkpoints of one model written in several layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def tensors(folder: Path) -> dict[str, Any]:
    """Every stored tensor of a folder."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def write(folder: Path, state: dict[str, Any], like: Path, **config: Any) -> Path:
    """A checkpoint of one file that holds `state`, with the companions of `like`."""
    folder.mkdir(parents=True)
    for file in like.glob("*.json"):
        if "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    stored = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def rewrite(folder: Path, out: Path, rename: Any, **config: Any) -> Path:
    """The same checkpoint with other names; None drops a tensor."""
    renamed = {rename(name): tensor for name, tensor in tensors(folder).items()}
    return write(out, {k: v for k, v in renamed.items() if k is not None}, folder, **config)


def live_layout(folder: Path, out: Path) -> Path:
    """The same checkpoint under the names and in the stacks that the live model has."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    if model.config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return write(out, state, folder)
