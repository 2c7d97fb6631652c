"""The records of a task, read from a local file of JSON Lines and checked line by line.

Four shapes; `subject` and `solution` may be left out, further fields are ignored:
    choice    {"id", "question", "choices": [...], "answer": index from 0, "subject"?}
    free      {"id", "question", "answer": text, "solution"?, "subject"?}
    reading   {"id", "context", "question", "answers": [...], "subject"?}    [] = not answerable
    summary   {"id", "document", "summary", "subject"?}

Limits: at most 26 choices; a file is one shape throughout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError

__all__ = [
    "ALPHABET",
    "FORMS",
    "Record",
    "checked",
    "local_file",
    "read_records",
    "shape_of",
    "subset",
]

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Record = dict[str, Any]

FORMS = {
    "choice": '{"id", "question", "choices": [...], "answer": index from 0}',
    "free": '{"id", "question", "answer": text}',
    "reading": '{"id", "context", "question", "answers": [...]}',
    "summary": '{"id", "document", "summary"}',
}
"""Every shape and what a record of it must hold."""

FIELDS = {
    "choice": ("id", "question", "choices", "answer"),
    "free": ("id", "question", "answer"),
    "reading": ("id", "context", "question", "answers"),
    "summary": ("id", "document", "summary"),
}


def local_file(task: str, folder: Path) -> Path:
    """FOLDER/eval_TASK.jsonl or FOLDER/TASK.jsonl. Raises EvaluationError when neither is there."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder; --data names a folder of JSON Lines")
    names = (f"eval_{task}.jsonl", f"{task}.jsonl")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EvaluationError(
        f"{folder}: neither {names[0]} nor {names[1]} is in it. Put the task's records there, "
        "or leave --data out to read the hub"
    )


def read_records(path: Path, shape: str = "choice") -> list[Record]:
    """The records of one JSON Lines file, checked.

    Raises EvaluationError that tells every broken line by its number.
    """
    lines = _lines(path)
    records: list[Record] = []
    faults: list[str] = []
    first_line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = checked(json.loads(line), shape)
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: {_reason(error)}")
            continue
        earlier = first_line_of.setdefault(record["id"], number)
        if earlier != number:
            faults.append(f"line {number}: id {record['id']!r} was used on line {earlier}")
        records.append(record)
    if faults:
        raise EvaluationError(
            f"{path}: {len(faults)} of {len(lines)} lines are not records of the form "
            f"{FORMS[shape]}",
            faults,
        )
    if not records:
        raise EvaluationError(f"{path}: no record in it; a task needs at least one")
    return records


def shape_of(path: Path) -> str:
    """The shape of a file of an unknown task, by the fields of its first record.

    `choice` where nothing fits, so that reading it says what is missing.
    """
    for line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            fits = (shape for shape, names in FIELDS.items() if set(names) <= set(record))
            return next(fits, "choice")
    return "choice"


def subset(records: Sequence[Record], size: int) -> list[Record]:
    """`size` of the records, in their order, spread evenly over the subjects.

    Records are ranked by subject, then by the SHA-256 of their id; of the ranks every
    n/size-th is taken. So the choice is the same on every machine, does not depend on the
    order of the file, and holds each subject in proportion.
    """
    if size >= len(records):
        return list(records)

    def rank(index: int) -> tuple[str, str]:
        record = records[index]
        return record["subject"], hashlib.sha256(record["id"].encode()).hexdigest()

    ranked = sorted(range(len(records)), key=rank)
    chosen = {ranked[(2 * step + 1) * len(ranked) // (2 * size)] for step in range(size)}
    return [record for index, record in enumerate(records) if index in chosen]


def checked(raw: object, shape: str) -> Record:
    """A record with exactly the fields of its shape. Raises ValueError that says what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    missing = [field for field in FIELDS[shape] if field not in raw]
    if missing:
        raise ValueError(f"without {', '.join(missing)}; it has {', '.join(map(str, raw))}")
    if not isinstance(raw["id"], str | int) or isinstance(raw["id"], bool) or raw["id"] == "":
        raise ValueError("id is neither a text nor an integer")
    record = SHAPES[shape](raw)
    return {"id": str(raw["id"]), **record, "subject": str(raw.get("subject") or "")}


def _choice(raw: Mapping[str, Any]) -> Record:
    choices, answer = raw["choices"], raw["answer"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ALPHABET):
        raise ValueError(f"choices is not a list of 2 to {len(ALPHABET)} texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("one of the choices is not a text, or empty")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(f"answer is {answer!r}, not the index of a choice")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} is outside the {len(choices)} choices (0 is the first)")
    choices = [choice.strip() for choice in choices]
    return {"question": _text(raw, "question"), "choices": choices, "answer": answer}


def _free(raw: Mapping[str, Any]) -> Record:
    solution = _text(raw, "solution") if raw.get("solution") else ""
    question, answer = _text(raw, "question"), _text(raw, "answer")
    return {"question": question, "answer": answer, "solution": solution}


def _reading(raw: Mapping[str, Any]) -> Record:
    answers = raw["answers"]
    if not isinstance(answers, list) or not all(
        isinstance(answer, str) and answer.strip() for answer in answers
    ):
        raise ValueError("answers is not a list of texts (an empty list: it cannot be answered)")
    answers = [answer.strip() for answer in answers]
    return {
        "context": _text(raw, "context"),
        "question": _text(raw, "question"),
        "answers": answers,
    }


def _summary(raw: Mapping[str, Any]) -> Record:
    return {"document": _text(raw, "document"), "summary": _text(raw, "summary")}


SHAPES: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "choice": _choice,
    "free": _free,
    "reading": _reading,
    "summary": _summary,
}


def _text(raw: Mapping[str, Any], field: str) -> str:
    value = raw[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} is not a text, or empty")
    value.encode()  # a lone surrogate, which JSON can write, is no text: a ValueError
    return value.strip()


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return str(error)
