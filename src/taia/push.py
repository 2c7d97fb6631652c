"""An output on the hub: whether it may go there, asked before any work, and the upload after.

The folder is complete on this disk first; an upload that fails leaves it there. Everything
goes in one commit, and what the new model lacks of an earlier one's weights and chat templates
goes with it, as two sets of them in one repository would be a model that nobody made. Other
subfolders stay.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from taia.companions import TEMPLATES
from taia.errors import OutputError
from taia.remote import matches
from taia.remote_http import first_line

__all__ = ["check_push", "push"]

LOGIN = "log in with `hf auth login` and a token that may write"


WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "adapter_model.bin",
    "pytorch_model*.bin", "pytorch_model.bin.index.json", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
"""What makes a repository another model's; an adapter_config.json makes it an adapter."""


def check_push(repository: str, *, overwrite: bool = False, private: bool = False) -> None:
    """Raise OutputError unless the token that is here may write a new model `repository`.

    A repository that holds files already is refused without `overwrite`, and a public one where
    `private` is wanted, as an upload does not hide it.
    """
    from huggingface_hub import HfApi, errors

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise OutputError(f"{repository}: not the name of a model on the hub, ORG/NAME")
    try:
        who = HfApi().whoami()
    except errors.LocalTokenNotFoundError as error:
        raise OutputError(f"{repository}: no token of the hub is here; {LOGIN}") from error
    except Exception as error:
        raise _refused(repository, "the hub does not know the token", error) from error
    _check_right(repository, who)
    try:
        info = HfApi().model_info(repository)
    except errors.RepositoryNotFoundError:
        return
    except Exception as error:
        raise _refused(repository, "cannot be looked at", error) from error
    if private and not info.private:
        raise OutputError(
            f"{repository}: is public on the hub; make it private in its settings, or name another"
        )
    files = [sibling.rfilename for sibling in info.siblings or ()]
    if set(files) - {".gitattributes"} and not overwrite:
        raise OutputError(
            f"{repository}: there is a model of that name on the hub, with {len(files)} files; "
            "name another or use --overwrite, which adds a commit that replaces it"
        )


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload an output folder as one commit, and return the address of the model.

    Raises OutputError; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        with _quiet_unless_seen():
            api = HfApi()
            place = api.create_repo(repository, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload a model spliced by taia",
                delete_patterns=[n for n in api.list_repo_files(repository) if matches(n, WEIGHTS)],
            )
    except Exception as error:  # whatever the upload ran into, the folder is whole
        raise _refused(
            repository,
            f"the upload failed; {folder} is complete, and `hf upload {repository} {folder}` "
            "goes on with it",
            error,
        ) from error
    return str(place)


def _check_right(repository: str, who: dict[str, Any]) -> None:
    """Raise OutputError for a token that only reads, or a name space that is not its owner's."""
    owner = repository.partition("/")[0]
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    spaces = [who.get("name"), *(org.get("name") for org in who.get("orgs") or ())]
    if role == "read":
        raise OutputError(f"{repository}: the token of {who.get('name')} only reads; {LOGIN}")
    if owner not in spaces:
        raise OutputError(
            f"{repository}: the token is of {who.get('name')}, who may write to "
            f"{', '.join(map(str, spaces))}, not to {owner}"
        )


def _refused(repository: str, what: str, error: Exception) -> OutputError:
    return OutputError(f"{repository}: {what} ({first_line(error)})")


def _quiet_unless_seen() -> Any:
    """No progress bars of huggingface_hub where nobody looks."""
    from contextlib import contextmanager

    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    @contextmanager
    def quiet() -> Any:
        before = are_progress_bars_disabled()
        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            yield
        finally:
            if not before:
                enable_progress_bars()

    return quiet()
