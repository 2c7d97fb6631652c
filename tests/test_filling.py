"""The weights of an output: the same bytes on any number of threads, cut as asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

import taia
from taia import filling
from taia.checkpoint import open_checkpoint, read_header
from taia.copying import BLOCK
from taia.errors import TaiaError
from taia.filling import fill
from taia.pieces import pieces
from taia.shards import parse_size, shards_of

MIXED = "attention + ffn*0.5"


def written(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("step", [1 << 24, 777])
def test_any_number_of_threads_writes_the_same_bytes(pair, tmp_path, monkeypatch, threads, step):
    planned = taia.plan(*pair("llama", "bfloat16", shard="20KB"), keep=MIXED)
    parts = pieces(planned)
    shards = shards_of(planned, parts)
    folders = [tmp_path / "one", tmp_path / "more"]
    for folder, count in zip(folders, (1, threads), strict=True):
        folder.mkdir()
        fill(folder, shards, parts, threads=count)
        monkeypatch.setattr(filling, "STEP", step)
    assert written(folders[0]) == written(folders[1])
    for shard in shards:
        assert list(read_header(folders[0] / shard.name).values()) == list(shard.tensors)


@pytest.mark.parametrize("size", ["20KB", 1, "1GB"])
def test_shards_are_cut_as_asked_and_hold_the_same_tensors(pair, tmp_path, size):
    base, tuned = pair("llama", shard="30KB")
    taia.splice(base, tuned, tmp_path / "as it was")
    taia.splice(base, tuned, tmp_path / "cut", shard_size=size)
    opened = open_checkpoint(tmp_path / "cut")
    sizes = {file: sum(t.bytes for t in opened.tensors.values() if t.file == file)
             for file in opened.files}  # fmt: skip
    single = [t.bytes for t in opened.tensors.values()]
    assert all(s <= parse_size(str(size)) or s in single for s in sizes.values())
    assert len(sizes) == {"20KB": len(sizes), 1: len(single), "1GB": 1}[size]
    assert (len(sizes) == 1) == ((tmp_path / "cut" / "model.safetensors").is_file())
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "as it was")
    taia.verify(tmp_path / "cut")


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            found |= {n: opened.get_tensor(n).tobytes() for n in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("size", ["", "5 apples", "0", "-3GB", "0.1", "9" * 400])
def test_what_is_no_size_is_refused(pair, tmp_path, size):
    with pytest.raises(TaiaError, match="is not a size"):
        taia.splice(*pair("llama"), tmp_path / "out", shard_size=size)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("100", 100), ("20kb", 20_000)],
)
def test_sizes_are_read_as_transformers_reads_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("ahead", [0, 8, 1000, 4000])
@pytest.mark.parametrize("keep", ["none", "attention", "all"])
def test_most_bytes_lie_within_a_block_as_in_their_source(pair, tmp_path, ahead, keep):
    """So that a file system that can share blocks shares them."""
    base, tuned = pair("llama")
    moved = tmp_path / "tuned"
    shutil.copytree(tuned, moved)
    raw = (tuned / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * ahead
    data = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    (moved / "model.safetensors").write_bytes(data)
    planned = taia.plan(base, moved, keep=keep)
    parts = pieces(planned)
    (shard,) = shards_of(planned, parts)
    assert len(shard.header) % 8 == 0
    assert json.loads(shard.header[8:]).keys() == {"__metadata__", *planned.base.tensors}
    alike = dict.fromkeys(("base", "tuned"), 0)
    for tensor, decision in zip(shard.tensors, planned.decisions, strict=True):
        start = parts[tensor.name].tensor.start
        alike[decision.source.value] += tensor.bytes * ((tensor.start - start) % BLOCK == 0)
    totals = planned.totals["all"]
    assert max(alike.values()) >= max(totals["base"], totals["tuned"])
