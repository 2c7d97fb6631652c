"""The command line: exit codes, messages, tables, JSON; no torch where it says so."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taia.cli.app import COMMANDS, build_parser
from taia.cli.options import split_list

TAIA = Path(sys.executable).with_name("taia")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user starts it."""
    return subprocess.run(
        [str(TAIA), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_plan_splice_verify(pair, tmp_path):
    base, tuned = pair("llama")
    table = run("plan", base, tuned)
    assert table.returncode == 0
    assert "attention" in table.stdout
    planned = json.loads(run("plan", base, tuned, "--keep", "taia-full", "--json").stdout)
    assert planned["selection"] == "all - ffn - router"
    assert planned["faults"] == []
    assert planned["tensors"][0].keys() == {
        *("name", "kind", "layer", "projection", "tower", "source", "strength", "bytes")
    }
    assert planned["totals"]["all"]["tensors"] == len(planned["tensors"])
    done = run("splice", base, tuned, tmp_path / "out", "--keep", "attention")
    assert done.returncode == 0
    assert "keeping 'attention'" in done.stdout
    assert run("verify", tmp_path / "out").returncode == 0
    receipt = json.loads(run("verify", tmp_path / "out", "--json").stdout)
    assert receipt["selection"] == "attention"


def test_a_failed_check_exits_with_one(pair, tmp_path):
    run("splice", *pair("llama"), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    failed = run("verify", tmp_path / "out")
    assert failed.returncode == 1
    assert "config.json: altered" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "nowhere", "nowhere"), "no such folder"),
        (("splice", "{base}", "{tuned}", "{out}", "--keep", "atention"), "column 1"),
        (("splice", "{base}", "{tuned}", "{out}", "--keep", "router"), "matches nothing"),
        (("splice", "{base}", "{tuned}", "{out}", "--merge"), "--merge is for adapters"),
        (("splice", "{base}", "{tuned}", "{base}"), "--overwrite"),
        (("splice", "{base}", "{tuned}", "{out}" + "a" * 300), "not a name"),
        (("splice", "{base}", "{tuned}", "{out}\udcff"), "not a name"),
        (("plan", "{base}", "{tuned}\udcff"), "not the name"),
        (("verify", "a" * 300), "File name too long"),
        (("verify", "nowhere"), "no taia.json"),
        (("report", "nowhere"), "nowhere"),
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("eval", "--base", "{base}", "--tasks", "arc_eesy", "--out", "{out}"), "arc_easy"),
        (("train", "--base", "{base}", "--data", "nowhere.jsonl", "--out", "{out}"), "nowhere"),
        (("plan", "{base}"), "TUNED"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(pair, tmp_path, arguments, words):
    base, tuned = pair("llama")
    places = {"base": base, "tuned": tuned, "out": tmp_path / "out"}
    done = run(*(argument.format(**places) for argument in arguments))
    code = 1 if arguments[0] == "verify" else 2
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_faults_exits_with_two(pair):
    base, _ = pair("llama")
    _, other = pair("qwen2")
    done = run("plan", base, other)
    assert done.returncode == 2
    assert "model types differ" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]])
def test_help_does_not_import_torch(arguments):
    code = (
        "import sys\nfrom taia.cli import main\n"
        f"sys.argv = ['taia', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'lm_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_plan_does_not_import_torch(pair):
    base, tuned = pair("llama")
    code = (
        "import sys\nfrom taia.cli import main\n"
        f"sys.argv = ['taia', 'plan', {str(base)!r}, {str(tuned)!r}]\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("base,vanilla", ["base", "vanilla"]),
        ("taia, attention + ffn[0,5,7]", ["taia", "attention + ffn[0,5,7]"]),
        ("all*linear(0.2, 1),base,", ["all*linear(0.2, 1)", "base"]),
        ("", []),
    ],
)
def test_lists_split_outside_of_brackets(text, parts):
    assert split_list(text) == parts


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        build_parser().parse_args([command, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: taia {command}" in shown


@pytest.mark.parametrize(("add_options", "do"), COMMANDS.values(), ids=COMMANDS)
def test_every_option_says_what_it_is(add_options, do):
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert do.__doc__
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["kill()", "Finalised()"])
def test_a_signal_leaves_nothing(pair, tmp_path, stop, place):
    """Wherever it comes, even where Python prints an exception and goes on: in a destructor."""
    base, tuned = pair("llama")
    code = (
        "import os, sys\nfrom taia import filling\nfrom taia.cli import main\n"
        f"def kill(*_):\n    os.kill(os.getpid(), {int(stop)})\n"
        "class Finalised:\n    __del__ = kill\n"
        f"filling.start_writing = lambda *_: {place} and None\n"
        f"sys.argv = ['taia', 'splice', {str(base)!r}, {str(tuned)!r}, {str(tmp_path / 'out')!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (130, 143)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("package", "extra"), [("lm_eval", "eval"), ("transformers", "train")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(pair, tmp_path, package, extra):
    base, _ = pair("llama")
    (tmp_path / "arc_easy.jsonl").write_text(
        '{"id": "1", "question": "?", "choices": ["a", "b"], "answer": 0}\n'
    )
    words = ["eval", "--base", str(base), "--tasks", "arc_easy", "--data", str(tmp_path)]
    code = (
        f"import sys\nsys.modules[{package!r}] = None\nfrom taia.cli import main\n"
        f"sys.argv = ['taia', *{words!r}, '--out', {str(tmp_path / 'out')!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"pip install 'taia[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--penalty", "l2"], "NAME=STRENGTH"),
        (["--penalty", "l2=much"], "NAME=STRENGTH"),
        (["--penalty", "l2=1", "--penalty", "l2=2"], "l2: given more than once"),
    ],
)
def test_penalties_are_named_once_with_a_strength(words, said, tmp_path):
    done = run("train", "--base", "b", "--data", "d", "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
