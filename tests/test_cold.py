"""Bytes read past the page cache: the same as through it, and none of them left in it."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taia
from taia import cold, direct
from taia.cold import BLOCK, SHARE, WINDOW, Reader, suits
from taia.copying import file_system
from taia.errors import CheckpointError

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")


def put_out(path: Path) -> None:
    """Have a file out of the page cache."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cold(path: Path) -> bool:
    with path.open("rb", buffering=0) as file:
        return cold._is_cold(file.fileno(), 0, path.stat().st_size)


@pytest.fixture
def source(tmp_path):
    """A file of more than two windows, out of the page cache, and its bytes."""
    content = random.Random(0).randbytes(2 * WINDOW + 3 * BLOCK + 77)
    path = tmp_path / "source"
    path.write_bytes(content)
    if is_cold(path):
        pytest.skip(f"{file_system(tmp_path)} does not tell what is in memory")
    put_out(path)
    if not is_cold(path):
        pytest.skip(f"{file_system(tmp_path)} keeps its files in memory")
    with Reader(path, cold=True) as reader:
        reader.read_into(memoryview(bytearray(9)), 0, 9)
        if not reader._stop:
            pytest.skip(f"{file_system(tmp_path)} does not read past the page cache")
    put_out(path)
    return path, content


def opened(path: Path) -> int:
    """How many descriptors of this process are that file."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += link.readlink() == path
    return found


def read(reader: Reader, start: int, length: int, room: int = WINDOW) -> bytes:
    """Bytes of a source, in pieces of at most `room`."""
    found = bytearray()
    while len(found) < length:
        piece = memoryview(bytearray(min(room, length - len(found))))
        count = reader.read_into(piece, start + len(found), length - len(found))
        assert 0 < count <= len(piece)
        found += piece[:count]
    return bytes(found)


@pytest.mark.parametrize("room", [WINDOW, 1000, 5 * WINDOW])
def test_a_cold_file_arrives_whole_and_stays_cold(source, room):
    path, content = source
    with Reader(path, cold=True) as reader:
        assert read(reader, 0, len(content), room) == content
        assert reader.read_into(memoryview(bytearray(9)), len(content), 9) == 0
        assert reader.read_into(memoryview(bytearray(9)), len(content) + 3 * BLOCK, 9) == 0
    assert is_cold(path)
    with Reader(path) as reader:
        assert read(reader, 0, len(content), room) == content
    assert not is_cold(path)


def test_any_ranges_arrive_whatever_the_page_cache_holds(source):
    path, content = source

    @given(
        ranges=st.lists(
            st.tuples(st.integers(0, len(content) - 1), st.integers(1, WINDOW + 2 * BLOCK)),
            min_size=1,
            max_size=4,
        ),
        warm=st.lists(st.integers(0, len(content) // BLOCK), max_size=3),
    )
    @settings(max_examples=60, deadline=None)
    def check(ranges: list[tuple[int, int]], warm: list[int]) -> None:
        put_out(path)
        with path.open("rb", buffering=0) as file:
            for block in warm:
                os.preadv(file.fileno(), [bytearray(BLOCK)], block * BLOCK)
        with Reader(path, cold=True) as reader:
            for start, length in ranges:
                length = min(length, len(content) - start)
                assert read(reader, start, length) == content[start : start + length]

    check()


def test_what_the_page_cache_holds_is_taken_from_it(source, monkeypatch):
    path, content = source
    path.read_bytes()
    with Reader(path, cold=True) as reader:
        assert reader._straight is not None
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read from the disk"))
        assert read(reader, 5, len(content) - 5) == content[5:]


def test_what_was_just_written_is_read(source):
    path, content = source
    with path.open("r+b", buffering=0) as file:
        file.seek(WINDOW)
        file.write(b"new" * 99)
        with Reader(path, cold=True) as reader:
            expected = content[:WINDOW] + b"new" * 99 + content[WINDOW + 297 :]
            assert read(reader, 0, len(content)) == expected


def test_a_disk_that_then_does_not_read_is_read_as_usual(source, monkeypatch):
    path, content = source
    preadv = os.preadv
    failing = []

    def fails_later(descriptor: int, rooms: list[memoryview], start: int) -> int:
        if failing:
            rooms[0][:] = bytes(len(rooms[0]))  # what came before the disk failed
            raise OSError(5, "Input/output error")
        failing.append(start)
        return preadv(descriptor, rooms, start)

    monkeypatch.setattr(os, "preadv", fails_later)
    with Reader(path, cold=True) as reader:
        assert read(reader, 7, BLOCK) == content[7 : 7 + BLOCK]
        assert failing
        assert read(reader, WINDOW, BLOCK) == content[WINDOW : WINDOW + BLOCK]
        assert reader._straight is None
        assert read(reader, 7 + BLOCK, 99) == content[7 + BLOCK : 106 + BLOCK]
        assert opened(path) == 1
    assert opened(path) == 0


def test_nothing_is_left_open(source, tmp_path):
    path, content = source
    with Reader(path, cold=True) as reader:
        read(reader, 0, len(content))
        assert opened(path) == 2
    assert opened(path) == 0
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to(path)
    with pytest.raises(CheckpointError, match="leads out of"):
        Reader(tmp_path / "model" / "link", cold=True)
    assert opened(path) == 0


def test_a_file_that_shrinks_ends(source):
    path, content = source
    with Reader(path, cold=True) as reader:
        read(reader, 0, 10)
        os.truncate(path, WINDOW + 5)
        put_out(path)
        assert read(reader, WINDOW - 9, 14) == content[WINDOW - 9 : WINDOW + 5]
        assert reader.read_into(memoryview(bytearray(9)), WINDOW + 5, 9) == 0
        assert reader.read_into(memoryview(bytearray(9)), WINDOW + BLOCK, 9) == 0


def test_what_the_page_cache_holds_is_looked_for_once(source, monkeypatch):
    path, content = source
    path.read_bytes()
    looks = []
    is_cold_ = cold._is_cold
    monkeypatch.setattr(cold, "_is_cold", lambda *place: looks.append(place) or is_cold_(*place))
    with Reader(path, cold=True) as reader:
        for start in range(0, len(content), 1000):
            room = memoryview(bytearray(min(1000, len(content) - start)))
            assert reader.read_into(room, start, len(content) - start) == len(room)
            assert room == content[start : start + 1000]
    assert len(looks) == 3


def test_only_what_would_fill_the_page_cache_is_read_past_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "memory", lambda: 100 * SHARE)
    monkeypatch.setattr(cold, "ON", {file_system(tmp_path)})
    assert suits([tmp_path], 101)
    assert not suits([tmp_path], 100)
    monkeypatch.setattr(cold, "ON", {"another"})
    assert not suits([tmp_path], 101)


@pytest.mark.parametrize("keep", ["attention", "all*0.5", "attention + ffn[:1]*0.5"])
def test_a_splice_of_cold_sources_has_the_same_bytes(pair, tmp_path, monkeypatch, keep):
    base, tuned = pair("llama", "bfloat16", shard="20KB")
    taia.splice(base, tuned, tmp_path / "usual", keep=keep)
    asked = []
    look = Reader._look

    def seen(self: Reader, start: int, soon: int) -> bool:
        asked.append(self._straight is not None)
        return look(self, start, soon)

    monkeypatch.setattr(cold, "memory", lambda: 0)
    monkeypatch.setattr(cold, "ON", {file_system(tmp_path)})
    monkeypatch.setattr(cold, "_is_cold", lambda *_: True)  # so small a file is read as a whole
    monkeypatch.setattr(direct, "memory", lambda: 0)
    monkeypatch.setattr(direct, "ON", {file_system(tmp_path)})
    monkeypatch.setattr(Reader, "_look", seen)
    taia.splice(base, tuned, tmp_path / "cold", keep=keep)
    assert asked
    if file_system(tmp_path) == "ext4":
        assert any(asked)
    for file in (tmp_path / "usual").glob("*.safetensors"):
        assert (tmp_path / "cold" / file.name).read_bytes() == file.read_bytes()
    taia.verify(tmp_path / "cold")
    asked.clear()
    taia.splice(base, tuned, tmp_path / "hashed", keep=keep, hash=True)
    assert not any(asked)
