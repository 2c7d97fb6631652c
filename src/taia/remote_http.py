"""A folder behind http(s), read by range requests.

Every answer is checked before a byte of it is used: that it is the range that was asked for
(206 and Content-Range), of the file that was seen first (ETag, Last-Modified, size), and not
compressed on the way. A server that only sends whole files is told apart at the first byte
and refused: a part of a model of many gigabytes is not worth the whole.

A web server does not list a folder, so it is asked for the names that models use. Range
requests: RFC 9110, section 14.
"""

from __future__ import annotations

import atexit
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit, urlunsplit

from taia import __version__
from taia.companions import TEMPLATES
from taia.errors import SourceError
from taia.remote import Stated, TransferError, checked_size, matches

if TYPE_CHECKING:
    import httpx2

__all__ = ["HttpRemote", "first_line", "http_remote", "without_secrets"]

CONNECTIONS = 8
RETRIED = frozenset({408, 425, 429, *range(500, 600)} - {501, 505, 506, 508, 510, 511})
"""Answers that another attempt may not get. Those taken out say that it will."""
REFUSED = {401: "a login is needed", 403: "access is refused", 451: "access is refused by law"}

NAMES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json",
    "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "spm.model", "qwen.tiktoken", "tiktoken.model", "tekken.json",
    "bpe.codes", "source.spm", "target.spm", "target_vocab.json", "chat_template.jinja",
    "chat_template.json", *(f"{TEMPLATES}/{name}.jinja" for name in ("tool_use", "rag")),
)  # fmt: skip
"""What a server is asked for when a pattern is wanted, as it has no list of its files."""


