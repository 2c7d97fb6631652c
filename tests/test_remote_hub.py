"""Models on the hub, read from one commit by range; the hub is a stand-in on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build
from hub_tools import COMMIT, Hub
from remote_tools import Proxy, nginx

import taia
from taia.errors import SourceError
from taia.remote_hub import HubAddress


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Repositories: two checkpoints, an adapter, one in a folder of its repository."""
    from adapter_tools import save_adapter

    folder = tmp_path_factory.mktemp("hub")
    for name, seed in (("base", 0), ("tuned", 1)):
        model = build("llama", seed, hidden_size=128, intermediate_size=256, vocab_size=500)
        model.save_pretrained(folder / "org" / name, max_shard_size="1MB")
        (folder / "org" / name / "tokenizer.json").write_text('{"of": "' + name + '"}')
    save_adapter(folder / "org" / "base", folder / "org" / "adapter", r=4, lora_alpha=8)
    shutil.copytree(folder / "org" / "tuned", folder / "org" / "many" / "inside")
    return folder


@pytest.fixture(scope="module")
def hub(root, tmp_path_factory):
    with nginx(root, tmp_path_factory.mktemp("nginx")) as port:
        storage = Proxy(port)
        hub = Hub(root, storage.url)
        hub.proxy = storage
        yield hub
        hub.close()
        storage.close()


@pytest.fixture
def run(hub, tmp_path):
    """A function that runs `taia` against the hub; gives the finished process."""

    def go(*words: str, token: str | None = None, **more: str) -> subprocess.CompletedProcess:
        environment = os.environ | hub.environment(tmp_path / "home", token)
        environment |= {"TAIA_CACHE": str(tmp_path / "cache")} | more
        environment.pop("HF_TOKEN", None) if token is None else None
        hub.seen.clear()
        hub.proxy.reset()
        return subprocess.run(
            [sys.executable, "-m", "taia", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return go


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_a_splice_of_two_models_of_the_hub(run, hub, root, tmp_path):
    done = run("plan", "org/base", "org/tuned", "--json", token="hf_secret")
    assert done.returncode == 0, done.stderr
    headers = hub.proxy.body
    assert headers < 30_000
    done = run("splice", "org/base", "org/tuned", "out", token="hf_secret")
    assert done.returncode == 0, done.stderr
    taia.splice(root / "org" / "base", root / "org" / "tuned", tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    weights = sum(len(data) for data in weights_of(tmp_path / "out").values())
    assert hub.proxy.body <= weights
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "tuned"}
    receipt = taia.verify(tmp_path / "out")
    assert receipt.base is not None
    assert receipt.base.path == f"hf://org/base@{COMMIT}"
    assert all(len(stated["sha256"]) == 64 for stated in receipt.base.stated.values())
    # the token goes to the hub and nowhere else
    assert all(token == "Bearer hf_secret" for _, _, token in hub.seen)
    assert not hub.proxy.tokens


@pytest.mark.slow
def test_a_model_that_the_cache_holds_whole_is_not_fetched(run, hub, root, tmp_path):
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1]))"
    environment = os.environ | hub.environment(tmp_path / "home")
    for name in ("org/base", "org/tuned"):
        subprocess.run([sys.executable, "-c", code, name], env=environment, check=True)
    done = run("splice", "org/base", "org/tuned", "out")
    assert done.returncode == 0, done.stderr
    assert hub.proxy.requests == []
    done = run("splice", "org/base", "org/tuned", "out2", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.seen == []
    done = run("splice", "org/base", "org/tuned", "out3", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "out3")
    assert run("verify", "out2").returncode == 0


@pytest.mark.slow
def test_an_adapter_of_the_hub_and_the_headers_of_its_base(run, hub, root, tmp_path):
    done = run("splice", "org/base", "org/adapter", "sliced")
    assert done.returncode == 0, done.stderr
    adapter = (root / "org" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert hub.proxy.body < adapter + 20_000
    done = run("splice", "org/base", "org/adapter", "merged", "--merge")
    assert done.returncode == 0, done.stderr
    local = root / "org" / "base", root / "org" / "adapter"
    taia.splice(*local, tmp_path / "local")
    taia.splice(*local, tmp_path / "merged-local", merge=True)
    assert weights_of(tmp_path / "sliced") == weights_of(tmp_path / "local")
    assert weights_of(tmp_path / "merged") == weights_of(tmp_path / "merged-local")
    assert run("verify", "sliced").returncode == 0
    assert run("verify", "merged").returncode == 0


@pytest.mark.slow
def test_a_folder_and_a_commit_of_a_repository(run, root, tmp_path):
    done = run("splice", f"hf://org/base@{COMMIT}", "hf://org/many/inside", "out")
    assert done.returncode == 0, done.stderr
    taia.splice(root / "org" / "base", root / "org" / "tuned", tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


@pytest.mark.slow
def test_a_whole_file_must_have_the_digest_of_the_hub(run, hub, tmp_path):
    hub.proxy.reset()
    run("plan", "org/base", "org/tuned")

    def flip(_number: int, _path: str, asked: str) -> str | None:
        return "flipped" if asked and not asked.startswith(("bytes=0-", "bytes=8-")) else None

    go = hub.proxy.reset
    hub.proxy.reset = lambda: go(flip)
    try:
        done = run("splice", "org/base", "org/tuned", "out", "--keep", "all")
    finally:
        hub.proxy.reset = go
    assert done.returncode == 2
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run("splice", "org/base", "org/tuned", "out", "--keep", "all").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "neither a local folder nor a model that the hub shows"),
        ("org/base@other", "not the revision other"),
        ("hf://org", "not an address of the hub"),
        ("hf://org/base/../x", "not an address of the hub"),
        ("org/gated", "gated"),
    ],
)
def test_what_the_hub_refuses_is_one_message(run, hub, root, name, message):
    if not (root / "org" / "gated").exists():
        shutil.copytree(root / "org" / "base", root / "org" / "gated")
    hub.gated = {"org/gated"}
    done = run("plan", name, "org/tuned")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") <= 2
    if "gated" in name:
        assert "hf auth login" in done.stderr
        assert run("plan", name, "org/tuned", token="hf_secret").returncode == 0


@pytest.mark.slow
def test_loading_a_model_of_the_hub_still_goes_through_its_own_cache(hub, tmp_path):
    code = "from taia.load import load_model; print(load_model('org/base').config.model_type)"
    environment = os.environ | hub.environment(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "llama\n", done.stderr
    assert (tmp_path / "home" / "hub" / "models--org--base").is_dir()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a/b", HubAddress("a/b")),
        ("a/b@refs/pr/3", HubAddress("a/b", "refs/pr/3")),
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a/b@v1/c/d/", HubAddress("a/b", "v1", "c/d")),
        ("hf://a/b@refs/pr/3/c", HubAddress("a/b", "refs/pr/3", "c")),
    ],
)
def test_addresses_of_the_hub(text, address):
    assert HubAddress.parse(text) == address


def test_an_address_that_climbs_is_refused():
    with pytest.raises(SourceError):
        HubAddress.parse("hf://a/b/c/../../d")
