"""Checkpoints that lie: each is refused with one clear message, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import taia
from taia.checkpoint import open_checkpoint, read_header
from taia.errors import CheckpointError, TaiaError


@pytest.fixture
def copies(pair, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of a base and a tuned checkpoint, free to be broken."""
    base, tuned = pair("llama")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(tuned, tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def refused(base: Path, tuned: Path, words: str, keep: str = "attention") -> None:
    out = base.parent / "out"
    before = sorted(f.name for f in base.parent.iterdir())
    with pytest.raises(TaiaError) as caught:
        taia.splice(base, tuned, out, keep=keep)
    assert words in str(caught.value), str(caught.value)
    assert caught.value.exit_code == 2
    assert sorted(f.name for f in base.parent.iterdir()) == before


def rewrite_header(file: Path, change: Callable[[dict], None]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def entries(header: dict) -> list[dict]:
    return [value for name, value in header.items() if name != "__metadata__"]


def move(header: dict, by: int) -> None:
    last = max(entries(header), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [offset + by for offset in last["data_offsets"]]


def test_missing_folder(copies):
    refused(copies[0], copies[0].parent / "nowhere", "no such folder")


def test_not_a_checkpoint(copies):
    empty = copies[0].parent / "empty"
    empty.mkdir()
    refused(copies[0], empty, "neither config.json nor adapter_config.json")


def test_no_weights(copies):
    (copies[1] / "model.safetensors").unlink()
    refused(*copies, "neither model.safetensors nor model.safetensors.index.json")


def test_truncated(copies):
    file = copies[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(*copies, "truncated")


def test_longer_than_its_tensors(copies):
    file = copies[1] / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    refused(*copies, "longer than its tensors")


def test_header_length_beyond_the_file(copies):
    file = copies[1] / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(*copies, "a header of 4,611,686,018,427,387,904 bytes")


def test_header_that_is_no_json(copies):
    file = copies[1] / "model.safetensors"
    file.write_bytes((4).to_bytes(8, "little") + b"{][}")
    refused(*copies, "broken safetensors header")


@pytest.mark.parametrize(("by", "words"), [(-4, "overlaps"), (4, "follows a gap")])
def test_overlapping_or_gapped_offsets(copies, by, words):
    rewrite_header(copies[1] / "model.safetensors", lambda header: move(header, by))
    refused(*copies, words)


def test_offsets_that_do_not_fit_the_shape(copies):
    rewrite_header(
        copies[1] / "model.safetensors", lambda header: entries(header)[0].update(shape=[1, 1])
    )
    refused(*copies, "do not fit")


def test_unknown_dtype(copies):
    rewrite_header(
        copies[1] / "model.safetensors", lambda header: entries(header)[0].update(dtype="F128")
    )
    refused(*copies, "unknown dtype 'F128'")


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7, "é" * 200 + ".safetensors"],
)
def test_index_that_names_a_file_outside(copies, shard):
    index = {"weight_map": {"model.norm.weight": shard}}
    (copies[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(*copies, "expected a name and the file" if shard == 7 else "outside the checkpoint")


def test_index_that_names_a_missing_shard(copies):
    (copies[1] / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-9.safetensors"}}
    (copies[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(*copies, "cannot be read")


def test_index_and_shard_disagree(copies):
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "x": "model.safetensors"}}
    (copies[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(*copies, "named in model.safetensors.index.json, stored nowhere")


def test_two_sets_of_weights(copies):
    (copies[1] / "m.safetensors").write_bytes((copies[1] / "model.safetensors").read_bytes())
    index = {"weight_map": {"model.norm.weight": "m.safetensors"}}
    (copies[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(*copies, "two sets of weights")


def test_other_shapes(copies, pair):
    _, wide = pair("llama", intermediate_size=64)
    refused(copies[0], wide, "shapes differ: base [48, 32], tuned [64, 32]")


def test_resized_vocabulary(copies, pair):
    _, resized = pair("llama", vocab_size=70)
    refused(copies[0], resized, "the vocabulary was resized")


def test_other_names(copies):
    rewrite_header(
        copies[1] / "model.safetensors",
        lambda header: header.update({"model.extra.weight": header.pop("model.norm.weight")}),
    )
    refused(*copies, "model.norm.weight: in the base, not in the tuned model")


def test_other_model_type(copies, pair):
    _, other = pair("qwen2")
    refused(copies[0], other, "model types differ: base llama, tuned qwen2")


def test_other_dtype(copies, pair):
    _, half = pair("llama", "float16")
    refused(copies[0], half, "dtypes differ: base F32, tuned F16")


def test_unknown_model_type(copies):
    for folder in copies:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    refused(*copies, "llama")


def test_selection_with_a_typo_and_without_a_match(copies):
    refused(*copies, "did you mean 'attention'", keep="atention")
    refused(*copies, "'router' matches nothing", keep="router")
    refused(*copies, "matches nothing", keep="ffn[3:]")


def test_pickle_only(copies):
    (copies[1] / "model.safetensors").rename(copies[1] / "pytorch_model.bin")
    refused(*copies, "pickles")


def test_destination_exists(copies):
    out = copies[0].parent / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(TaiaError, match="--overwrite"):
        taia.splice(*copies, out)
    assert (out / "precious").read_text() == "kept"
    taia.splice(*copies, out, overwrite=True)
    assert not (out / "precious").exists()
    taia.verify(out)


def test_destination_is_a_source(copies):
    for out in (copies[0], copies[0].parent):
        with pytest.raises(TaiaError, match="one of the two models"):
            taia.splice(*copies, out, overwrite=True)
    for out in (Path(), Path.home()):
        with pytest.raises(TaiaError, match="name a new folder"):
            taia.splice(*copies, out, overwrite=True)
    taia.splice(*copies, copies[0].parent / "out")


def test_destination_without_space(copies, monkeypatch):
    monkeypatch.setattr("taia.files._free", lambda _: 9)
    refused(*copies, "9 are free")


def test_one_strength_for_a_tied_head(copies):
    refused(*copies, "tied to the embedding", keep="all - embedding")
    taia.splice(*copies, copies[0].parent / "out", keep="all - embedding - head")


def test_a_broken_config(copies):
    (copies[1] / "config.json").write_text("{")
    refused(*copies, "not valid JSON")


def test_every_fault_of_one_input_is_told(copies):
    def spoil(header: dict) -> None:
        for entry in entries(header)[:3]:
            entry["dtype"] = "F128"

    rewrite_header(copies[1] / "model.safetensors", spoil)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copies[1])
    assert str(caught.value).count("unknown dtype") == 3


def test_the_reader_agrees_with_the_safetensors_library(copies):
    from safetensors import safe_open

    found = open_checkpoint(copies[0]).tensors
    with safe_open(copies[0] / "model.safetensors", "np") as file:
        assert set(found) == set(file.keys())
        for name, tensor in found.items():
            assert list(tensor.shape) == file.get_slice(name).get_shape()
            assert tensor.bytes == file.get_tensor(name).nbytes


arrays = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9),
    st.tuples(st.sampled_from(["f2", "f4", "i8", "u1"]), st.lists(st.integers(0, 3), max_size=3)),
    max_size=5,
)


@given(arrays.filter(lambda a: "__metadata__" not in a))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_library_writes_is_read(tmp_path: Path, made) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: np.zeros(shape, dtype) for name, (dtype, shape) in made.items()}, file)
    assert {n: list(t.shape) for n, t in read_header(file).items()} == {
        name: shape for name, (_, shape) in made.items()
    }


@pytest.mark.slow
@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_broken_bytes_give_a_checkpoint_error_and_nothing_else(tmp_path: Path, data) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": np.zeros((2, 3), "f4"), "b": np.ones(4, "f2")}, file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        tensors = read_header(file)
    except CheckpointError:
        return
    assert all(t.stop <= file.stat().st_size for t in tensors.values())


def test_a_pipe_in_place_of_a_file_does_not_hang(copies):
    index = {"weight_map": {"model.norm.weight": "pipe.safetensors"}}
    (copies[1] / "model.safetensors").unlink()
    (copies[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    os.mkfifo(copies[1] / "pipe.safetensors")
    refused(*copies, "not a regular file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(copies, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (copies[1] / name).rename(tmp_path / "elsewhere" / name)
    (copies[1] / name).symlink_to(tmp_path / "elsewhere" / name)
    refused(*copies, "a link that leads out of the model's folder")


def test_a_linked_folder_beside_the_weights_is_passed_over(copies, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copies[1] / "tokenizer").symlink_to(tmp_path / "elsewhere")
    taia.splice(*copies, copies[0].parent / "out")
    assert not (copies[0].parent / "out" / "tokenizer").exists()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_a_link_that_leads_nowhere_is_refused(copies, name):
    (copies[1] / name).unlink(missing_ok=True)
    (copies[1] / name).symlink_to("a-blob-that-was-removed")
    refused(*copies, "a link that leads nowhere")


def test_links_inside_the_folder_and_to_the_blobs_of_the_hub_cache(copies, tmp_path):
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in copies[1].iterdir():
        file.rename(cache / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    (copies[0] / "model.safetensors").rename(copies[0] / "weights")
    (copies[0] / "model.safetensors").symlink_to("weights")
    taia.splice(copies[0], snapshot, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    taia.verify(tmp_path / "out")


def cached(cache: Path, model: Path, inside: str) -> Path:
    """A model as huggingface_hub 2.4 keeps it: links to links to the blobs of the cache."""
    snapshot = cache / "models--some--model" / "snapshots" / "abc" / inside
    blobs, store = cache / "models--some--model" / "blobs", cache / "blobs" / "4f"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    for number, file in enumerate(sorted(model.iterdir())):
        name = f"4f{number:062x}"
        file.rename(store / name)
        (blobs / f"hash-{file.name}").symlink_to(f"../../blobs/4f/{name}")
        up = "../" * (2 + bool(inside))
        (snapshot / file.name).symlink_to(f"{up}blobs/hash-{file.name}")
    return snapshot


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_the_blobs_that_all_repositories_of_the_hub_cache_share(copies, tmp_path, inside):
    snapshot = cached(tmp_path / "hub", copies[1], inside)
    taia.splice(copies[0], snapshot, tmp_path / "out")
    taia.verify(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    marker = tmp_path / "hub" / "blobs" / ".huggingface-shared-blobs"
    marker.unlink()
    refused(copies[0], snapshot, "a link that leads out of the model's folder")
    marker.write_text("1\n")
    store = next((tmp_path / "hub" / "blobs" / "4f").iterdir()).parent
    store.rename(store.with_name("private"))
    for link in (tmp_path / "hub" / "models--some--model" / "blobs").iterdir():
        target = link.readlink()
        link.unlink()
        link.symlink_to(str(target).replace("/4f/", "/private/"))
    refused(copies[0], snapshot, "a link that leads out of the model's folder")


def test_a_source_that_is_replaced_while_it_is_read_leaves_nothing(copies):
    from taia.splice import execute

    planned = taia.plan(*copies, keep="all")
    file = copies[1] / "model.safetensors"
    os.utime(file, ns=(0, 0))  # what a download or a save does: another file of the same size
    with pytest.raises(TaiaError, match="changed while it was read"):
        execute(planned, copies[0].parent / "out")
    assert not (copies[0].parent / "out").exists()


def test_a_layer_beyond_all_models(copies):
    name = f"model.layers.{10**15}.mlp.up_proj.weight"
    for folder in copies:
        rewrite_header(
            folder / "model.safetensors",
            lambda header: header.update({name: header.pop("model.layers.0.mlp.up_proj.weight")}),
        )
    refused(*copies, "1 of 29 tensor names are unknown", keep="all - ffn")


def test_a_message_cannot_steer_the_terminal(copies):
    rewrite_header(
        copies[1] / "model.safetensors",
        lambda header: header.update({"\x1b[2J\u202e": header.pop("model.norm.weight")}),
    )
    with pytest.raises(TaiaError) as caught:
        taia.splice(*copies, copies[0].parent / "out")
    assert "\\x1b[2J\\u202e: in the tuned model" in str(caught.value)
