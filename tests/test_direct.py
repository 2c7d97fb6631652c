"""Bytes written past the page cache: the same as through it, whatever lies unaligned."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taia
from taia import direct, filling
from taia.cold import Reader
from taia.copying import BLOCK, create, file_system
from taia.direct import CHUNK, SHARE, DirectFile, suits
from taia.errors import CheckpointError

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")


def copied(folder: Path, first: int, lengths: list[int], starts: list[int], tail: int) -> None:
    """Copy ranges of two sources one behind the other from `first` on, and compare the file."""
    data = [random.Random(seed).randbytes(max(starts) + max(lengths)) for seed in (0, 1)]
    for number, content in enumerate(data):
        (folder / f"{number}").write_bytes(content)
    whole = b"".join(
        data[n % 2][start : start + length]
        for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )
    target = folder / "target"
    target.unlink(missing_ok=True)
    create(target, first + len(whole) + tail, b"")
    with Reader(folder / "0") as zero, Reader(folder / "1") as one, DirectFile(target) as file:
        to = first
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if number % 3 == 2:
                file.write(data[number % 2][start : start + length], to)
            else:
                file.copy((zero, one)[number % 2], start, to, length)
            to += length
    assert target.read_bytes() == bytes(first) + whole + bytes(tail)


@pytest.mark.parametrize(
    ("first", "lengths", "starts", "tail"),
    [
        (0, [3 * CHUNK], [0], 0),
        (8, [BLOCK - 8, BLOCK, 1], [5, 0, 9], 30),  # the head ends where a block does
        (BLOCK - 1, [2], [0], BLOCK),  # on both sides of an end of a block, none whole
        (CHUNK - 1, [1, CHUNK, 7], [3, 2, 1], 0),
        (17, [0, 100, 0, 3 * BLOCK], [0, 1, 2, 3], 1),
        (2, [10], [0], 5),
        (5, [9, 9, 3 * CHUNK + 3], [0, 0, 8], 0),
    ],
)
def test_what_is_unaligned_arrives_and_nothing_beside_it(tmp_path, first, lengths, starts, tail):
    copied(tmp_path, first, lengths, starts, tail)


@given(
    first=st.integers(0, 3 * BLOCK),
    ranges=st.lists(
        st.tuples(st.integers(0, 3 * BLOCK), st.integers(0, 999)), min_size=1, max_size=9
    ),
    tail=st.integers(0, BLOCK),
)
@settings(max_examples=60, deadline=None)
def test_any_ranges_arrive(tmp_path_factory, first, ranges, tail):
    folder = tmp_path_factory.mktemp("any")
    copied(folder, first, [length for length, _ in ranges], [start for _, start in ranges], tail)


def test_pieces_that_do_not_follow_each_other_go_where_they_belong(tmp_path):
    create(tmp_path / "target", 4 * BLOCK, b"")
    with DirectFile(tmp_path / "target") as file:
        file.write(b"c" * 10, 3 * BLOCK)
        file.write(b"a" * BLOCK, 0)
        file.write(b"b" * 10, BLOCK + 5)
    expected = b"a" * BLOCK + bytes(5) + b"b" * 10
    expected += bytes(3 * BLOCK - len(expected)) + b"c" * 10
    assert (tmp_path / "target").read_bytes() == expected + bytes(BLOCK - 10)


def test_an_error_writes_no_more_and_closes_the_file(tmp_path):
    create(tmp_path / "target", 100, b"")
    file = DirectFile(tmp_path / "target")
    with contextlib.suppress(KeyError), file:
        file.write(b"x" * 50, 0)
        raise KeyError
    assert (tmp_path / "target").read_bytes() == bytes(100)


def test_a_source_that_ends_early_is_an_error(tmp_path):
    (tmp_path / "source").write_bytes(b"short")
    create(tmp_path / "target", 100, b"")
    with (
        Reader(tmp_path / "source") as source,
        DirectFile(tmp_path / "target") as file,
        pytest.raises(CheckpointError, match="source: became shorter while it was read"),
    ):
        file.copy(source, 0, 10, 20)


def test_a_file_system_that_refuses_is_written_to_as_usual(tmp_path, monkeypatch):
    opened = os.open
    refused = []

    def open_(path, flags, *more, **options):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", open_)
    copied(tmp_path, 9, [2 * BLOCK, 50], [0, 3], 4)
    assert refused


def test_several_threads_write_neighbouring_places(tmp_path):
    size, pieces = 6 * CHUNK + 123, 40
    content = random.Random(2).randbytes(size)
    (tmp_path / "source").write_bytes(content)
    create(tmp_path / "target", size, b"")
    ends = sorted(random.Random(3).sample(range(1, size), pieces - 1))
    with ThreadPoolExecutor(8) as threads:

        def write(place: tuple[int, int]) -> None:
            with Reader(tmp_path / "source") as source, DirectFile(tmp_path / "target") as file:
                file.copy(source, place[0], place[0], place[1] - place[0])

        list(threads.map(write, zip([0, *ends], [*ends, size], strict=True)))
    assert (tmp_path / "target").read_bytes() == content


@pytest.mark.parametrize("keep", ["attention", "attention + ffn[:1]*0.5"])
def test_a_splice_past_the_page_cache_has_the_same_bytes(pair, tmp_path, monkeypatch, keep):
    base, tuned = pair("llama", "bfloat16", shard="20KB")
    taia.splice(base, tuned, tmp_path / "usual", keep=keep)
    used = []
    monkeypatch.setattr(direct, "memory", lambda: 0)
    monkeypatch.setattr(direct, "ON", {file_system(tmp_path)})

    def seen(path: Path) -> DirectFile:
        used.append(path)
        return DirectFile(path)

    monkeypatch.setattr(filling, "DirectFile", seen)
    taia.splice(base, tuned, tmp_path / "direct", keep=keep)
    assert used
    for file in (tmp_path / "usual").glob("*.safetensors"):
        assert (tmp_path / "direct" / file.name).read_bytes() == file.read_bytes()
    taia.verify(tmp_path / "direct")
    used.clear()
    taia.splice(base, tuned, tmp_path / "hashed", keep=keep, hash=True)
    assert not used  # what is hashed is read again at once


def test_only_large_outputs_and_known_file_systems_are_written_so(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "ON", {file_system(tmp_path)})
    assert direct.memory() > 2**20
    monkeypatch.setattr(direct, "memory", lambda: 100 * SHARE)
    assert suits(tmp_path, 101)
    assert not suits(tmp_path, 100)
    monkeypatch.setattr(direct, "ON", {"another"})
    assert not suits(tmp_path, 101)
