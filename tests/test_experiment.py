"""Recipes: parsing, faults, paths; the lock; one whole run of a tiny real model."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from taia.errors import OutputError, RecipeError, TaiaError
from taia.experiment import run
from taia.recipe import Evaluate, Recipe, Train, expand, load_recipe, place
from taia.sweep import load_sweep

ROOT = Path(__file__).parents[1]
MINIMAL: dict[str, Any] = {
    "name": "one",
    "base": "base",
    "train": {"data": "chats.jsonl"},
    "evaluate": {"tasks": ["facts"], "data": "."},
}


def write(folder: Path, content: Any, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_shipped_recipes_load() -> None:
    recipes = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "paper").glob("*.yaml")]
    assert recipes
    for path in recipes:
        sweep = load_sweep(path)
        assert sweep.report.expected, f"{path}: says nothing about what is expected"
        assert sweep.name in {path.stem, f"paper-{path.stem.replace('_', '-')}"}


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "seed: 3\n"
    text = text.replace("data: chats.jsonl", "data: chats.jsonl\n  learning_rate: 1e-3")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.train is not None
    assert recipe.train.learning_rate == 1e-3
    assert recipe.seed == 3


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({"nam": "x"}, ["nam: unknown field; did you mean 'name'"]),
        ({"train": {"data": "x", "learning_rat": 1}}, ["train.learning_rat: unknown field; did"]),
        ({"evaluate": {"tasks": ["a"], "zzz": 1}}, ["evaluate.zzz: unknown field; there are"]),
        ({"train": {}}, ["train.data: is missing"]),
        ({"train": {"data": "x", "rank": "many"}}, ["train.rank: ", "'many'"]),
        ({"evaluate": {"tasks": []}}, ["evaluate.tasks: "]),
        ({"name": "../up"}, ["name: "]),
        ({"adapter": "a"}, ["exactly one of train, adapter and tuned; this gives train and ada"]),
        ({"train": None}, ["this gives none of them"]),
        ({"nam": "x", "seed": "y", "train": {}}, ["nam:", "seed:", "train.data:"]),
    ],
)
def test_every_fault_is_told_with_its_field(
    tmp_path: Path, change: dict[str, Any], faults: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL | change))
    for fault in faults:
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "'name' stands twice"),
        ("train:\n  data: a\n  data: b\n", "'data' stands twice"),
        ("a: [", "not valid YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("? [a]\n: b\n", "recipe"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        run(tmp_path / "nothing.yaml")


def test_fields_and_defaults_are_those_of_the_functions() -> None:
    from taia.evaluation.harness import evaluate
    from taia.training.finetune import finetune

    for model, function in ((Train, finetune), (Evaluate, evaluate)):
        parameters = inspect.signature(function).parameters
        for name, field in model.model_fields.items():
            assert name in parameters, f"{model.__name__}.{name}"
            if not field.is_required() and name != "seed":
                assert field.default == parameters[name].default, f"{model.__name__}.{name}"


def test_paths_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAIA_CACHE", "/cache")
    assert expand("${TAIA_CACHE}/demo") == "/cache/demo"
    monkeypatch.delenv("TAIA_CACHE")
    assert expand("${TAIA_CACHE}/demo") == str(Path.home() / ".cache/taia/demo")
    (tmp_path / "here").mkdir()
    assert place("here", tmp_path) == str(tmp_path / "here")
    assert place("./gone", tmp_path) == str(tmp_path / "gone")
    assert place("org/name", tmp_path) == "org/name"
    assert place("package:thing", tmp_path) == "package:thing"
    assert place("/absolute", tmp_path) == "/absolute"


def test_importing_an_experiment_imports_no_torch() -> None:
    code = "import sys, taia.experiment, taia.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    recipe = write(tmp_path, MINIMAL)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is not a run"):
            run(recipe, out, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, chats, and a task."""
    from chat_tools import tiny_bench

    return tiny_bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "./nowhere"}, "no such folder"),
        ({"train": {"data": "chats.jsonl", "method": "lorra"}}, "method 'lorra'"),
        ({"train": {"data": "chats.jsonl", "train": "atention"}}, "atention"),
        ({"evaluate": {"tasks": ["factz"], "data": "."}}, "factz: unknown task"),
        ({"evaluate": {"tasks": ["facts"], "data": ".", "variants": ["taai"]}}, "taai"),
        ({"train": None, "tuned": "./nowhere"}, "no such folder"),
        ({"evaluate": {"tasks": ["facts"], "data": ".", "shots": 2}}, "ask for 0 shots"),
        ({"evaluate": {"tasks": ["lm_eval:sciq"], "protocol": "paper"}}, "lm-eval's own task"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(
    bench: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    recipe = write(bench, MINIMAL | change, f"{tmp_path.name}.yaml")
    with pytest.raises(TaiaError, match=words) as caught:
        run(recipe, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_run_resumes_and_refuses_another_recipe(bench: Path, tmp_path: Path) -> None:
    stated = MINIMAL | {
        "train": {"data": "chats.jsonl", "batch_size": 8, "max_length": 64, "rank": 2},
        "report": {"expected": "Nothing much."},
    }
    recipe = write(bench, stated)
    out = run(recipe, tmp_path / "out")
    lock = json.loads((out / "lock.json").read_text())
    assert set(lock["stages"]) == {"train", "overlap", "deltas", "evaluate", "report"}
    assert set(lock["hashes"]) >= {"training data", "adapter", "evaluation data: facts"}
    assert (out / "recipe.yaml").read_text() == recipe.read_text()
    page = (out / "report.html").read_text()
    assert "Nothing much." in page
    for part in ("scores", "differences", "made", "deltas"):
        assert f'id="{part}"' in page
    kinds = json.loads((out / "deltas.json").read_text())["kinds"]
    assert {row["kind"] for row in kinds} == {"attention", "ffn"}
    assert all(row["base_norm"] for row in kinds)

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run(recipe, out) == out  # everything is done
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    (out / "report.html").unlink()
    (out / "results" / "taia" / "facts.jsonl").unlink()
    (out / "summary.json").unlink()
    run(recipe, out)
    assert (out / "report.html").read_text() == page
    trained = out / "train" / "adapter_model.safetensors"
    assert trained.stat().st_mtime_ns == times[trained]

    other = write(bench, stated | {"seed": 1}, "other.yaml")
    with pytest.raises(RecipeError, match="seed: 0 before, 1 now") as caught:
        run(other, out)
    assert "--overwrite" in str(caught.value)
    (bench / "facts.jsonl").write_text((bench / "facts.jsonl").read_text() + "\n")
    with pytest.raises(RecipeError, match="evaluation data: facts"):
        run(recipe, out)
    run(other, out, overwrite=True)
    assert json.loads((out / "lock.json").read_text())["recipe"]["seed"] == 1


def test_a_recipe_is_a_value(tmp_path: Path) -> None:
    one, two = (load_recipe(write(tmp_path, MINIMAL)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert Recipe.model_validate_json(one.model_dump_json()) == one
