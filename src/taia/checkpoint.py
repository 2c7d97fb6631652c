"""Where every tensor of a safetensors checkpoint lies; no weight is read.

A checkpoint is a folder with config.json and either model.safetensors or shards
named by model.safetensors.index.json. Only headers are read: 8 bytes of little-endian
length, a JSON object name -> {dtype, shape, data_offsets}, then the data, contiguous
and without holes (https://github.com/huggingface/safetensors, "Format").

Everything in a checkpoint comes from outside, so everything is checked here, before
anything else trusts it: lengths against the file, offsets against shapes, names of
shards against their folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taia.errors import CheckpointError, SourceError
from taia.files import read_json
from taia.sources import Form, Source, resolve

__all__ = ["BITS", "FLOATS", "Checkpoint", "Tensor", "open_checkpoint", "read_header"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8,
    "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits an element, for every dtype that the format knows."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that deltas are computed on; float8 has its scales in other tensors."""

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: dtype as in the header, shape, and its bytes `[start, stop)` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return self.stop - self.start

    @property
    def parameters(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors: its configuration and where each tensor lies.

    `files` lists the weight files in the order of their names; `tensors` is in the order
    of files, and within a file in the order of the bytes.
    """

    text: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[str, ...]

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


def open_checkpoint(source: str | Path | Source) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises SourceError for what is not a safetensors checkpoint, CheckpointError for one
    whose files contradict the format, with every fault of every file.
    """
    found = resolve(source)
    if found.form is not Form.CHECKPOINT:
        raise SourceError(f"{found.text}: a safetensors checkpoint is needed, this is {found.form}")
    folder = found.path
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not a JSON object")
    placed = _read_index(folder)
    files = sorted(set(placed.values())) if placed is not None else [SINGLE]
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    for file in files:
        try:
            header = read_header(folder / file)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        faults += [f"{name}: stored twice, in {tensors[name].file} and {file}"
                   for name in header if name in tensors]  # fmt: skip
        tensors.update(header)
    if placed is not None and not faults:
        faults = _index_faults(placed, tensors)
    if faults:
        raise CheckpointError(f"{folder}: not a readable checkpoint", faults)
    return Checkpoint(found.text, folder, config, tensors, tuple(files))


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises CheckpointError if the file is truncated, its header is longer than the file,
    or the tensors overlap, leave gaps, or do not fill the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated: "
                    f"a header of {length:,} bytes is stated, the file has {size:,}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: broken safetensors header: not a JSON object")
    return _checked_layout(path, header, 8 + length, size)


def _checked_layout(path: Path, header: dict[str, Any], data: int, size: int) -> dict[str, Tensor]:
    """Tensors in byte order, proven to tile `[data, size)` exactly."""
    tensors, faults = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensors.append(_tensor(name, entry, path.name, data))
        except (KeyError, TypeError, ValueError) as error:
            faults.append(f"{name}: {error}")
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = data
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "follows a gap"
            faults.append(f"{tensor.name}: {what} ({tensor.start:,} where {end:,} was due)")
        end = tensor.stop
    if not faults and end != size:
        what = "truncated" if end > size else "longer than its tensors"
        faults.append(f"{what}: tensors end at byte {end:,}, the file at {size:,}")
    if faults:
        raise CheckpointError(f"{path}: broken safetensors file", faults)
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: Any, file: str, data: int) -> Tensor:
    """One header entry. Raises KeyError, TypeError or ValueError for what the format forbids."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("its entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("shape and data_offsets are lists of non-negative integers")
    start, stop = offsets if len(offsets) == 2 else (1, 0)
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or stop - start != bits // 8:
        raise ValueError(f"offsets {offsets} do not fit {dtype} {shape}, {bits // 8:,} bytes")
    return Tensor(name, dtype, tuple(shape), file, data + start, data + stop)


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
    index = read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    faults = [
        f"{name} -> {shard!r}: a shard is a .safetensors file of this very folder"
        for name, shard in placed.items()
        if not isinstance(shard, str)
        or Path(shard).name != shard
        or not shard.endswith(".safetensors")
        or "\\" in shard
    ]
    if faults:
        raise CheckpointError(f"{folder / INDEX}: names files outside the checkpoint", faults)
    if (folder / SINGLE).is_file() and SINGLE not in placed.values():
        raise CheckpointError(
            f"{folder}: holds two sets of weights, {SINGLE} and those of {INDEX}; "
            "transformers would load the first. Remove the one that is old"
        )
    return placed


def _index_faults(placed: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    faults = [f"{name}: named in {INDEX}, stored nowhere" for name in placed if name not in tensors]
    faults += [f"{name}: stored in {tensor.file}, not named in {INDEX}"
               for name, tensor in tensors.items() if name not in placed]  # fmt: skip
    faults += [
        f"{name}: {INDEX} says {shard}, it is stored in {tensors[name].file}"
        for name, shard in placed.items()
        if name in tensors and tensors[name].file != shard
    ]
    return faults


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which a name stands once."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result