class HttpRemote:
    """Files under one URL. `pinned` says that its files cannot change (a commit of the hub)."""

    def __init__(
        self,
        text: str,
        url: str,
        client: httpx2.Client,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        pinned: bool = False,
        login: str = "give an address that can be read without one",
    ) -> None:
        self.text, self.url = text, without_secrets(url)
        self._url, self._query, self._client = url.rstrip("/"), query, client
        self._headers = {
            "User-Agent": f"taia/{__version__}",
            **(headers or {}),
            "Accept-Encoding": "identity",  # a range of a compressed file is no range of the file
        }
        self._pinned, self._login = pinned, login

    def find(self, patterns: Sequence[str]) -> dict[str, Stated]:
        """Ask for every name; see Remote. Where all are refused, SourceError."""
        exact = [pattern for pattern in patterns if not set(pattern) & set("*?[")]
        names = [*dict.fromkeys([*exact, *(name for name in NAMES if matches(name, patterns))])]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            answers = dict(zip(names, pool.map(self._head, names), strict=True))
        found = {name: answer for name, answer in answers.items() if isinstance(answer, Stated)}
        refused = [answer for answer in answers.values() if isinstance(answer, int)]
        if refused and not found:  # storage without the right to list refuses what is not there
            raise self._refusal(names[0], refused[0])
        return found

    def stream(self, name: str, stated: Stated, start: int, stop: int) -> Iterator[bytes]:
        """One range request; see Remote."""
        import httpx2

        headers = {**self._headers, "Range": f"bytes={start}-{stop - 1}"}
        try:
            with self._client.stream("GET", self._place(name), headers=headers, timeout=_timeout(),
                                     follow_redirects=True) as response:  # fmt: skip
                left = self._accepted(response, name, stated, start, stop)
                for chunk in response.iter_raw():  # as it comes: what has arrived is never lost
                    yield chunk[:left]
                    left -= len(chunk)
                    if left <= 0:
                        return
        except (httpx2.TransportError, OSError) as error:
            raise TransferError(first_line(error)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise SourceError(f"{self.text}: {name}: {first_line(error)}") from error

    def _place(self, name: str) -> str:
        return f"{self._url}/{quote(name)}" + (f"?{self._query}" if self._query else "")

    def _head(self, name: str) -> Stated | int | None:
        """What is stated of a file; None where there is none, its status where it is refused."""
        import httpx2

        try:
            answer = self._client.head(
                self._place(name), headers=self._headers, timeout=_timeout(), follow_redirects=True
            )
        except (httpx2.TransportError, OSError) as error:
            raise TransferError(first_line(error)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise SourceError(f"{self.text}: {name}: {first_line(error)}") from error
        if answer.status_code in (404, 410):
            return None
        if answer.status_code in REFUSED:
            return int(answer.status_code)
        self._check_status(answer, name)
        self._check_encoding(answer, name)
        size = checked_size(self.text, name, answer.headers.get("content-length"))
        return Stated(size, _etag(answer), answer.headers.get("last-modified", ""))

    def _accepted(
        self, response: httpx2.Response, name: str, stated: Stated, start: int, stop: int
    ) -> int:
        """How many bytes of an answer are those that were asked for; raises where none are."""
        self._check_status(response, name)
        self._check_encoding(response, name)
        self._check_version(response, name, stated)
        if response.status_code == 200:
            if (start, stop) == (0, stated.size):
                return stop
            raise TransferError(
                "the server sends whole files only, where a part was asked for; download the "
                "folder first and name it here",
                attempts=3,
            )
        match = re.fullmatch(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)",
                             response.headers.get("content-range", ""))  # fmt: skip
        if response.status_code != 206 or match is None:
            raise TransferError(f"the server answers {response.status_code} to a request of a part")
        if match[3] not in ("*", str(stated.size)):
            raise self._changed(name, f"{stated.size:,} bytes at first, now {match[3]}")
        first, last = int(match[1]), int(match[2])
        if first != start or not start <= last < stop:
            raise TransferError(f"the server sends bytes {first}-{last}, not {start}-{stop - 1}")
        return last + 1 - start

    def _check_status(self, response: httpx2.Response, name: str) -> None:
        status = response.status_code
        if status in RETRIED:
            wait = response.headers.get("retry-after", "")
            seconds = min(float(wait), 120.0) if re.fullmatch("[0-9]{1,6}", wait) else 0.0
            raise TransferError(f"the server answers {status}", wait=seconds)
        if status in REFUSED:
            if response.history:  # a signed address that ran out; the next request gets a new one
                raise TransferError(f"the server answers {status}", attempts=3)
            raise self._refusal(name, status)
        if status in (404, 410, 416) or (status == 412):
            raise self._changed(name, f"the server answers {status}")
        if status not in (200, 206):
            raise SourceError(f"{self.text}: {name}: the server answers {status}")

    def _check_encoding(self, response: httpx2.Response, name: str) -> None:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise SourceError(
                f"{self.text}: {name}: the server compresses it ({encoding[:40]}) though it was "
                "asked not to, so that parts of it cannot be told; download the folder first"
            )

    def _check_version(self, response: httpx2.Response, name: str, stated: Stated) -> None:
        linked = _linked_etag(response)
        etag = linked if self._pinned else _etag(response)
        if stated.etag and etag and etag != stated.etag:
            raise self._changed(name, f"ETag {stated.etag[:70]} at first, now {etag[:70]}")
        modified = "" if self._pinned else response.headers.get("last-modified", "")
        if stated.modified and modified and modified != stated.modified:
            raise self._changed(name, f"of {stated.modified[:40]} at first, now {modified[:40]}")

    def _changed(self, name: str, what: str) -> SourceError:
        return SourceError(
            f"{self.text}: {name}: changed on the server while it was read ({what}); "
            "run the command again"
        )

    def _refusal(self, name: str, status: int) -> SourceError:
        return SourceError(
            f"{self.text}: {name}: {REFUSED[status]} ({status}); {self._login}"
        )  # fmt: skip


def http_remote(text: str) -> HttpRemote:
    """A folder by its http(s) URL; a query (an access signature) goes with every request."""
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise SourceError(f"{without_secrets(text)}: not a URL: {error}") from error
    if not parts.hostname:
        raise SourceError(f"{without_secrets(text)}: not a URL with a host")
    url = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    return HttpRemote(without_secrets(text), url, _client(), query=parts.query)


def without_secrets(url: str) -> str:
    """A URL without user, password and query, as it may stand in messages and receipts."""
    return re.sub(r"(?<=://)[^/?#]*@", "", re.split("[?#]", url, maxsplit=1)[0])


@functools.cache
def _client() -> httpx2.Client:
    import httpx2

    client = httpx2.Client(limits=httpx2.Limits(max_connections=2 * CONNECTIONS))
    atexit.register(client.close)
    return client


def _timeout() -> httpx2.Timeout:
    import httpx2

    return httpx2.Timeout(30.0, pool=None)  # seconds without a byte, not for the whole


def _etag(response: httpx2.Response) -> str:
    """The ETag of a file: what a hub links to, else what the answer itself says."""
    return _linked_etag(response) or _bare(response.headers.get("etag", ""))


def _linked_etag(response: httpx2.Response) -> str:
    answers = [*response.history, response]
    return next((_bare(a.headers["x-linked-etag"]) for a in answers
                 if "x-linked-etag" in a.headers), "")  # fmt: skip


def _bare(etag: str) -> str:
    return str(etag).strip().removeprefix("W/").strip('"')


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
