"""Ranges copied between files in every way that a system may offer, and files made for them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from taia import copying
from taia.copying import BLOCK, copy_range, create, file_system, start_writing
from taia.errors import CheckpointError

WAYS = {
    "copy_file_range": [],
    "sendfile": ["copy_file_range"],
    "memory": ["copy_file_range", "sendfile"],
}
"""What is used -> what the system lacks."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("start", "to", "length"),
    [
        (0, 0, 100_000),
        (100, 100, 100_000),  # alike within a block: head, whole blocks, tail
        (BLOCK + 7, 7, 3 * BLOCK),
        (1, 0, 2 * BLOCK),
        (5, BLOCK - 1, 1),
        (5, 5, 20),
        (9, 1, 0),
        (3, 3, 2 * copying.BUFFER + 11),
    ],
)
def test_the_bytes_arrive_and_nothing_beside_them(tmp_path, monkeypatch, way, start, to, length):
    for lacking in WAYS[way]:
        monkeypatch.delattr(os, lacking)
    data = random.Random(0).randbytes(start + length + 50)
    (tmp_path / "source").write_bytes(data)
    size = to + length + 30
    create(tmp_path / "target", size, b"")
    with (
        (tmp_path / "source").open("rb", buffering=0) as source,
        (tmp_path / "target").open("r+b", buffering=0) as target,
    ):
        copy_range(source, target, start, to, length)
        start_writing(target, to, length)
    expected = bytes(to) + data[start : start + length] + bytes(30)
    assert (tmp_path / "target").read_bytes() == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_ends_early_is_an_error(tmp_path, monkeypatch, way):
    for lacking in WAYS[way]:
        monkeypatch.delattr(os, lacking)
    (tmp_path / "source").write_bytes(b"short")
    create(tmp_path / "target", 100, b"")
    with (
        (tmp_path / "source").open("rb", buffering=0) as source,
        (tmp_path / "target").open("r+b", buffering=0) as target,
        pytest.raises(CheckpointError, match="shorter"),
    ):
        copy_range(source, target, 0, 0, 100)


@pytest.mark.parametrize("preallocated", [True, False])
@pytest.mark.parametrize("size", [0, 5, 3 * BLOCK + 1])
def test_a_created_file_has_its_size_and_its_head(tmp_path, monkeypatch, preallocated, size):
    kind = file_system(tmp_path)
    monkeypatch.setattr(copying, "PREALLOCATE", {kind} if preallocated else set())
    create(tmp_path / "file", size, b"head"[:size])
    assert (tmp_path / "file").read_bytes() == b"head"[:size].ljust(size, b"\0")
    with pytest.raises(FileExistsError):
        create(tmp_path / "file", size, b"")


def test_the_file_system_is_read_from_the_table_of_mounts(tmp_path):
    device = tmp_path.stat().st_dev
    table = tmp_path / "mountinfo"
    table.write_text(
        "21 1 0:5 / /proc rw,nosuid shared:13 - proc proc rw\n"
        f"36 21 {os.major(device)}:{os.minor(device)} / / rw shared:1 - xfs /dev/sda rw\n"
    )
    assert file_system(tmp_path, table) == "xfs"
    table.write_text("")
    assert file_system(tmp_path, table) == ""
    assert file_system(tmp_path, Path("/nowhere")) == ""
