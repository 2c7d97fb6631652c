"""A stand-in for the hub on loopback: the routes that huggingface_hub asks for, over real HTTP.

A network boundary, and nothing more: repositories are folders, LFS files lie on another host.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from http_tools import Answering, serve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors",)


class Hub:
    """Serves `root`/ORG/NAME; large files are redirected to `storage` (an address)."""

    def __init__(self, root: Path, storage: str, token: str = "hf_secret") -> None:
        self.root, self.storage, self.token = root, storage, token
        self.gated: set[str] = set()
        self.seen: list[tuple[str, str, str]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.created: list[dict[str, Any]] = []
        self.commit, self.broken = COMMIT, False
        self.server, self.url = serve(type("Bound", (_Handler,), {"hub": self}))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The variables that lead huggingface_hub here."""
        found = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0",
                 "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        return found | ({"HF_TOKEN": token} if token else {})

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Handler(Answering):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path, self.headers.get("Authorization", "")))
        for pattern, method in (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/preupload/.*", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/.*", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs),
            (r"/upload/([0-9a-f]+)", self._upload),
            (r"/api/models/([^/]+/[^/]+)/tree/.*", self._tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/.*)?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                method(*match.groups())
                return
        self._json({"error": "no such route"}, 404)

    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _refused(self, repository: str) -> bool:
        if repository in self.hub.gated and not self._allowed():
            self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
            return True
        if not (self.hub.root / repository).is_dir():
            self._json({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})
            return True
        return False

    def _files(self, repository: str) -> list[dict[str, Any]]:
        rows = []
        folder = self.hub.root / repository
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = file.read_bytes()
            row: dict[str, Any] = {"size": len(data), "oid": blob_id(data)}
            if file.suffix in LARGE:
                digest = hashlib.sha256(data).hexdigest()
                row["lfs"] = {
                    "sha256": digest,
                    "oid": digest,
                    "size": len(data),
                    "pointerSize": 134,
                }
            rows.append(row | {"path": str(file.relative_to(folder)), "type": "file"})
        return rows

    def _info(self, repository: str) -> None:
        if self._refused(repository):
            return
        revision = urlsplit(self.path).path.partition("/revision/")[2]
        if revision not in ("", "main", self.hub.commit):
            self._json({"error": "none"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": row["path"], "size": row["size"], "blobId": row["oid"],
                     "lfs": row.get("lfs")} for row in self._files(repository)]  # fmt: skip
        self._json({"id": repository, "sha": self.hub.commit, "siblings": siblings,
                    "private": False})  # fmt: skip

    def _tree(self, repository: str) -> None:
        if not self._refused(repository):
            self._json(self._files(repository))

    def _resolve(self, repository: str, _revision: str, name: str) -> None:
        if self._refused(repository):
            return
        file = self.hub.root / repository / name
        if not file.is_file():
            self._json({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        headers = {"X-Repo-Commit": self.hub.commit}
        if file.suffix in LARGE:
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)),
                        "Location": f"{self.hub.storage}/{repository}/{name}"}  # fmt: skip
            self._send(302, headers, b"")
        else:
            self._send(200, headers | {"ETag": f'"{blob_id(data)}"'}, data)

    def _whoami(self) -> None:
        if not self._allowed():
            self._json({"error": "Invalid credentials"}, 401)
        else:
            self._json({"name": "org", "type": "user", "orgs": [], "auth": {}})

    def _create(self) -> None:
        if not self._allowed():
            self._json({"error": "no right"}, 403)
            return
        asked = json.loads(self.body)
        self.hub.created.append(asked)
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        (self.hub.root / name).mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _preupload(self, _repository: str) -> None:
        rows = [{"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(self.body)["files"]]  # fmt: skip
        self._json({"files": rows})

    def _lfs(self, _repository: str) -> None:
        asked = json.loads(self.body)
        rows = [{"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}", "header": {}}}}
                for o in asked["objects"]]  # fmt: skip
        self._json({"transfer": "basic", "objects": rows})

    def _upload(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        (self.hub.root / f"{digest}.lfs").write_bytes(self.body)
        self._send(200, {}, b"")

    def _commit(self, repository: str) -> None:
        if self.hub.broken:
            self._json({"error": "the disk of the hub is full"}, 507)
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        self.hub.commits.append(lines)
        folder = self.hub.root / repository
        for line in lines:
            value = line["value"]
            if line["key"] not in ("file", "lfsFile"):
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            else:
                (self.hub.root / f"{value['oid']}.lfs").rename(path)
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{self.hub.commit}",
                    "commitOid": self.hub.commit, "success": True})  # fmt: skip

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        told = {"Content-Type": "application/json"} | (headers or {})
        self._send(status, told, json.dumps(value).encode())
