"""Models in S3, read through s3fs; the storage is a stand-in on loopback that knows three calls."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from conftest import build
from http_tools import Answering, serve

import taia


class Handler(Answering):
    """ListObjectsV2, HEAD and ranged GET of `root`/BUCKET/KEY; every seventh GET fails."""

    root: Path
    count = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            self._list(unquote(parts.path).strip("/"), query.get("prefix", [""])[0])
            return
        file = self.root / unquote(parts.path).lstrip("/")
        if not file.is_file():
            self._send(404, {}, b"")
            return
        data = file.read_bytes()
        told = {"ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"',
                "Last-Modified": "Sun, 22 Nov 2026 21:44:31 GMT"}  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.command == "GET":
            type(self).count += 1
            if self.count % 7 == 6:
                self._send(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                return
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            told["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, told, data[first : last + 1])
        else:
            self._send(200, told, data)

    def _list(self, bucket: str, prefix: str) -> None:
        folder = self.root / bucket / prefix
        files = sorted(f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else []
        rows = "".join(
            f"<Contents><Key>{escape(prefix + f.name)}</Key><Size>{f.stat().st_size}</Size>"
            f"<LastModified>2026-11-22T21:44:31.000Z</LastModified><ETag>&quot;"
            f"{hashlib.md5(f.read_bytes(), usedforsecurity=False).hexdigest()}&quot;</ETag>"
            "</Contents>"
            for f in files
        )
        text = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name><Prefix>{prefix}</Prefix>'
            f"<KeyCount>{len(files)}</KeyCount><IsTruncated>false</IsTruncated>{rows}"
            "</ListBucketResult>"
        )
        self._send(200, {"Content-Type": "application/xml"}, text.encode())


@pytest.fixture
def storage(tmp_path):
    """A bucket with two sharded checkpoints; the handler that serves it."""
    root = tmp_path / "storage"
    for name, seed in (("base", 0), ("tuned", 1)):
        model = build("llama", seed, hidden_size=256, intermediate_size=512, vocab_size=500)
        model.save_pretrained(root / "bucket" / "models" / name, max_shard_size="4MB")
    handler = type("Bound", (Handler,), {"root": root})
    server, handler.url = serve(handler)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_splice_of_two_models_in_s3(storage, tmp_path):
    pytest.importorskip("s3fs")
    words = ["s3://bucket/models/base", "s3://bucket/models/tuned", "out"]
    environment = os.environ | {
        "AWS_ENDPOINT_URL": storage.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "TAIA_CACHE": str(tmp_path / "cache"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "taia", "splice", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    models = storage.root / "bucket" / "models"
    receipt = taia.splice(models / "base", models / "tuned", tmp_path / "local")
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    verified = taia.verify(tmp_path / "out")
    assert verified.base is not None
    assert all(len(stated["etag"]) == 32 for stated in verified.base.stated.values())
    weights = sum(entry.stop - entry.start for entry in receipt.tensors)
    assert weights < storage.sent < weights + 100_000
    done = subprocess.run(
        [sys.executable, "-m", "taia", "plan", "s3://bucket/none", words[1]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_missing_package_of_a_storage_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(taia.TaiaError, match=r"pip install 'taia\[s3\]'"):
        taia.plan("s3://bucket/base", "s3://bucket/tuned")


def test_a_password_in_an_address_is_not_printed():
    for address in ("ftp://user:hunter2@127.0.0.1:1/x", "smb://user:hunter2@127.0.0.1/x",
                    "zip://a::https://h/x?sig=hunter2"):  # fmt: skip
        with pytest.raises(taia.TaiaError) as caught:
            taia.plan(address, address)
        assert "hunter2" not in str(caught.value)
    from taia.remote_storage import storage_remote

    assert storage_remote("memory://user:hunter2@host/a").text == "memory://user@host/a"
