"""Tasks: what records they read, what they refuse, and what lm-eval makes of them."""

from __future__ import annotations

import json

import pytest

from taia.errors import EvaluationError
from taia.evaluation.catalogue import FOLDER, PREFIX, find_tasks, known_tasks, load_task
from taia.evaluation.tasks import utils

GOOD = {"id": "1", "question": "Is ice cold?", "choices": ["yes", "no"], "answer": 0}
CLOZE = {"arc_easy", "arc_challenge", "openbookqa", "piqa", "csqa"}
LETTERS = {"mmlu", "logiqa", "medqa"}


def write(path, *records):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_tasks_that_ship():
    assert set(known_tasks()) == CLOZE | LETTERS


def test_names_for_lm_eval_cannot_hide_its_own():
    for name in known_tasks():
        assert f"task: {PREFIX}{name}\n" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", sorted(CLOZE | LETTERS | {"quartz"}))
def test_prompt_choices_and_metric(tmp_path, name):
    record = GOOD | {"question": "Ice melts.\n\nIs ice cold?", "choices": ["yes", "no", "{{x}}"]}
    write(tmp_path / f"eval_{name}.jsonl", record)
    task = load_task(find_tasks([name], tmp_path)[0])
    doc = task.eval_docs[0]
    prompt = task.doc_to_text(doc)
    assert prompt.endswith("\nAnswer:")
    assert task.doc_to_target(doc) == 0
    if name in LETTERS:
        assert "\nA. yes\nB. no\nC. {{x}}\nAnswer:" in prompt
        assert task.doc_to_choice(doc) == ["A", "B", "C"]
        assert task.config.metadata["primary_metric"] == "acc"
    else:
        assert prompt == "Question: Ice melts.\n\nIs ice cold?\nAnswer:"
        assert task.doc_to_choice(doc) == ["yes", "no", "{{x}}"]
        assert task.config.metadata["primary_metric"] == "acc_norm"
    if name == "logiqa":
        assert prompt.startswith("Passage: Ice melts.\nQuestion: Is ice cold?\nChoices:\n")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"id": "1", "question": "q", "answer": "42"}, "without choices"),
        (GOOD | {"answer": 2}, "outside the 2 choices"),
        (GOOD | {"answer": -1}, "outside the 2 choices"),
        (GOOD | {"answer": "A"}, "not the index"),
        (GOOD | {"answer": True}, "not the index"),
        (GOOD | {"choices": ["yes"]}, "2 to 26"),
        (GOOD | {"choices": ["yes", " "]}, "one of the choices"),
        (GOOD | {"choices": ["yes", None]}, "one of the choices"),
        (GOOD | {"question": ""}, "question"),
        (GOOD | {"id": None}, "id is neither"),
        (GOOD | {"id": "first"}, "was used on line 1"),
    ],
)
def test_broken_records_are_told_by_line(tmp_path, record, told):
    file = write(tmp_path / "piqa.jsonl", GOOD | {"id": "first"}, record, "", "{also broken")
    with pytest.raises(EvaluationError) as caught:
        find_tasks(["piqa"], tmp_path)
    message = str(caught.value)
    assert f"line 2: {told}" in message or f"line 2: id '{told}" in message or told in message
    assert "line 2: " in message
    assert "line 4: not JSON" in message
    assert str(file) in message


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "piqa.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(EvaluationError, match="line 2: not UTF-8"):
        find_tasks(["piqa"], tmp_path)


def test_no_record_no_file_no_folder(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="no record"):
        find_tasks(["piqa"], tmp_path)
    with pytest.raises(EvaluationError, match=r"eval_csqa\.jsonl"):
        find_tasks(["csqa"], tmp_path)
    with pytest.raises(EvaluationError, match="no such folder"):
        find_tasks(["csqa"], tmp_path / "none")


def test_unknown_tasks_are_told_together_with_the_nearest(tmp_path):
    write(tmp_path / "quartz.jsonl", GOOD)
    with pytest.raises(EvaluationError) as caught:
        find_tasks(["arc_esy", "quarz", "../piqa"], tmp_path)
    message = str(caught.value)
    assert "did you mean 'arc_easy'" in message
    assert "did you mean 'quartz'" in message
    assert "openbookqa" in message
    assert len(caught.value.faults) == 3
    with pytest.raises(EvaluationError, match="named twice"):
        find_tasks(["piqa", "piqa"])
    with pytest.raises(EvaluationError, match="no task is named"):
        find_tasks([])


def test_the_hash_is_of_the_file_and_the_hub_has_none(tmp_path):
    write(tmp_path / "piqa.jsonl", GOOD)
    (before,) = find_tasks(["piqa"], tmp_path)
    write(tmp_path / "piqa.jsonl", GOOD | {"answer": 1})
    (after,) = find_tasks(["piqa"], tmp_path)
    assert before.sha256 != after.sha256
    (hub,) = find_tasks(["arc_easy"])
    assert (hub.source, hub.sha256) == ("hub:allenai/ai2_arc/ARC-Easy[test]", "")


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EvaluationError, match=r"allenai/ai2_arc.*--data DIR"):
        load_task(find_tasks(["arc_easy"])[0])


LABELLED = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
HUB = {
    "arc_easy": {"id": "M_1", "question": "q", "choices": LABELLED, "answerKey": "C"},
    "arc_challenge": {
        "id": "M_2", "question": "q", "answerKey": "3",
        "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
    },
    "csqa": {
        "id": "x", "question": "q", "question_concept": "k", "choices": LABELLED, "answerKey": "C"
    },
    "openbookqa": {"id": "7-1", "question_stem": "q", "choices": LABELLED, "answerKey": "C "},
    "piqa": {"goal": "q", "sol1": "a", "sol2": "b", "label": 1},
    "mmlu": {"question": "q", "subject": "s", "choices": ["a", "b", "c"], "answer": 2},
    "logiqa": {"label": "c", "context": "p", "question": "q", "options": ["a", "b", "c"]},
    "medqa": {
        "id": "t-1", "sent1": "q", "sent2": "", "label": 2,
        "ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d",
    },
}  # fmt: skip
"""One record of each hub data set, in the form in which it is published."""


@pytest.mark.parametrize("name", sorted(CLOZE | LETTERS))
def test_hub_records_become_ours(name):
    (record,) = utils.from_hub(name, [HUB[name]])
    assert record["question"] == ("p\n\nq" if name == "logiqa" else "q")
    assert record["choices"][record["answer"]] == ("b" if name == "piqa" else "c")
    assert record["id"]


def test_hub_records_of_another_shape_are_told_by_row():
    with pytest.raises(EvaluationError, match="row 1"):
        utils.from_hub("piqa", [HUB["piqa"], HUB["arc_easy"]])
    with pytest.raises(EvaluationError, match="0 of 0"):
        utils.from_hub("piqa", [])


@pytest.mark.parametrize("name", sorted(CLOZE | LETTERS | {"hellaswag", "pubmedqa", "ceval"}))
def test_the_real_files_are_read(shared_data, name):
    (task,) = find_tasks([name], shared_data)
    assert len(utils.read_records(shared_data / f"eval_{name}.jsonl")) > 300
    assert task.source.endswith(f"eval_{name}.jsonl")
