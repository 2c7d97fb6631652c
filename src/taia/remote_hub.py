"""A model on the hub: one commit of a repository, read by range requests.

The hub is asked once, through huggingface_hub, for the commit that a revision stands for and
for the size and SHA-256 of every file in it. From then on everything is read from that very
commit. What huggingface_hub's own cache holds whole is used from there and not fetched again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taia.companions import file_of
from taia.errors import SourceError
from taia.remote import Remote, Stated, checked_size, matches
from taia.remote_http import HttpRemote

__all__ = ["HubAddress", "HubRemote", "hub_remote", "local_snapshot"]

ADDRESS = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.-]+))?"
    r"(/(?P<folder>[\w./-]+?))?/?"
)


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository, a revision of it or none, and a folder in it or none."""

    repository: str
    revision: str | None = None
    folder: str = ""

    @staticmethod
    def parse(text: str) -> HubAddress:
        """Read ORG/NAME[@REVISION] or hf://ORG/NAME[@REVISION][/FOLDER]. Raises SourceError."""
        if not text.startswith("hf://"):
            repository, _, revision = text.partition("@")
            return HubAddress(repository, revision or None)
        match = ADDRESS.fullmatch(text.removeprefix("hf://"))
        if match is None or ".." in text.split("/"):
            raise SourceError(
                f"{text}: not an address of the hub: hf://ORG/NAME[@REVISION][/FOLDER]"
            )
        return HubAddress(match["repository"], match["revision"], match["folder"] or "")


class HubRemote:
    """The files of one folder of one commit; see Remote."""

    def __init__(
        self, text: str, address: HubAddress, commit: str, files: dict[str, Stated]
    ) -> None:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers

        inside = f"/{address.folder}" if address.folder else ""
        self.text, self.url = text, f"hf://{address.repository}@{commit}{inside}"
        self._files = files
        self._http = HttpRemote(
            text,
            f"{constants.ENDPOINT}/{address.repository}/resolve/{commit}{inside}",
            get_session(),
            headers=build_hf_headers(library_name="taia"),
            pinned=True,
            login=LOGIN,
        )

    def find(self, patterns: Sequence[str]) -> dict[str, Stated]:
        """From the list that the hub gave at first."""
        return {name: s for name, s in self._files.items() if matches(name, patterns)}

    def stream(self, name: str, stated: Stated, start: int, stop: int) -> Iterator[bytes]:
        """One range request; see Remote."""
        return self._http.stream(name, stated, start, stop)


LOGIN = "log in with `hf auth login`, and ask for access on the model's page if it is gated"


def hub_remote(text: str) -> tuple[Remote, HubAddress]:
    """The current files of a hub address, and the address pinned to their commit.

    Raises SourceError, and ConnectionError where the hub is out of reach or offline mode is on.
    """
    from huggingface_hub import HfApi, errors

    address = HubAddress.parse(text)
    try:
        info = HfApi().model_info(
            address.repository, revision=address.revision, files_metadata=True, timeout=30
        )
    except errors.GatedRepoError as error:
        raise SourceError(f"{text}: a gated model; {LOGIN}") from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{text}: the hub has the model, not the revision {address.revision}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(f"{text}: neither a local folder nor a model that the hub shows; "
                          f"check the name, or {LOGIN}") from error  # fmt: skip
    except errors.HFValidationError as error:
        raise SourceError(f"{text}: not an address of the hub: {error}") from error
    except Exception as error:
        raise _unreachable(text, error) from error
    if not info.sha or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise SourceError(f"{text}: the hub names no commit of it")
    pinned = HubAddress(address.repository, info.sha, address.folder)
    return HubRemote(text, pinned, info.sha, _files_of(text, info, address.folder)), pinned


def local_snapshot(address: HubAddress, files: dict[str, Stated]) -> Path | None:
    """The folder of huggingface_hub's cache that holds all of `files` of a commit, if it does."""
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{address.folder}/" if address.folder else ""
    folder = None
    for name, stated in files.items():
        cached = try_to_load_from_cache(
            address.repository, prefix + name, revision=address.revision
        )
        if not isinstance(cached, str) or Path(cached).stat().st_size != stated.size:
            return None
        folder = Path(cached).parents[name.count("/")]
    return folder


def _files_of(text: str, info: Any, folder: str) -> dict[str, Stated]:
    """What the hub states of the files right inside `folder`, and of its chat templates."""
    prefix = f"{folder}/" if folder else ""
    files = {}
    for sibling in info.siblings or ():
        name = sibling.rfilename.removeprefix(prefix)
        if not sibling.rfilename.startswith(prefix) or "/" in file_of(name):
            continue
        size = checked_size(text, sibling.rfilename, sibling.size)
        digest = sibling.lfs.sha256 if sibling.lfs else ""
        files[name] = Stated(size, etag=digest or sibling.blob_id or "", sha256=digest)
    return files


def _unreachable(text: str, error: Exception) -> Exception:
    """What to raise for any other failure of a request to the hub."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            return SourceError(f"{text}: the hub refuses access ({status}); {LOGIN}")
        return ConnectionError(f"the hub answers {status}")
    if isinstance(error, httpx2.HTTPError | OSError):
        return ConnectionError(type(error).__name__)
    return SourceError(f"{text}: the hub's answer cannot be read ({type(error).__name__})")
