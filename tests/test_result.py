"""Result files: what is written is read back, and damage is told with its line and its mend."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest

from taia.errors import EvaluationError
from taia.evaluation.result import (
    Example,
    Settings,
    TaskInfo,
    Variant,
    mending_command,
    read_results,
    variant_folder,
)
from taia.evaluation.summary import summarise

ANSWERS = {
    ("base", "a"): [1, 1, 0, 0],
    ("base", "b"): [1, 0],
    ("vanilla", "a"): [1, 0, 0, 0],
    ("vanilla", "b"): [0, 0],
    ("half", "a"): [1, 1, 1, 0],
    ("half", "b"): [1, 1],
}


def example(task: str, index: int, correct: int) -> Example:
    return Example(
        task=task,
        id=f"{task}-{index}",
        prompt_hash="0123456789abcdef",
        prediction=0 if correct else 1,
        target=0,
        correct=float(correct),
        metric="acc_norm",
        metrics={"acc": 0.0, "acc_norm": float(correct)},
        loglikelihoods=(-1.25, -7.5),
    )


@pytest.fixture
def run(tmp_path):
    variants = (
        Variant("base", "none", "base"),
        Variant("vanilla", "all", "vanilla"),
        Variant("half", "all*0.5", variant_folder("half")),
    )
    settings = Settings(
        base="some/base",
        base_identity="b",
        tuned="some adapter",
        tuned_form="adapter",
        tuned_identity="t",
        protocol="plain",
        limit=4,
        seed=0,
        dtype="float32",
        batch_size=32,
        data="data",
        tasks={
            "a": TaskInfo(4, "acc_norm", "data/a.jsonl", "00"),
            "b": TaskInfo(2, "acc_norm", "hub:b[test]", None),
        },
        variants=variants,
        versions={"taia": "0"},
    )
    (tmp_path / "settings.json").write_text(settings.to_json())
    for (name, task), answers in ANSWERS.items():
        folder = tmp_path / "results" / variant_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [example(task, i, correct).to_json() + "\n" for i, correct in enumerate(answers)]
        (folder / f"{task}.jsonl").write_text("".join(lines))
    return tmp_path


def test_a_line_reads_back_as_it_was():
    one = dataclasses.replace(example("a", 0, 1), id="ä\u2028b", prediction="text")
    assert Example.from_json(one.to_json()) == one
    assert "\n" not in one.to_json()


def test_a_line_from_before_there_were_subjects_reads_with_defaults():
    fields = json.loads(example("a", 0, 1).to_json())
    for later in ("parsed", "subject"):
        del fields[later]
    assert Example.from_json(json.dumps(fields | {"correct": 1})) == example("a", 0, 1)


def test_results_and_their_summary(run):
    results = read_results(run)
    assert results.tasks == ("a", "b")
    assert {key: list(results.correct(*key)) for key in results.examples} == ANSWERS
    summary = summarise(results)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["tasks"]["b"] == {
        "examples": 2, "metric": "acc_norm", "source": "hub:b[test]", "sha256": None,
        "subjects": 0,
    }  # fmt: skip
    rows = {(row["variant"], row["task"]): row for row in summary["scores"]}
    assert rows["vanilla", "a"]["accuracy"] == 0.25
    assert set(rows["base", "a"]["differences"]) == {"vanilla"}
    assert set(rows["half", "a"]["differences"]) == {"base", "vanilla"}
    assert rows["half", "a"]["differences"]["vanilla"]["mean"] == 0.5
    means = {row["variant"]: row for row in summary["means"]}
    assert means["half"]["accuracy"] == (0.75 + 1) / 2
    assert means["vanilla"]["differences"]["base"]["mean"] == pytest.approx(-0.375)
    assert means["vanilla"]["differences"]["base"]["examples"] == 6


def damage(path, how):
    text = path.read_text()
    lines = text.splitlines()
    if how == "cut":
        path.write_text(text[:-20])
    elif how == "cut between lines":
        path.write_text("".join(line + "\n" for line in lines[:-1]))
    elif how == "missing":
        path.unlink()
    elif how == "unknown field":
        path.write_text("\n".join([lines[0], lines[1][:-1] + ', "extra": 1}', *lines[2:]]) + "\n")
    elif how == "wrong type":
        path.write_text(text.replace('"correct": 0.0', '"correct": "no"'))
    elif how == "twice":
        path.write_text("".join(line + "\n" for line in [*lines[:-1], lines[0]]))
    elif how == "other example":
        path.write_text(text.replace('"a-1"', '"a-9"'))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", "line 4"),
        ("cut between lines", "3 examples, where there must be 4"),
        ("missing", "No such file"),
        ("unknown field", "line 2: extra"),
        ("wrong type", "line 2: correct"),
        ("twice", "same example id"),
        ("other example", "a-9 is not base's a-1"),
    ],
)
def test_damage_is_told_with_the_file_and_the_command_that_mends_it(run, how, told):
    damage(run / "results" / "vanilla" / "a.jsonl", how)
    with pytest.raises(EvaluationError) as caught:
        read_results(run)
    message = str(caught.value)
    assert told in message
    assert "vanilla/a.jsonl" in message
    assert "taia eval --base some/base --adapter 'some adapter'" in message


def test_all_damage_is_told_at_once(run):
    damage(run / "results" / "vanilla" / "a.jsonl", "missing")
    damage(run / "results" / "base" / "b.jsonl", "cut")
    with pytest.raises(EvaluationError) as caught:
        read_results(run)
    assert len(caught.value.faults) == 2


def test_no_settings_and_broken_settings(run):
    (run / "settings.json").write_text('{"base": ')
    with pytest.raises(EvaluationError, match="overwrite"):
        read_results(run)
    (run / "settings.json").unlink()
    with pytest.raises(EvaluationError, match="taia eval"):
        read_results(run)


def test_the_mending_command_asks_for_the_same(run):
    words = shlex.split(mending_command(read_results(run).settings, run))
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--limit"] == "4"
    assert given["--tasks"] == "a,b"
    assert given["--protocol"] == "plain"
    assert given["--variants"].startswith("base,vanilla,half=all*0.5")


def test_folders_of_variants_are_safe_and_their_own():
    assert variant_folder("taia-full") == "taia-full"
    odd = ["attention + ffn[0:8]*0.3", "attention + ffn[0:8]*0.4", "../up", "Base", "é", "a/b", "."]
    folders = [variant_folder(name) for name in odd]
    assert len(set(folders)) == len(odd)
    assert all(set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for folder in folders)
