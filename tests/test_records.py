"""Records: the four shapes, what is refused and how it is told, and the subset for two cores."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taia.errors import EvaluationError
from taia.evaluation.catalogue import find_tasks
from taia.evaluation.records import FIELDS, checked, read_records, shape_of, subset

GOOD = {"id": "1", "question": "Is ice cold?", "choices": ["yes", "no"], "answer": 0}
FREE = {"id": "1", "question": "3 + 4?", "answer": "7"}
READING = {"id": "1", "context": "Ice is cold.", "question": "What is?", "answers": ["Ice"]}
SUMMARY = {"id": "1", "document": "Ice is cold, and has been.", "summary": "Ice is cold."}
SHAPED = {"choice": GOOD, "free": FREE, "reading": READING, "summary": SUMMARY}


def write(path, *records):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


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
        (GOOD | {"id": "first"}, "id 'first' was used on line 1"),
    ],
)
def test_broken_records_are_told_by_line(tmp_path, record, told):
    file = write(tmp_path / "piqa.jsonl", GOOD | {"id": "first"}, record, "", "{also broken")
    with pytest.raises(EvaluationError) as caught:
        find_tasks(["piqa"], tmp_path)
    message = str(caught.value)
    assert f"line 2: {told}" in message or told in message
    assert "line 2: " in message
    assert "line 4: not JSON" in message
    assert str(file) in message


@pytest.mark.parametrize(
    ("task", "record", "told"),
    [
        ("gsm8k", {"id": "1", "question": "q"}, "without answer"),
        ("gsm8k", FREE | {"answer": 7}, "answer is not a text"),
        ("math500", FREE | {"solution": 7}, "solution is not a text"),
        ("squad2", FREE, "without context, answers"),
        ("squad2", READING | {"answers": "Ice"}, "answers is not a list"),
        ("squad2", READING | {"answers": [""]}, "answers is not a list"),
        ("squad2", READING | {"context": ""}, "context is not a text"),
        ("xsum", FREE, "without document, summary"),
        ("xsum", SUMMARY | {"summary": " "}, "summary is not a text"),
    ],
)
def test_a_task_whose_data_lacks_a_field_is_one_error(tmp_path, task, record, told):
    write(tmp_path / f"eval_{task}.jsonl", record)
    with pytest.raises(EvaluationError) as caught:
        find_tasks([task, f"{task}-small"], tmp_path)
    assert f"line 1: {told}" in str(caught.value)
    assert len(caught.value.faults) == 2


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


@pytest.mark.parametrize("shape", sorted(SHAPED))
def test_the_shape_of_a_file_is_that_of_its_records(tmp_path, shape):
    file = write(tmp_path / "one.jsonl", "{broken", SHAPED[shape])
    assert shape_of(file) == shape
    write(file, SHAPED[shape])
    (record,) = read_records(file, shape)
    assert record == SHAPED[shape] | {"subject": ""} | ({"solution": ""} if shape == "free" else {})


def test_a_file_of_no_shape_says_what_multiple_choice_wants(tmp_path):
    write(tmp_path / "one.jsonl", {"id": "1", "question": "q"})
    with pytest.raises(EvaluationError, match="without choices, answer"):
        find_tasks(["one"], tmp_path)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(shape=st.sampled_from(sorted(FIELDS)), data=st.data())
def test_any_value_is_a_record_or_a_value_error(shape, data):
    fields = st.fixed_dictionaries({}, optional={**dict.fromkeys(FIELDS[shape], ANY), "x": ANY})
    raw = data.draw(fields | ANY)
    try:
        record = checked(raw, shape)
    except ValueError:
        return
    assert set(FIELDS[shape]) < set(record)
    json.dumps(record).encode()


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 70), st.data())
def test_a_subset_is_in_proportion_and_does_not_depend_on_the_order(subjects, size, data):
    records = [{"id": str(n), "subject": subject} for n, subject in enumerate(subjects)]
    chosen = subset(records, size)
    assert len(chosen) == min(size, len(records))
    assert [one for one in records if one in chosen] == chosen
    mixed = data.draw(st.permutations(records))
    assert {one["id"] for one in subset(mixed, size)} == {one["id"] for one in chosen}
    share = min(1, size / len(records))
    taken = Counter(one["subject"] for one in chosen)
    for subject, count in Counter(subjects).items():
        assert abs(taken[subject] - share * count) <= 1
