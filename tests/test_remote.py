"""Splices of models on a web server: the right bytes, no others, whatever breaks on the way.

A real nginx serves them; a proxy before it counts what it sends and breaks what a test names.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import build
from remote_tools import Proxy, nginx

import taia
from taia import mirror as mirrors
from taia import transfer
from taia.errors import SourceError
from taia.sources import resolve

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 2000}
"""60 MB in float32, so that headers do not weigh."""


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Two sharded checkpoints of 60 MB, and two small ones of one file."""
    folder = tmp_path_factory.mktemp("served")
    for name, seed in (("base", 0), ("tuned", 1)):
        build("llama", seed, **WIDE).save_pretrained(folder / name, max_shard_size="20MB")
        build("llama", seed).save_pretrained(folder / f"small-{name}")
    (folder / "tuned" / "tokenizer.json").write_text("{}")
    (folder / "small-tuned" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def server(root, tmp_path_factory):
    with nginx(root, tmp_path_factory.mktemp("nginx")) as port:
        proxy = Proxy(port)
        yield proxy
        proxy.close()


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch, request):
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    if "server" in request.fixturenames:
        request.getfixturevalue("server").reset()


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def headers_of(folder: Path) -> int:
    sizes = [8 + int.from_bytes(f.read_bytes()[:8], "little") for f in folder.glob("*.safetensors")]
    return sum(sizes)


def small_files(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.suffix != ".safetensors")


def test_a_plan_downloads_headers_only(server, root):
    planned = taia.plan(f"{server.url}/base", f"{server.url}/tuned")
    local = taia.plan(root / "base", root / "tuned")
    assert planned.to_json()["tensors"] == local.to_json()["tensors"]
    indexes = sum((root / m / n).stat().st_size for m in ("base", "tuned")
                  for n in ("config.json", "model.safetensors.index.json"))  # fmt: skip
    assert server.body == headers_of(root / "base") + headers_of(root / "tuned") + indexes
    before = server.body
    again = taia.plan(f"{server.url}/base", f"{server.url}/tuned")
    assert again.to_json() == planned.to_json()
    assert server.body - before == indexes  # the headers are in the cache


def test_a_splice_downloads_what_the_plan_names_and_gives_the_room_back(server, root, tmp_path):
    taia.splice(root / "base", root / "tuned", tmp_path / "local")
    receipt = taia.splice(f"{server.url}/base", f"{server.url}/tuned", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert taia.verify(tmp_path / "out") == receipt
    weights = sum(entry.stop - entry.start for entry in receipt.tensors)
    heads = sum(headers_of(root / name) + small_files(root / name) for name in ("base", "tuned"))
    planned = weights + heads
    assert weights <= server.body
    print(f"planned {planned:,}, body {server.body:,}, with HTTP headers {server.sent:,}")
    assert server.sent <= 1.02 * planned
    assert on_disk(tmp_path / "cache") < 1_000_000


@pytest.mark.slow
def test_downloads_are_kept_on_request(server, tmp_path):
    urls = f"{server.url}/base", f"{server.url}/tuned"
    taia.splice(*urls, tmp_path / "out", keep_downloads=True)
    server.reset()
    taia.splice(*urls, tmp_path / "out2")
    assert server.body < 100_000
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "out2")


@pytest.mark.slow
def test_a_splice_survives_twenty_dropped_connections(server, root, tmp_path, monkeypatch):
    drops = iter([0, 1, 7, 100_000, 500_000] * 4)

    def drop(number, path, asked):
        start, _, last = asked.removeprefix("bytes=").partition("-")
        large = path.endswith(".safetensors") and int(last) - int(start) > 600_000
        return next(drops, None) if large and number % 2 else None

    urls = f"{server.url}/base", f"{server.url}/tuned"
    taia.splice(root / "base", root / "tuned", tmp_path / "local")
    taia.plan(*urls)
    server.reset(drop)
    monkeypatch.setattr(transfer, "PART", 1 << 20)
    receipt = taia.splice(*urls, tmp_path / "out")
    assert server.drops == 20
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    weights = sum(entry.stop - entry.start for entry in receipt.tensors)
    print(f"20 drops: weights {weights:,}, sent {server.sent:,}")
    assert server.sent <= 1.02 * weights


