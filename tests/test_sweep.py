"""Sweeps: what a recipe may sweep, every fault at once, names, figures; tiny sweeps carried out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from taia.errors import EvaluationError, RecipeError
from taia.experiment import run, runs
from taia.recipe import Need, load_recipe
from taia.sweep import Sweep, load_sweep
from taia.sweep_plots import accuracy_table, difference_table, figure, outcome
from taia.sweep_report import draw_sweep, render_sweep_markdown, report_sweep
from taia.sweep_scores import read_scores

STATED: dict[str, Any] = {
    "name": "many",
    "base": "base",
    "train": {
        "data": {"target": "chats.jsonl", "replace": 0, "by": "other.jsonl", "size": 8},
        "batch_size": 4,
        "max_length": 64,
        "rank": 2,
        "learning_rate": 0.1,
    },
    "evaluate": {"tasks": ["facts"], "data": ".", "variants": ["base", "vanilla", "taia"]},
}
SWEEP = {"train.data.replace": [0, 0.5], "evaluate.protocol": ["chat", "plain"]}


def write(folder: Path, content: Any, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def changed(sweep: Any, **more: Any) -> dict[str, Any]:
    return copy.deepcopy(STATED) | more | {"sweep": sweep}


def test_the_cells_are_the_product_and_each_is_a_recipe_that_loads(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, changed(SWEEP)))
    assert [cell.name for cell in sweep.cells] == [
        f"replace-{share}_protocol-{way}" for share in ("0", "0.5") for way in ("chat", "plain")
    ]
    assert [axis.name for axis in sweep.axes] == ["replace", "protocol"]
    assert sweep.axes[0].numbers == (0.0, 0.5)
    assert sweep.axes[1].numbers is None
    for cell in sweep.cells:
        assert load_recipe(write(tmp_path, dict(cell.content), "cell.yaml")) == cell.recipe


def test_whole_parts_are_put_in_before_fields_within_them(tmp_path: Path) -> None:
    data = {name: {"target": f"{name}.jsonl", "add": 0, "by": "x.jsonl", "size": 4}
            for name in ("one", "two")}  # fmt: skip
    sweep = load_sweep(write(tmp_path, changed({"train.data.add": [0, 1], "train.data": data})))
    assert [cell.name for cell in sweep.cells] == [
        "add-0_one",
        "add-0_two",
        "add-1_one",
        "add-1_two",
    ]
    stated = sweep.cells[-1].content["train"]["data"]
    assert (stated["target"], stated["add"]) == ("two.jsonl", 1)


def test_a_recipe_without_a_sweep_is_one_cell(tmp_path: Path) -> None:
    path = write(tmp_path, STATED)
    sweep = load_sweep(path)
    assert sweep.axes == ()
    assert [cell.recipe for cell in sweep.cells] == [load_recipe(path)]
    with pytest.raises(RecipeError, match="states a sweep"):
        load_recipe(write(tmp_path, changed(SWEEP)))


@pytest.mark.parametrize(
    ("sweep", "faults"),
    [
        ([1], ["sweep: a mapping of fields"]),
        ({}, ["sweep: a mapping of fields"]),
        ({"train.rnak": [1]}, ["sweep.train.rnak: unknown field 'rnak' of train; did you mean"]),
        ({"name": ["a", "b"]}, ["sweep.name: not a field that can be swept"]),
        ({"rank": [1]}, ["sweep.rank: not a field that can be swept; did you mean 'train.rank'"]),
        ({"base.x": [1]}, ["sweep.base.x: base has no fields"]),
        ({"train.rank": 4}, ["sweep.train.rank: a list of values is needed"]),
        ({"train.rank": []}, ["sweep.train.rank: a list of values is needed"]),
        ({"train.rank": [4, 4]}, ["sweep.train.rank: two values are both called '4'"]),
        ({"train.data": [{"target": "a"}]}, ["sweep.train.data: give every value that is a list"]),
        ({"train.rank.x": [1]}, ["sweep.train.rank.x: train.rank is not a mapping"]),
        ({"train.rank": [4, "many"]}, ["rank-many: train.rank: "]),
        ({"train.data.replace": [0, 2]}, ["replace-2: train.data: "]),
        (
            {"train.rank": ["few", 4], "evaluate.limit": ["x", "y"], "seed": [0], "zzz": [1]},
            ["rank-few_limit-x_seed-0 and 1 more: train.rank", "limit-x", "sweep.zzz"],
        ),
        ({"seed": list(range(50)), "train.rank": list(range(1, 40))}, ["states 1,950 cells"]),
        ({"train.train": ["attention " * 20]}, ["too long for a folder's name"]),
    ],
)
def test_every_fault_is_told_with_its_path(tmp_path: Path, sweep: Any, faults: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_sweep(write(tmp_path, changed(sweep) | {"report": {"x": None}}))
    for fault in faults:
        assert fault in str(caught.value)


def test_a_fault_of_all_cells_is_told_once(tmp_path: Path) -> None:
    stated = changed(SWEEP)
    stated["train"]["rnak"] = 3
    with pytest.raises(RecipeError) as caught:
        load_sweep(write(tmp_path, stated))
    assert len(caught.value.faults) == 1
    with pytest.raises(RecipeError, match="'seed' is not swept; there are"):
        load_sweep(write(tmp_path, changed(SWEEP, report={"x": "seed"})))
    with pytest.raises(RecipeError, match="the recipe has no sweep"):
        load_sweep(write(tmp_path, STATED | {"report": {"x": "seed"}}))


@pytest.mark.parametrize(
    ("text", "size"), [("8 GB", 8 * 10**9), ("1.5GiB", 3 * 2**29), (2048, 2048)]
)
def test_memory_is_stated_in_units(text: Any, size: int) -> None:
    assert Need(memory=text).memory == size


def test_what_a_task_needs_is_checked(tmp_path: Path) -> None:
    needs = {"train": {"cpus": 0, "gpu": 1}, "evaluate": {"memory": "much"}}
    with pytest.raises(RecipeError) as caught:
        load_sweep(write(tmp_path, STATED | {"resources": needs}))
    for word in ("resources.train.cpus", "resources.train.gpu: unknown", "evaluate.memory"):
        assert word in str(caught.value)


def test_data_that_is_not_named_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAIA_DATA", raising=False)
    stated = copy.deepcopy(STATED)
    stated["train"]["data"] = "${TAIA_DATA}/chats.jsonl"
    with pytest.raises(RecipeError, match="TAIA_DATA is not set"):
        run(write(tmp_path, stated), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def scores(axes: list[dict[str, Any]], labels: list[tuple[str, ...]]) -> dict[str, Any]:
    """A sweep.json in which vanilla falls from cell to cell and TAIA does not."""
    cells = []
    for at, names in enumerate(labels):
        means = []
        for variant, mean in (("base", 0.4), ("vanilla", 0.5 - 0.1 * at), ("taia", 0.45)):
            others = {"base": 0.4, "vanilla": 0.5 - 0.1 * at}
            differences = {
                other: {"mean": mean - value, "low": mean - value - 0.02,
                        "high": mean - value + 0.02, "detectable": 0.03,
                        "p_holm": 0.01 if abs(mean - value) > 0.02 else 0.9}
                for other, value in others.items() if other != variant
            }  # fmt: skip
            row = {"variant": variant, "accuracy": mean, "low": mean - 0.03, "high": mean + 0.03}
            means.append(row | {"differences": differences})
        tasks = {"examples": {"facts": 9}, "scores": [row | {"task": "facts"} for row in means]}
        cells.append({"name": "_".join(names), "labels": list(names), "means": means} | tasks)
    return {"name": "many", "title": None, "expected": "A fall.", "axes": axes, "x": 0,
            "comparisons": 9, "cells": cells}  # fmt: skip


SHARES = {"name": "replace", "field": "r", "labels": ["0", "0.5", "1"], "numbers": [0.0, 0.5, 1.0]}


def test_a_figure_has_a_line_a_variant_in_the_order_of_the_numbers() -> None:
    drawn = figure(scores([SHARES], [("1",), ("0",), ("0.5",)]))
    assert [text for _, text in drawn.x] == ["0", "0.5", "1"]
    assert drawn.joined
    assert not drawn.logarithmic
    (panel,) = drawn.panels
    assert [line.variant for line in panel.lines] == ["base", "vanilla", "taia"]
    for line in panel.lines:
        assert [dot.x for dot in line.dots] == [at for at, _ in drawn.x]
        for dot in line.dots:
            assert 0 <= dot.low <= dot.y <= dot.high <= 100


def test_sizes_that_span_much_are_logarithmic_and_other_axes_are_panels() -> None:
    sizes = {
        "name": "size",
        "field": "s",
        "labels": ["10", "20", "80"],
        "numbers": [10.0, 20.0, 80.0],
    }
    data = {"name": "data", "field": "d", "labels": ["a", "b"], "numbers": None}
    labels = [(size, name) for size in ("10", "20", "80") for name in ("a", "b")]
    drawn = figure(scores([sizes, data], labels))
    assert drawn.logarithmic
    assert [panel.title for panel in drawn.panels] == ["data a", "data b"]
    first, second, last = (at for at, _ in drawn.x)
    assert last - second == pytest.approx(2 * (second - first), abs=0.02)
    swapped = figure(scores([data], [("a",), ("b",)]))
    assert not swapped.joined


def test_the_page_tables_and_sentences_say_what_the_numbers_say(tmp_path: Path) -> None:
    told = scores([SHARES], [("0",), ("0.5",), ("1",)])
    (tmp_path / "sweep.json").write_text(json.dumps(told))
    page = report_sweep(tmp_path).read_text("utf-8")
    for part in (
        "A fall.",
        'id="figure"',
        'id="means"',
        'id="differences"',
        "polyline",
        "3.0 points",
    ):
        assert part in page
    assert "From replace 0 to 1: Base from 40.0% to 40.0%, Vanilla from 50.0% to 30.0%" in page
    table = accuracy_table(told)
    assert [entry.value for entry in table.rows[0].entries if entry] == ["40.0", "50.0", "45.0"]
    differences = difference_table(told)
    assert differences is not None
    verdicts = [[entry.verdict for entry in row.entries if entry] for row in differences.rows]
    assert verdicts == [["better", "better", "worse"], ["open", "better", "better"],
                        ["worse", "better", "better"]]  # fmt: skip
    sentence = "TAIA is above Vanilla in 2 of 3 cells (2 with p < 5%) and"
    assert any(one.startswith(sentence) for one in outcome(told))
    text = render_sweep_markdown(tmp_path)
    assert "| 1 | 40.0 (37.0 to 43.0) | 30.0 (27.0 to 33.0) |" in text


def test_the_figure_stands_alone_as_svg(tmp_path: Path) -> None:
    data = {"name": "data", "field": "d", "labels": ["a&b", "c"], "numbers": None}
    labels = [(share, name) for share in ("0", "0.5", "1") for name in ("a&b", "c")]
    (tmp_path / "sweep.json").write_text(json.dumps(scores([SHARES, data], labels)))
    draw_sweep(tmp_path, tmp_path / "figure.svg")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    legend, dots = 3, 6 * 3
    assert len(root.findall(".//{*}circle")) == legend + dots
    places = [group.get("transform") for group in root.findall("{*}g")]
    assert len(places) == len(set(places)) == legend + 2
    texts = [text.text for text in root.findall(".//{*}text")]
    assert {"Base", "Vanilla", "TAIA", "data a&b", "data c", "0.5", "replace"} <= set(texts)
    assert "href" not in (tmp_path / "figure.svg").read_text("utf-8")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, two corpora, and a task."""
    from chat_tools import tiny_bench

    return tiny_bench(tmp_path_factory.mktemp("sweep"))


