"""`taia train --dry-run`: what a training would see, told and not written."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from chat_tools import tiny_chat_model
from mixture_tools import TWO, three_sources

from taia.errors import RecipeError
from taia.training.preview import preview


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return three_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def old_signals():
    """The command line takes signals for its own process; this one is not its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("old_signals")
def test_a_dry_run_tells_all_and_writes_nothing(place, base, tmp_path, capsys, monkeypatch):
    from taia.cli.app import main

    monkeypatch.chdir(tmp_path)
    mixture = {"sources": TWO, "schedule": "staged", "held_out": "held.jsonl"}
    (place / "mix.yaml").write_text(json.dumps(mixture))
    (place / "held.jsonl").write_text('{"question": "A 3?", "choices": ["x", "y"], "answer": 0}\n')
    words = ["train", "--base", str(base), "--data", str(place / "mix.yaml")]
    words += ["--dry-run", "--batch-size", "4", "--max-length", "45"]
    monkeypatch.setattr(sys, "argv", ["taia", *words, "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    told = json.loads(capsys.readouterr().out)
    assert [part["used"] for part in told["sources"]] == [30, 20]
    assert told["steps"] == 13
    assert told["sources"][0]["truncated"] > 0
    assert told["sources"][0]["exact"] == 1
    assert told["shares"][0] == {"share_a": 1.0, "share_b": 0.0}
    monkeypatch.setattr(sys, "argv", ["taia", *words])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    text = capsys.readouterr().out
    assert "a.jsonl:4 with held.jsonl" in text
    assert "13 steps of 4: 50 examples" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_one_file(place, base):
    told = preview(base, place / "a.jsonl", batch_size=4, max_length=64, epochs=2)
    assert (told.steps, told.examples, told.shares) == (15, 60, ())
    assert told.parts[0].repeats == 2
    with pytest.raises(RecipeError, match="rank"):
        preview(base, place / "a.jsonl", rank=0)


def test_a_dry_run_of_a_recipe(place, base):
    from taia.experiment import preview_recipe

    recipe = {
        "name": "one",
        "base": str(base),
        "train": {"data": {"sources": TWO, "size": 40}, "batch_size": 4},
        "evaluate": {"tasks": ["facts"]},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    told = preview_recipe(place / "recipe.yaml")
    assert [part.used for part in told.parts] == [24, 16]
    recipe["train"]["data"]["sources"] = [{"from": "a.jsonl", "share": 0.5}]
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=r"train\.data: the shares sum to 0\.5"):
        preview_recipe(place / "recipe.yaml")