@pytest.mark.parametrize("fault", [503, 522, 429, "shifted", "short", "whole"])
def test_a_passing_fault_costs_another_request(server, root, tmp_path, fault):
    server.reset(lambda n, *_: str(fault) if n % 5 == 4 else None)
    taia.splice(f"{server.url}/small-base", f"{server.url}/small-tuned", tmp_path / "out")
    taia.splice(root / "small-base", root / "small-tuned", tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", r"answers 503 \(6 attempts\)"),
        ("shifted", "sends bytes 1-2, not"),
        ("whole", "sends whole files only"),
        ("etag", "changed on the server.*ETag"),
        ("encoded", "compresses it"),
        ("404", "changed on the server"),
        ("403", r"access is refused \(403\)"),
        ("401", "a login is needed"),
        (0, "6 attempts"),
    ],
)
def test_a_lasting_fault_is_one_message_and_nothing_is_written(server, tmp_path, fault, message):
    urls = f"{server.url}/small-base", f"{server.url}/small-tuned"
    taia.plan(*urls)
    server.reset(lambda _n, path, _asked: fault if path.endswith(".safetensors") else None)
    with pytest.raises(SourceError, match=message):
        taia.splice(*urls, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_server_without_ranges_is_told_before_anything_is_downloaded(root, tmp_path):
    with nginx(root, tmp_path / "nginx", "max_ranges 0;") as port:
        proxy = Proxy(port)
        with pytest.raises(SourceError, match=r"sends whole files only.*download the folder first"):
            taia.plan(f"{proxy.url}/base", f"{proxy.url}/tuned")
        proxy.close()


def test_a_file_that_changes_between_header_and_weights_is_an_error(server, root, tmp_path):
    import shutil

    for name in ("base", "tuned"):
        shutil.copytree(root / f"small-{name}", root / f"moving-{name}", dirs_exist_ok=True)
    planned = taia.plan(f"{server.url}/moving-base", f"{server.url}/moving-tuned")
    os.utime(root / "moving-base" / "model.safetensors", (1, 1))
    from taia.splice import execute

    with pytest.raises(SourceError, match="changed on the server"):
        execute(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    taia.splice(f"{server.url}/moving-base", f"{server.url}/moving-tuned", tmp_path / "out")
    assert len([*(tmp_path / "cache" / "remote").glob("*/*/.taia-mirror.json")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_in_the_middle_loses_little(server, root, tmp_path, how):
    """A signal, then the same command: what had arrived is not fetched again."""
    urls = [f"{server.url}/base", f"{server.url}/tuned"]
    code = (
        "import sys, taia.transfer as t, taia.mirror as m\n"
        "from taia.cli import main\nt.PART = m.FLUSH = 1 << 20; main()"
    )
    command = [sys.executable, "-c", code, "splice", *urls, str(tmp_path / "out")]
    limit = 25_000_000
    server.reset(lambda *_: time.sleep(0.02) or None)
    child = subprocess.Popen(command)
    while server.body < limit and child.poll() is None:
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be killed"
    child.send_signal(how)
    begun = time.monotonic()
    child.wait()
    assert time.monotonic() - begun < 5
    assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    time.sleep(0.2)
    first = server.body
    subprocess.run(command, check=True)
    taia.splice(root / "base", root / "tuned", tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    weights = sum(len(data) for data in weights_of(tmp_path / "out").values())
    print(f"killed after {first:,}; both runs {server.body:,} for {weights:,}")
    assert server.body - weights <= 2 * mirrors.CONNECTIONS * (1 << 20) + 200_000
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_broken_journal_is_not_trusted(server, root, tmp_path):
    planned = taia.plan(f"{server.url}/small-base", f"{server.url}/small-tuned")
    mirror = mirrors.mirror_at(planned.base.path)
    assert mirror is not None
    size = mirror.weights["model.safetensors"].size
    head = mirror.present("model.safetensors")
    journal = mirror.folder / ".model.safetensors.ranges"
    journal.write_text(f"0 {size + 1}\nx y\n5 2\n-1 9\n\n1 2 3\n0 {size}")
    assert mirror.present("model.safetensors") == head
    mirror.release()
    assert not journal.exists()


@pytest.mark.slow
def test_whoever_reads_weights_gets_all_of_them(server, root):
    """A source that is resolved without more ado has no holes."""
    url = f"{server.url}/small-base"
    lazy = resolve(url, headers_only=True)
    mirrors._opened.pop(lazy.path)  # as another process would see it
    with pytest.raises(SourceError, match="a part of a remote model"):
        resolve(lazy.path)
    whole = resolve(url)
    assert weights_of(whole.path) == weights_of(root / "small-base")
    assert resolve(whole.path).path == whole.path
    from taia.load import load_model

    assert load_model(url).config.model_type == "llama"


def test_no_reader_takes_a_hole_for_zeros(server):
    """A remote model that was only planned: each way to read weights refuses."""
    from taia.arrays import blended_chunks, read_array
    from taia.compare import Pair, differing
    from taia.pieces import Copy, pieces

    planned = taia.plan(f"{server.url}/small-base", f"{server.url}/small-tuned")
    folder = planned.base.path
    tensor = next(iter(planned.base.tensors.values()))
    file = folder / tensor.file
    pair = Pair(tensor.name, file, tensor.start, file, tensor.start, tensor.bytes)
    for read in (
        lambda: pieces(planned),
        lambda: read_array(folder, tensor),
        lambda: b"".join(Copy(folder, tensor).chunks()),
        lambda: b"".join(blended_chunks(file, tensor, file, tensor, 0.5, 0, 1)),
        lambda: differing([pair]),
    ):
        with pytest.raises(SourceError, match="only a part is here"):
            read()
    mirrors._opened.pop(folder)
    with pytest.raises(SourceError, match="a part of a remote model"):
        read_array(folder, tensor)


def test_two_at_one_mirror_is_one_message(server, tmp_path):
    urls = f"{server.url}/small-base", f"{server.url}/small-tuned"
    planned = taia.plan(*urls)
    mirror = mirrors.mirror_at(planned.base.path)
    assert mirror is not None
    with mirror.locked(), pytest.raises(SourceError, match="another process is downloading"):
        taia.splice(*urls, tmp_path / "out")


@pytest.mark.slow
def test_an_adapter_and_its_base_on_a_server(server, root, tmp_path):
    from adapter_tools import save_adapter

    save_adapter(root / "base", root / "adapter", r=4, lora_alpha=8)
    urls = f"{server.url}/base", f"{server.url}/adapter"
    server.reset()
    taia.splice(*urls, tmp_path / "sliced")
    adapter = sum(file.stat().st_size for file in (root / "adapter").iterdir())
    once = adapter + headers_of(root / "base") + small_files(root / "base")
    assert server.body <= once  # nothing twice
    taia.splice(root / "base", root / "adapter", tmp_path / "local")
    assert weights_of(tmp_path / "sliced") == weights_of(tmp_path / "local")
    taia.verify(tmp_path / "sliced")
    taia.splice(*urls, tmp_path / "merged", merge=True)
    taia.splice(root / "base", root / "adapter", tmp_path / "locally", merge=True)
    assert weights_of(tmp_path / "merged") == weights_of(tmp_path / "locally")
    taia.verify(tmp_path / "merged")


def test_a_slice_for_a_base_on_a_server_needs_it_no_more(server, adapters, tmp_path):
    import shutil

    _, adapter = adapters("llama", "plain")
    receipt = taia.splice(f"{server.url}/small-base", adapter, tmp_path / "out")
    assert receipt.base.path.rstrip("/") == f"{server.url}/small-base"
    shutil.rmtree(tmp_path / "cache")
    taia.verify(tmp_path / "out")


def test_a_cache_that_is_gone_or_full_is_one_message(server, tmp_path):
    import shutil

    from taia.splice import execute

    planned = taia.plan(f"{server.url}/small-base", f"{server.url}/small-tuned")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(taia.TaiaError, match=r"no such|cannot keep|cannot be read|a hole|gone"):
        execute(planned, tmp_path / "out")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(taia.TaiaError, match="cannot keep what is downloaded"):
        taia.plan(f"{server.url}/small-base", f"{server.url}/small-tuned")


def test_an_index_that_leads_elsewhere_writes_nowhere(server, root, tmp_path):
    evil = root / "evil"
    evil.mkdir(exist_ok=True)
    (evil / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
    names = {"a": "../../../x.safetensors", "b": "/x.safetensors", "c": "y\\x.safetensors"}
    (evil / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(taia.TaiaError, match="names files outside the checkpoint"):
        taia.plan(f"{server.url}/evil", f"{server.url}/base")
    assert not any(path.name == "x.safetensors" for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((1 << 62).to_bytes(8, "little") + b"{}", "header of 4,611,686,018,427,387,904 bytes"),
        (b"\x02\x00", "truncated"),
        ((2).to_bytes(8, "little") + b"{}" + bytes(9), "longer than its tensors"),
        ((9).to_bytes(8, "little") + b"not json!", "broken safetensors header"),
    ],
)
def test_a_broken_weight_file_is_told(server, root, content, message):
    broken = root / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(taia.TaiaError, match=message):
        taia.plan(f"{server.url}/broken", f"{server.url}/base")


def test_secrets_of_an_address_stay_out_of_outputs(server, root, tmp_path):
    host = server.url.removeprefix("http://")
    for query in ("", "?sig=hunter2"):
        base = f"http://user:hunter2@{host}/small-base{query}"
        out = tmp_path / f"out{len(query)}"
        taia.splice(base, f"{server.url}/small-tuned", out)
        assert "hunter2" not in (out / "taia.json").read_text() + (out / "README.md").read_text()
    with pytest.raises(SourceError) as caught:
        taia.plan(f"http://user:hunter2@{host}/none?sig=hunter2", f"{server.url}/tuned")
    assert "hunter2" not in str(caught.value)
    assert any("sig=hunter2" in path for _, path, _ in server.requests)


def test_no_server_and_no_model_are_one_message_each(server, tmp_path):
    with pytest.raises(SourceError, match="not a model"):
        taia.plan(f"{server.url}/nothing", f"{server.url}/tuned")
    with pytest.raises(SourceError, match="6 attempts"):
        taia.plan("http://127.0.0.1:9/base", f"{server.url}/tuned")
    with pytest.raises(SourceError, match="not a URL with a host"):
        taia.plan("https:///base", f"{server.url}/tuned")
    with pytest.raises(SourceError, match=r"//\[h: not a URL: Invalid IPv6"):
        taia.plan("https://user:secret@[h?sig=secret", f"{server.url}/tuned")


def test_storage_that_fsspec_reads(root, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("base", "tuned"):
        memory.put(str(root / f"small-{name}"), f"/bucket/{name}", recursive=True)
    taia.splice("memory://bucket/base", "memory://bucket/tuned", tmp_path / "out")
    taia.splice(root / "small-base", root / "small-tuned", tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    taia.verify(tmp_path / "out")
    planned = taia.plan("memory://bucket/base", "memory://bucket/tuned")
    memory.pipe("/bucket/base/model.safetensors", memory.cat("/bucket/tuned/model.safetensors"))
    from taia.splice import execute

    with pytest.raises(SourceError, match="changed in the storage"):
        execute(planned, tmp_path / "out2")
    with pytest.raises(SourceError, match="no such folder"):
        taia.plan("memory://bucket/none", "memory://bucket/tuned")
