"""Folders and names that no model should have: one message each, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_checkpoint import copies, refused, rewrite_header

import taia
from taia.errors import TaiaError

__all__ = ["copies"]  # a fixture


def test_a_note_cannot_steer_the_terminal(copies, capsys):
    from taia.cli.models import tell_note
    from taia.cli.printing import print_plan

    name = "\x1b]0;owned\x07.rotary_emb.inv_freq"
    raw = (copies[1] / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    stop = len(raw) - 8 - length
    rewrite_header(
        copies[1] / "model.safetensors",
        lambda header: header.update(
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [stop, stop + 4]}}
        ),
    )
    with (copies[1] / "model.safetensors").open("ab") as file:
        file.write(bytes(4))
    planned = taia.plan(*copies)
    assert any(name in note for note in planned.notes)
    print_plan(planned)
    for note in planned.notes:
        tell_note(note)
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert "\\x1b]0;owned\\x07" in text
        assert "\x1b" not in text


def test_a_mount_point_is_refused_before_anything_is_written(copies, monkeypatch):
    out = copies[0].parent / "mounted"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    with pytest.raises(TaiaError, match="name a folder inside it"):
        taia.splice(*copies, out)
    assert not any(out.iterdir())


def test_a_marker_that_taia_did_not_write(copies):
    (copies[1] / ".taia-mirror.json").write_text("{}")
    refused(*copies, "broken; remove it if all weights are there")


def test_a_folder_that_may_not_be_entered(copies, monkeypatch):
    is_file = Path.is_file

    def denied(path: Path) -> bool:
        if path.suffix != ".json":
            return is_file(path)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(TaiaError, match="cannot be read: Permission denied"):
        taia.plan(*copies)
