"""Overlap of training data with held-out records: found, told, removed."""

from __future__ import annotations

import json

import pytest
from chat_tools import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from taia.errors import DataError
from taia.training.corpus import digest_of_data, make_corpus, read_data
from taia.training.data import Chat
from taia.training.forms import Message
from taia.training.mixture import parse_data
from taia.training.overlap import find_overlap, read_held_out
from taia.training.settings import Settings

ABC = [f"word{n}" for n in range(40)]
QUESTION = "Which of these planets is the largest of all?"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def talk(text, answer="yes"):
    return Chat((Message("user", text), Message("assistant", answer)), "here:1")


def found(tmp_path, record, *texts):
    held = read_held_out([write(tmp_path / "eval.jsonl", record)])
    overlaps = find_overlap([talk(text) for text in texts], held)
    return [overlaps[at].exact if at in overlaps else None for at in range(len(texts))]


def test_a_question_is_found_in_other_dress(tmp_path):
    record = {"question": QUESTION, "choices": ["Mars", "Jupiter"], "answer": 1}
    texts = [
        QUESTION,
        "Please: which of these PLANETS -- is the largest\nof all?\nA. Mars\nB. Jupiter",
        QUESTION.replace("largest", "smallest"),
        "Mars",
    ]
    assert found(tmp_path, record, *texts) == [True, True, None, None]


def test_few_words_must_be_the_whole_turn(tmp_path):
    record = {"question": "What is this?", "choices": ["a", "b"], "answer": 0}
    texts = ["what is this", "What is this thing called?"]
    assert found(tmp_path, record, *texts) == [True, None]


@given(st.integers(13, 40), st.integers(0, 27), st.integers(5, 20))
def test_thirteen_words_in_a_row_and_no_fewer(tmp_path_factory, size, start, run):
    folder = tmp_path_factory.mktemp("grams")
    record = {"question": " ".join(ABC[:size]), "choices": ["x", "y"], "answer": 0}
    part = ABC[start : start + run]
    shared = max(0, min(size, start + run) - start)
    whole = start == 0 and shared == size
    told = found(folder, record, f"before {' '.join(part)} after")
    assert told == [True if whole else False if shared >= 13 else None]


def test_other_forms_of_records(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Jupiter"},
        ]
    }
    assert found(tmp_path, chat, QUESTION, "Jupiter") == [True, None]
    goal = {"goal": QUESTION, "id": "Another text with more than five words in it"}
    assert found(tmp_path, goal, QUESTION, goal["id"]) == [True, None]
    context = {"question": "Who is it of all?", "passage": " ".join(ABC)}
    assert found(tmp_path, context, " ".join(ABC[5:20]), "nothing") == [False, None]


def test_what_cannot_be_held_out(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_held_out([str(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match="no such file"):
        read_held_out([str(tmp_path)])
    (tmp_path / "bad.jsonl").write_text("{}\n{\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON"):
        read_held_out([str(tmp_path)])
    with pytest.raises(DataError, match="none has"):
        read_held_out([write(tmp_path / "bad.jsonl", {"id": "x"})])


@pytest.mark.parametrize("remove", [False, True])
def test_overlap_is_counted_and_left_out_when_asked(remove, tmp_path):
    texts = [QUESTION, "Is the sky blue?", " ".join(ABC)]
    rows = [{"instruction": text, "output": "yes"} for text in texts]
    source = write(tmp_path / "train.jsonl", *rows)
    records = [{"question": QUESTION}, {"question": "Who is it?", "passage": " ".join(ABC[9:])}]
    held = write(tmp_path / "eval.jsonl", *records)
    data = {"sources": [{"from": source}], "held_out": [held], "remove_overlap": remove}
    options = Settings(base="base", data=parse_data(data), max_length=512)
    (part,) = (corpus := make_corpus(options, read_data(options), byte_tokenizer())).parts
    assert (part.records, part.exact, part.grams) == (3, 1, 1)
    assert (part.removed, part.examples) == ((2, 1) if remove else (0, 3))
    assert part.overlaps[0] == f"{source}:1 with eval.jsonl"
    before = digest_of_data(options.data, None)
    assert before == corpus.digest
    write(tmp_path / "eval.jsonl", {"question": "Another?"})
    assert digest_of_data(options.data, None) != before


def test_nothing_left_is_told(tmp_path):
    source = write(tmp_path / "train.jsonl", {"instruction": QUESTION, "output": "yes"})
    held = write(tmp_path / "eval.jsonl", {"question": QUESTION})
    data = {"sources": [{"from": source}], "held_out": held, "remove_overlap": True}
    options = Settings(base="base", data=parse_data(data))
    with pytest.raises(DataError, match="nothing is left"):
        make_corpus(options, read_data(options), byte_tokenizer())