def test_no_scores_of_an_earlier_run_outlive_one_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    cell = SimpleNamespace(cell=None, lock=None)
    monkeypatch.setattr(runs, "_tasks", lambda *_, **__: ([cell], []))
    monkeypatch.setattr(runs, "undone", lambda *_: left)
    monkeypatch.setattr(runs, "carry_out", lambda *_: left.clear())

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    def told(sweep: Sweep, folder: Path) -> None:
        cells = [one.name for one in sweep.cells]
        scores = {"cells": cells, "comparisons": 0, "x": sweep.report.x}
        (folder / "sweep.json").write_text(json.dumps(scores))

    monkeypatch.setattr("taia.sweep_report.report_sweep", lambda out: (out / "report.html").touch())
    monkeypatch.setattr("taia.sweep_scores.write_scores", told)
    few = SWEEP | {"train.data.replace": [0]}
    out = runs.run(write(tmp_path, changed(few)), tmp_path / "out")
    assert len(read_scores(out)["cells"]) == 2

    more = write(tmp_path, changed(SWEEP), "more.yaml")
    left.append("train")
    with monkeypatch.context() as cut:
        cut.setattr("taia.sweep_scores.write_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs.run(more, out)  # all cells are done, their scores are not told
    runs.run(more, out)
    assert len(read_scores(out)["cells"]) == 4

    (out / "sweep.json").write_text('{"cells": []}')  # as an older version left it
    with pytest.raises(EvaluationError, match="run the recipe again"):
        read_scores(out)
    runs.run(more, out)
    assert len(read_scores(out)["cells"]) == 4

    axis = {"x": "evaluate.protocol"}
    runs.run(write(tmp_path, changed(SWEEP, report=axis)), out)
    assert read_scores(out)["x"] == axis["x"]


@pytest.mark.slow
def test_a_sweep_trains_equal_parts_once_resumes_and_grows(bench: Path, tmp_path: Path) -> None:
    recipe = write(bench, changed(SWEEP))
    out = run(recipe, tmp_path / "out")
    told = read_scores(out)
    assert [cell["name"] for cell in told["cells"]] == [
        cell.name for cell in load_sweep(recipe).cells
    ]
    weights = {cell["name"]: out / "cells" / cell["name"] / "train/adapter_model.safetensors"
               for cell in told["cells"]}  # fmt: skip
    chat, plain, other, _ = weights.values()
    assert chat.stat().st_ino == plain.stat().st_ino
    assert chat.read_bytes() != other.read_bytes()
    for name in weights:
        cell = out / "cells" / name
        assert (cell / "report.html").is_file()
        overlap = json.loads((cell / "overlap.json").read_text())
        assert [row["records"] for row in overlap["sources"]] == [24, 24]

    name = next(iter(weights))
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    run(recipe, out)
    run(cell_recipe(out, name, bench), out / "cells" / name)  # a whole run of its own
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    more = SWEEP | {"train.data.replace": [0, 0.5, 1], "evaluate.protocol": ["chat"]}
    with pytest.raises(RecipeError, match="no longer states") as caught:
        run(write(bench, changed(more), "fewer.yaml"), out)
    assert "replace-0_protocol-plain" in str(caught.value)
    run(write(bench, changed(SWEEP | {"train.data.replace": [0, 0.5, 1]}), "more.yaml"), out)
    assert len(read_scores(out)["cells"]) == 6
    assert all(path.stat().st_mtime_ns == files[path] for path in weights.values())


def cell_recipe(out: Path, name: str, bench: Path) -> Path:
    """recipe.yaml of a cell, beside the files that its relative paths mean."""
    path = bench / f"{name}.yaml"
    path.write_text((out / "cells" / name / "recipe.yaml").read_text())
    return path
