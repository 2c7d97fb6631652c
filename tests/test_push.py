"""Outputs on the hub: asked before any work, uploaded whole; the hub is a stand-in on loopback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hub_tools import Hub

import taia
from taia.errors import OutputError
from taia.push import _check_right


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub", "http://127.0.0.1:9")
    yield hub
    hub.close()


@pytest.fixture
def run(hub, pair, tmp_path):
    """A function that splices a tiny pair with further options; gives the finished process."""

    def go(*words: str, token: str | None = "hf_secret") -> subprocess.CompletedProcess:
        environment = os.environ | hub.environment(tmp_path / "home", token)
        base, tuned = pair("llama", shard="50KB")
        return subprocess.run(
            [sys.executable, "-m", "taia", "splice", str(base), str(tuned), "out", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return go


@pytest.mark.slow
def test_an_output_is_uploaded_whole_in_one_commit(run, hub, tmp_path):
    done = run("--push", "org/new", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("/org/new\n")
    assert hub.created[0].get("visibility") == "private" or hub.created[0]["private"]
    assert len(hub.commits) == 1
    there = hub.root / "org" / "new"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {file.name for file in there.iterdir()} == names
    assert all((there / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names)
    taia.verify(there)
    assert all(entry.digest for entry in taia.verify(there).tensors)


@pytest.mark.slow
def test_an_existing_model_is_replaced_on_request_and_its_weights_go(run, hub, tmp_path):
    old = hub.root / "org" / "old"
    old.mkdir(parents=True)
    stale = ["adapter_config.json", "additional_chat_templates/rag.jinja",
             "model-00009-of-00009.safetensors", "pytorch_model.bin"]  # fmt: skip
    for folder in ("lora", "additional_chat_templates"):
        (old / folder).mkdir()
    for name in [*stale, "lora/adapter_model.safetensors", "notes.txt"]:
        (old / name).write_bytes(b"old")
    done = run("--push", "org/old")
    assert done.returncode == 2
    assert "there is a model of that name" in done.stderr
    done = run("--push", "org/old", "--overwrite", "--private")
    assert done.returncode == 2
    assert "is public on the hub" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("--push", "org/old", "--overwrite")
    assert done.returncode == 0, done.stderr
    gone = [line["value"]["path"] for line in hub.commits[0] if line["key"] == "deletedFile"]
    assert sorted(gone) == stale


@pytest.mark.slow
def test_a_failed_upload_leaves_the_output(run, hub, tmp_path):
    hub.broken = True
    done = run("--push", "org/new")
    assert done.returncode == 2
    assert "is complete" in done.stderr
    assert "hf upload org/new" in done.stderr
    assert (tmp_path / "out" / "taia.json").is_file()


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/new", None, "no token of the hub is here"),
        ("org/new", "hf_wrong", "does not know the token"),
        ("other/new", "hf_secret", "not to other"),
        ("new", "hf_secret", "not the name of a model on the hub"),
    ],
)
def test_without_the_right_to_write_nothing_is_done(run, tmp_path, name, token, message):
    done = run("--push", name, token=token)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--private"], "--private is for --push"),
        (["--extract", "2", "--push", "org/new"], "--push: not for an extracted adapter"),
    ],
)
def test_no_option_is_dropped_without_a_word(run, hub, tmp_path, words, message):
    done = run(*words)
    assert (done.returncode, hub.seen) == (2, [])
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_token_that_only_reads_is_refused():
    with pytest.raises(OutputError, match="only reads"):
        _check_right("org/new", {"name": "org", "auth": {"accessToken": {"role": "read"}}})
    _check_right("team/new", {"name": "org", "orgs": [{"name": "team"}]})
