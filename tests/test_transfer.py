"""Laws of byte ranges: the same bytes, disjoint, in order, however they are cut."""

from __future__ import annotations

import itertools
from contextlib import suppress

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taia import transfer
from taia.errors import SourceError
from taia.mirror import open_mirror
from taia.remote import Stated, TransferError, checked_size, plain_name
from taia.remote_http import http_remote
from taia.sources import resolve

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def bytes_of(some) -> set[int]:
    return {n for start, stop in some for n in range(start, stop)}


@given(ranges)
def test_merged_ranges_are_the_same_bytes_disjoint_and_apart(some):
    result = transfer.merged(some)
    assert bytes_of(result) == bytes_of(some)
    assert all(start < stop for start, stop in result)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(result))
    assert transfer.total(result) == len(bytes_of(some))


@given(ranges, ranges)
def test_subtraction_is_that_of_sets(some, present):
    result = transfer.subtracted(some, present)
    assert bytes_of(result) == bytes_of(some) - bytes_of(present)
    assert transfer.total(result) == len(bytes_of(result))


@given(ranges)
def test_parts_are_small_and_lose_nothing(some):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PART", 7)
        result = list(transfer.parts(transfer.merged(some)))
    assert bytes_of(result) == bytes_of(some)
    assert all(0 < stop - start <= 7 for start, stop in result)


class Shaky:
    """A remote that sends `steps` bytes a connection and then breaks; 0 breaks at once."""

    text, url = "shaky", "shaky"

    def __init__(self, content: bytes, steps: list[int]) -> None:
        self.content, self.steps = content, steps

    def find(self, _patterns):
        return {}

    def stream(self, _name, _stated, start, stop):
        step = self.steps.pop(0) if self.steps else stop
        yield self.content[start : min(start + step, stop)]
        if start + step < stop:
            raise TransferError("gone")


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(0, 5), max_size=20))
def test_a_read_survives_every_break_that_some_byte_follows(content, steps):
    with pytest.MonkeyPatch.context() as patch:
        waits: list[float] = []
        patch.setattr(transfer.time, "sleep", waits.append)
        stated = Stated(len(content))
        stuck = any(not any(steps[i : i + 6]) for i in range(len(steps) - 5))
        try:
            got = b"".join(transfer.read(Shaky(content, list(steps)), "f", stated, 0, len(content)))
        except SourceError:
            assert stuck
        else:
            assert got == content


REMOTE = http_remote("http://host")

numbers = st.one_of(st.integers(0, 20).map(str), st.sampled_from(["*", "", "-1", "²", "9" * 19]))


@given(
    status=st.sampled_from([200, 204, 206, 302, 403, 404, 412, 416, 429, 500, 503, 599]),
    content_range=st.one_of(
        st.builds("bytes {}-{}/{}".format, numbers, numbers, numbers),
        st.text(st.characters(max_codepoint=255, min_codepoint=32), max_size=12),
    ),
    etag=st.sampled_from(["", '"a"', 'W/"a"', '"b"']),
    retry=st.sampled_from(["", "1", "²", "-1", "Sun, 22 Nov 2026 21:44:31 GMT", "9" * 400]),
    size=st.integers(1, 20),
    data=st.data(),
)
def test_an_answer_is_the_range_that_was_asked_for_or_refused(
    status, content_range, etag, retry, size, data
):
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    headers = [(b"Content-Range", content_range.encode("latin-1")), (b"ETag", etag.encode()),
               (b"Retry-After", retry.encode("latin-1"))]  # fmt: skip
    response = httpx2.Response(status, headers=headers)
    count = 0
    with suppress(SourceError, TransferError):
        count = REMOTE._accepted(response, "f", Stated(size, "a"), start, stop)
    if not count:
        return
    assert 0 < count <= stop - start
    assert etag != '"b"'
    whole = status == 200 and (start, stop) == (0, size)
    assert whole or content_range in {
        f"bytes {start}-{start + count - 1}/{total}" for total in (size, "*")
    }


@given(st.text(max_size=12))
def test_a_plain_name_stays_in_its_folder(name):
    assert not plain_name(name) or ("/" not in name and "\\" not in name and name not in ("..", ""))


@pytest.mark.parametrize("size", [None, "", "-1", "1e9", -1, 1.5, True, "9" * 30, 1 << 60, "٣"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(SourceError, match="no usable size"):
        checked_size("host", "file", size)


def test_gguf_files_on_a_server_are_refused_by_name():
    class Listing(Shaky):
        def find(self, patterns):
            return {"a-Q8_0.gguf": Stated(3)} if "*.gguf" in patterns else {}

    with pytest.raises(SourceError, match="download one of its GGUF files") as refused:
        open_mirror(Listing(b"", []))
    assert refused.value.faults == ("a-Q8_0.gguf",)
    for text in (
        "https://nowhere.invalid/a.gguf?x=1",
        "hf://org/name/a.GGUF",
        "s3://bucket/a.gguf",
    ):
        with pytest.raises(SourceError, match="from this disk only"):
            resolve(text)
