"""Tasks: what records they read, what they refuse, and what lm-eval makes of them."""

from __future__ import annotations

import json

import pytest

from taia.errors import EvaluationError
from taia.evaluation.catalogue import FOLDER, GROUPS, PREFIX, find_tasks, known_tasks, load_task
from taia.evaluation.hub import HUB_SHAPES, from_hub
from taia.evaluation.records import checked, read_records

GOOD = {"id": "1", "question": "Is ice cold?", "choices": ["yes", "no"], "answer": 0}
CLOZE = {"arc_easy", "arc_challenge", "openbookqa", "piqa", "csqa", "hellaswag", "pubmedqa"}
LETTERS = {"mmlu", "logiqa", "medqa", "mmedbench", "ceval"}
GENERATED = {"math500", "gsm8k", "svamp", "bbh", "squad2", "xsum"}


def write(path, *records):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_tasks_that_ship():
    assert set(known_tasks()) == CLOZE | LETTERS | GENERATED
    assert set(HUB_SHAPES) == set(known_tasks())
    assert set(GROUPS["paper"]) <= set(known_tasks())


def test_names_for_lm_eval_cannot_hide_its_own():
    for name in known_tasks():
        assert f"task: {PREFIX}{name}\n" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", sorted((CLOZE - {"pubmedqa"}) | LETTERS | {"quartz"}))
def test_prompt_choices_and_metric(tmp_path, name):
    record = GOOD | {"question": "Ice melts.\n\nIs ice cold?", "choices": ["yes", "no", "{{x}}"]}
    write(tmp_path / f"eval_{name}.jsonl", record)
    task = load_task(find_tasks([name], tmp_path)[0])
    doc = task.eval_docs[0]
    prompt = task.doc_to_text(doc)
    assert prompt.endswith({"ceval": "\n答案：", "hellaswag": "cold?"}.get(name, "\nAnswer:"))
    assert task.doc_to_target(doc) == 0
    if name in LETTERS:
        assert "\nA. yes\nB. no\nC. {{x}}\n" in prompt
        assert task.doc_to_choice(doc) == ["A", "B", "C"]
        assert task.config.metadata["primary_metric"] == "acc"
    else:
        told = ": Ice melts.\n\nIs ice cold?"
        assert prompt == (told if name == "hellaswag" else f"Question{told}\nAnswer:")
        assert task.doc_to_choice(doc) == ["yes", "no", "{{x}}"]
        assert task.config.metadata["primary_metric"] == "acc_norm"
    if name == "logiqa":
        assert prompt.startswith("Passage: Ice melts.\nQuestion: Is ice cold?\nChoices:\n")


@pytest.mark.slow
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
    "mmedbench": {
        "question": "q", "options": {"A": "a", "B": "b", "C": "c"}, "answer_idx": "C"
    },
    "ceval": {
        "id": 3, "question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "C",
        "subject": "law",
    },
    "hellaswag": {
        "ctx_a": "he", "ctx_b": "SITS", "endings": ["a", "b", "c"], "label": "2",
        "activity_label": "k",
    },
    "pubmedqa": {"QUESTION": "q", "CONTEXTS": ["p", "r"], "final_decision": "no"},
    "math500": {
        "problem": "q", "solution": "s", "answer": "c", "subject": "k", "unique_id": "t/1.json"
    },
    "gsm8k": {"question": "q", "answer": "it is <<1+1=2>>\n#### 1,002"},
    "svamp": {
        "ID": "chal-1", "Body": "two", "Question": "q?", "Answer": "3.0", "Type": "Addition"
    },
    "bbh": {"input": "q", "target": "(C)", "subject": "navigate"},
    "squad2": {
        "id": "5", "title": "Ice", "context": "p", "question": "q",
        "answers": {"text": ["c", "c"], "answer_start": [0, 0]},
    },
    "xsum": {"id": "5", "document": "q", "summary": "c"},
}  # fmt: skip
"""One record of each hub data set, in the form in which it is published."""


@pytest.mark.parametrize("name", sorted(CLOZE | LETTERS))
def test_hub_records_become_ours(name):
    (record,) = from_hub(name, [HUB[name]])
    asked = {"logiqa": "p\n\nq", "hellaswag": "he Sits", "pubmedqa": "Context: p\nr\n\nQuestion: q"}
    assert record["question"] == asked.get(name, "q")
    answer = {"piqa": "b", "pubmedqa": "no"}.get(name, "c")
    assert record["choices"][record["answer"]] == answer
    assert record["id"]


@pytest.mark.parametrize(
    ("name", "shape", "fields"),
    [
        ("math500", "free", {"answer": "c", "solution": "s", "subject": "k", "id": "t/1.json"}),
        ("gsm8k", "free", {"answer": "1002", "question": "q"}),
        ("svamp", "free", {"answer": "3", "question": "two. q?", "subject": "Addition"}),
        ("bbh", "free", {"answer": "(C)", "subject": "navigate"}),
        ("squad2", "reading", {"answers": ["c"], "subject": "Ice"}),
        ("xsum", "summary", {"document": "q", "summary": "c"}),
    ],
)
def test_hub_records_of_generated_answers_become_ours(name, shape, fields):
    (record,) = from_hub(name, [HUB[name]], shape)
    assert {key: record[key] for key in fields} == fields
    assert checked(record, shape) == record


def test_hub_records_of_another_shape_are_told_by_row():
    with pytest.raises(EvaluationError, match="row 1"):
        from_hub("piqa", [HUB["piqa"], HUB["arc_easy"]])
    with pytest.raises(EvaluationError, match="0 of 0"):
        from_hub("piqa", [])


@pytest.mark.parametrize("name", sorted(set(HUB) - {"mmedbench"}))
def test_the_real_files_become_tasks(shared_data, name):
    """Every task, whole and small, asked in both ways, from the published records."""
    full, small = find_tasks([name, f"{name}-small"], shared_data)
    plain, paper = load_task(full), load_task(small, protocol="paper")
    shape = paper.config.metadata["shape"]
    records = read_records(shared_data / f"eval_{name}.jsonl", shape)
    assert len(plain.eval_docs) == len(records) >= 300
    assert len(paper.eval_docs) == paper.config.metadata["small_size"] < len(records)
    if name in {"bbh", "ceval", "math500", "mmlu"}:
        subjects = {record["subject"] for record in records}
        assert {doc["subject"] for doc in paper.eval_docs} == subjects
    doc = paper.eval_docs[0]
    for task in (plain, paper):
        assert str(doc.get("question") or doc["document"])[-20:] in task.doc_to_text(doc)
    if shape == "choice":
        assert paper.doc_to_choice(doc) == list("ABCDEFGHIJ"[: len(doc["choices"])])
        assert paper.config.metadata["primary_metric"] == "acc"
    elif shape == "free":
        assert paper.config.generation_kwargs["lead_in"] == "The answer is"
