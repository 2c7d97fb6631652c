"""Two runs side by side: paired whatever their order, refused on different examples."""

from __future__ import annotations

import json
import re

import pytest
from run_tools import simulated, write_run

from taia.cli.app import build_parser
from taia.errors import EvaluationError
from taia.evaluation.compare import compare_runs
from taia.evaluation.statistics import holm, paired_difference

GAINS = {"base": 0.0, "taia": 0.05}


@pytest.fixture
def answers():
    return simulated(GAINS, 120)


@pytest.fixture
def run(tmp_path, answers):
    return write_run(tmp_path / "one", answers)


def test_a_run_does_not_differ_from_itself(run):
    found = compare_runs(run, run)
    assert {(row.a, row.b) for row in found.rows} == {("base", "base"), ("taia", "taia")}
    assert all(row.difference["mean"] == 0 and row.difference["p"] == 1 for row in found.rows)
    assert [row.task for row in found.rows] == ["task0", "task1", ""] * 2
    assert found.notes == ()


@pytest.mark.slow
def test_variants_of_one_run_are_paired_as_its_own_table_pairs_them(run, answers):
    found = compare_runs(run, run, ["taia=base"])
    for row in found.rows[:2]:
        alone = paired_difference(answers["taia"][row.task], answers["base"][row.task])
        assert row.difference["mean"] == alone.mean
        assert (row.difference["low"], row.difference["p"]) == (alone.low, alone.p)
    assert [row.difference["p_holm"] for row in found.rows] == holm(
        [row.difference["p"] for row in found.rows]
    )


def test_examples_are_paired_by_id_not_by_place(tmp_path, run, answers):
    turned = {name: {t: v[::-1] for t, v in tasks.items()} for name, tasks in answers.items()}
    ids = {task: [f"{task}-{at}" for at in reversed(range(120))] for task in ("task0", "task1")}
    other = write_run(tmp_path / "two", turned, ids=ids)
    assert all(row.difference["p"] == 1 for row in compare_runs(run, other).rows)


def test_what_else_differs_is_told(tmp_path, run, answers):
    other = write_run(
        tmp_path / "two", {"other": answers["taia"], "base": answers["base"]},
        prompts="x", base="another/base", base_identity="b2",
        tuned=None, tuned_identity=None, protocol="plain", shots=2,
    )  # fmt: skip
    told = " ".join(compare_runs(run, other).notes)
    assert "some/base and another/base" in told
    assert "train and none" in told
    assert "chat with 0 shots and plain with 2 shots" in told
    assert "240 of 240 prompts" in told
    moved = write_run(tmp_path / "three", answers, tuned="elsewhere")
    assert compare_runs(run, moved).notes == ()
    again = write_run(tmp_path / "four", answers, tuned_identity="other")
    assert compare_runs(run, again).notes == (
        "different fine-tunes: train in both, with other files",
    )


def test_one_variant_each_is_compared_whatever_its_name(tmp_path, answers):
    runs = [write_run(tmp_path / name, {name: answers[name]}) for name in GAINS]
    assert {(row.a, row.b) for row in compare_runs(*runs).rows} == {("base", "taia")}
    both = write_run(tmp_path / "both", {"left": answers["base"], "right": answers["taia"]})
    with pytest.raises(EvaluationError, match=re.escape("--variants 'left=base'")):
        compare_runs(both, runs[0])


def test_different_examples_are_told_which_and_how_many(tmp_path, run, answers):
    shorter = {name: {"task0": tasks["task0"][:100], "task1": tasks["task1"]}
               for name, tasks in answers.items()}  # fmt: skip
    other = write_run(tmp_path / "two", shorter)
    with pytest.raises(EvaluationError, match="different examples") as caught:
        compare_runs(run, other)
    (fault,) = caught.value.faults
    assert "task0: 20 examples only in" in fault
    assert "task0-100, task0-101, task0-102 and 17 more" in fault
    assert "100 are in both" in fault


def test_other_answers_and_metrics_are_refused(tmp_path, run, answers):
    other = write_run(tmp_path / "two", answers, metric="f1")
    file = other / "results" / "base" / "task1.jsonl"
    for name in GAINS:
        file = other / "results" / name / "task1.jsonl"
        file.write_text(file.read_text().replace('"target": 1', '"target": 0'))
    with pytest.raises(EvaluationError) as caught:
        compare_runs(run, other)
    told = "\n".join(caught.value.faults)
    assert "task0: scored by acc" in told
    assert "task1: 120 of 120 examples have another answer" in told


def test_unknown_variants_and_tasks_are_told_together(tmp_path, run, answers):
    with pytest.raises(EvaluationError, match="did you mean 'taia'") as caught:
        compare_runs(run, run, ["tiaa", "base=nothing", "base", "base"])
    assert len(caught.value.faults) == 4
    other = write_run(tmp_path / "two", {n: {"task0": t["task0"]} for n, t in answers.items()})
    with pytest.raises(EvaluationError, match="--tasks task0"):
        compare_runs(run, other)
    assert {row.task for row in compare_runs(run, other, tasks=["task0"]).rows} == {"task0"}
    with pytest.raises(EvaluationError, match="no: not in"):
        compare_runs(run, other, tasks=["no"])


def test_subjects_are_clusters(tmp_path, answers):
    subjects = {task: [f"s{at % 12}" for at in range(120)] for task in ("task0", "task1")}
    run = write_run(tmp_path / "one", answers, subjects=subjects)
    assert compare_runs(run, run, ["taia=base"]).rows[0].difference["subjects"] == 12


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_a_table_or_json(run, capsys, as_json):
    words = ["compare", str(run), str(run), "--variants", "taia=base"]
    options = build_parser("compare").parse_args(words + ["--json"] * as_json)
    options.do(options)
    told = capsys.readouterr().out
    if as_json:
        assert len(json.loads(told)["rows"]) == 3
    else:
        assert "TAIA (A) and Base (B)" in told
        assert "chat protocol, 0 shots" in told
        assert max(len(line) for line in told.splitlines() if "task0" in line) <= 80
