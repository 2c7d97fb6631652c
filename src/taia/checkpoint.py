"""A safetensors checkpoint: its configuration and where each tensor lies; no weight is read.

A checkpoint is a folder with config.json and either model.safetensors or shards
named by model.safetensors.index.json. Only headers are read (header.py).

Everything in a checkpoint comes from outside, so everything is checked here, before
anything else trusts it: names of shards against their folder, the index against the
headers, links and kinds of files (untrusted.py), and how much of it there is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from taia.errors import CheckpointError, SourceError
from taia.files import read_json
from taia.header import (
    BITS,
    FLOATS,
    MAX_FAULTS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    Tensor,
    parse_header,
    read_header,
    weight_of,
)
from taia.index import parse_index, too_many
from taia.sources import Form, Source, resolve
from taia.untrusted import open_regular

__all__ = [
    "BITS",
    "FLOATS",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "Tensor",
    "open_checkpoint",
    "parse_index",
    "read_header",
    "refuse_changed",
    "stamp",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors: its configuration and where each tensor lies.

    `files` lists the weight files in the order of their names; `tensors` is in the order
    of files, and within a file in the order of the bytes. `stamps` holds the size and the
    modification time of each file when its header was read.
    """

    text: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[str, ...]
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json: the architecture's name in transformers."""
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(
                f"{self.path / 'config.json'}: no model_type, so that the parts of this model "
                "cannot be told; save the model with transformers' save_pretrained"
            )
        return model_type

    def refuse_changed(self) -> None:
        """Raise CheckpointError if a weight file is no longer the one whose header was read."""
        refuse_changed(self.path, self.stamps)


def refuse_changed(folder: Path, stamps: Mapping[str, tuple[int, int]]) -> None:
    """Raise CheckpointError if a file of `folder` does not have the stamp that it had."""
    faults = [
        f"{file}: changed while it was read; was it being saved or downloaded?"
        for file, before in stamps.items()
        if stamp(folder / file) != before
    ]
    if faults:
        raise CheckpointError(f"{folder}: not the files that were planned", faults)


def open_checkpoint(source: str | Path | Source) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises SourceError for what is not a safetensors checkpoint, CheckpointError for one
    whose files contradict the format, with every fault of every file.
    """
    found = resolve(source, headers_only=True)
    if found.form is not Form.CHECKPOINT:
        raise SourceError(f"{found.text}: a safetensors checkpoint is needed, this is {found.form}")
    folder = found.path
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not a JSON object")
    placed = _read_index(folder)
    files = sorted(set(placed.values())) if placed is not None else [SINGLE]
    tensors, stamps, faults = _read_headers(folder, files)
    if placed is not None and not faults:
        faults = _index_faults(placed, tensors)
    if faults:
        raise CheckpointError(f"{folder}: not a readable checkpoint", faults)
    return Checkpoint(found.text, folder, config, tensors, tuple(files), stamps)


def _read_headers(
    folder: Path, files: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]], list[str]]:
    """The tensors of all shards, the stamp of each shard, and what is wrong with them."""
    tensors: dict[str, Tensor] = {}
    stamps: dict[str, tuple[int, int]] = {}
    faults: list[str] = []
    names = 0
    for file in files:
        try:
            header, stamps[file] = _read_shard(folder / file)
        except CheckpointError as error:
            faults.append(str(error))
            if len(faults) >= MAX_FAULTS:
                break
            continue
        twice = (name for name in header if name in tensors)
        faults += [f"{name}: stored twice, in {tensors[name].file} and {file}"
                   for name in islice(twice, MAX_FAULTS)]  # fmt: skip
        names += sum(weight_of(name, tensor.shape) for name, tensor in header.items())
        if len(tensors) + len(header) > MAX_TENSORS or names > MAX_NAME_BYTES:
            return tensors, stamps, [too_many()]
        tensors.update(header)
    return tensors, stamps, faults


def _read_shard(path: Path) -> tuple[dict[str, Tensor], tuple[int, int]]:
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        try:
            header = parse_header(file.read, status.st_size, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return header, (status.st_size, status.st_mtime_ns)


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time of a file, by which a change is seen; -1 where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard, or None for a checkpoint of one file."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return None
        pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
        if pickles:
            raise SourceError(
                f"{folder}: its weights are pickles ({', '.join(sorted(pickles)[:3])}), which can "
                "run code when loaded and are not read. Convert them once with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise SourceError(f"{folder}: neither {SINGLE} nor {INDEX} is in it")
    with open_regular(folder / INDEX) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            placed = parse_index(file.read, size, folder / INDEX)
        except OSError as error:
            raise CheckpointError(f"{folder / INDEX}: cannot be read: {error.strerror}") from error
    if (folder / SINGLE).is_file() and SINGLE not in placed.values():
        raise CheckpointError(
            f"{folder}: holds two sets of weights, {SINGLE} and those of {INDEX}; "
            "transformers would load the first. Remove the one that is old"
        )
    return placed


def _index_faults(placed: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    faults = [
        f"{name}: named in {INDEX}, stored nowhere"
        for name in islice((name for name in placed if name not in tensors), MAX_FAULTS)
    ]
    for name, tensor in tensors.items():
        if len(faults) >= MAX_FAULTS:
            break
        if name not in placed:
            faults.append(f"{name}: stored in {tensor.file}, not named in {INDEX}")
        elif placed[name] != tensor.file:
            faults.append(f"{name}: {INDEX} says {placed[name]}, it is stored in {tensor.file}")
    return faults
