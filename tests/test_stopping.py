"""A signal is met once, and is not lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os, signal, time
from taia import stopping
from taia.files import staged_folder
from pathlib import Path
stopping.listen()
def kill():
    os.kill(os.getpid(), signal.{signal})
class Finalised:
    def __del__(self):
        kill()
"""


def run(code: str, signal: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START.replace("{signal}", signal) + code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("signal", "name"), [("SIGTERM", "SystemExit"), ("SIGINT", "Keyboard")])
def test_one_that_is_lost_is_raised_where_it_is_asked_for(signal, name, tmp_path):
    out = tmp_path / "out"
    done = run(f"with staged_folder(Path({str(out)!r})):\n    Finalised()\n", signal)
    assert done.returncode != 0
    assert name in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_same_one_again_does_not_stop_what_cleans_up():
    code = "try:\n    kill()\nfinally:\n    kill()\n    kill()\n    print('clean')\n"
    done = run(code, "SIGTERM")
    assert (done.returncode, done.stdout) == (143, "clean\n")


def test_a_later_one_is_another():
    code = (
        "stopping.GRACE = 0\ntry:\n    kill()\nexcept SystemExit:\n    pass\n"
        "try:\n    kill()\nexcept SystemExit:\n    print('again')\n"
    )
    assert run(code, "SIGTERM").stdout == "again\n"


def test_ctrl_c_that_the_shell_switched_off_stays_so():
    code = "kill()\nprint('on')\n"
    off = START.replace("stopping.listen", "signal.signal(2, signal.SIG_IGN)\nstopping.listen")
    done = subprocess.run(
        [sys.executable, "-c", off.replace("{signal}", "SIGINT") + code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "on\n"


def test_nobody_asked():
    from taia.stopping import refuse_stopped

    refuse_stopped()
