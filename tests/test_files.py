"""Outputs that appear whole or not at all, and what dead processes leave beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from taia.errors import OutputError
from taia.files import atomic_write, staged_folder

DYING = """
import os, sys
from pathlib import Path
import taia.files
from taia.files import staged_folder
out, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "between":  # the old output is away, the new one not yet in its place
    taia.files.Path.replace = lambda self, target, real=Path.replace: (
        os._exit(9) if self.suffix == ".partial" else real(self, target))
with staged_folder(out, overwrite=True) as folder:
    (folder / "new").write_text("new")
    if moment == "within":
        os._exit(9)
"""


def die(out: Path, moment: str) -> None:
    """A process that ends without a word while it writes `out`."""
    done = subprocess.run([sys.executable, "-c", DYING, str(out), moment], check=False)
    assert done.returncode == 9


def write(out: Path, text: str, *, overwrite: bool = False) -> None:
    with staged_folder(out, overwrite=overwrite) as folder:
        (folder / "file").write_text(text)


def write_and_fail(out: Path, error: BaseException) -> None:
    with staged_folder(out, overwrite=True) as folder:
        (folder / "file").write_text("second")
        raise error


def test_what_a_dead_process_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    die(out, "within")
    assert [f.suffix for f in tmp_path.iterdir()] == [".partial"]
    write(out, "second")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "second"


def test_an_output_that_was_being_replaced_is_put_back(tmp_path):
    out = tmp_path / "out"
    write(out, "first")
    die(out, "between")
    assert not out.exists()
    with pytest.raises(OutputError, match="not empty"):
        write(out, "second")
    assert (out / "file").read_text() == "first"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    die(out, "between")
    write(out, "second", overwrite=True)
    assert (out / "file").read_text() == "second"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_a_live_process_writes_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out) as first:
        (first / "file").write_text("first")
        write(out, "second")
        assert (first / "file").is_file()
        (out / "file").unlink()
    assert (out / "file").read_text() == "first"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_the_litter_of_other_outputs_is_left_alone(tmp_path):
    die(tmp_path / "out.more", "within")
    (tmp_path / ".out.mine.partial").mkdir()
    before = sorted(tmp_path.iterdir())
    write(tmp_path / "out", "text")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    write(out, "first")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_and_fail(out, error)
    assert (out / "file").read_text() == "first"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    atomic_write(tmp_path / "more" / "file", "one")
    atomic_write(tmp_path / "more" / "file", "two")
    assert (tmp_path / "more" / "file").read_text() == "two"
    assert [f.name for f in (tmp_path / "more").iterdir()] == ["file"]


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"

    def late() -> None:
        with staged_folder(out) as folder:
            (folder / "file").write_text("late")
            write(out, "early")

    with pytest.raises(OutputError, match="exists and is not empty"):
        late()
    assert (out / "file").read_text() == "early"
    assert list(tmp_path.iterdir()) == [out]
