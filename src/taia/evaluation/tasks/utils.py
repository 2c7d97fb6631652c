"""Multiple-choice records for lm-eval, from a folder of JSON Lines or from the hub.

Every task sees one shape of record, whatever its source:
    {"id": str, "question": str, "choices": [str, ...], "answer": index from 0, "subject"?: str}

lm-eval calls `load` with the task's `dataset_kwargs` and the run's `metadata`; the key
`data` of the latter names the local folder. Files there are FOLDER/eval_TASK.jsonl or
FOLDER/TASK.jsonl. lm-eval loads this file by its path, so everything it needs is here.

Limits: multiple choice only; at most 26 choices; the hub's records are taken as they
are published, and a task takes one split of one configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["from_hub", "letters", "load", "local_file", "read_records"]

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Record = dict[str, Any]


def load(
    record_task: str,
    hub_path: str | None = None,
    hub_name: str | None = None,
    hub_split: str = "test",
    data: str | None = None,
    **_: object,
) -> dict[str, Dataset]:
    """The records of a task as lm-eval wants them: `{"test": Dataset}`.

    `data` is the local folder; without it the hub is read. Further keywords (lm-eval
    passes its own) are ignored. Raises EvaluationError.
    """
    from datasets import Dataset

    if data is not None:
        records = read_records(local_file(record_task, Path(data)))
    elif hub_path is None:
        raise EvaluationError(f"{record_task}: a local task; name its folder with --data DIR")
    else:
        records = _read_hub(record_task, hub_path, hub_name, hub_split)
    return {"test": Dataset.from_list(records)}


def letters(doc: Mapping[str, Any]) -> list[str]:
    """The letters that stand for a record's choices: A, B, C, ..."""
    return list(ALPHABET[: len(doc["choices"])])


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


def read_records(path: Path) -> list[Record]:
    """The records of one JSON Lines file, checked.

    Raises EvaluationError that tells every broken line by its number.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from error
    records: list[Record] = []
    faults: list[str] = []
    first_line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = _checked(json.loads(line))
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: {_reason(error)}")
            continue
        earlier = first_line_of.setdefault(record["id"], number)
        if earlier != number:
            faults.append(f"line {number}: id {record['id']!r} was used on line {earlier}")
        records.append(record)
    if faults:
        raise EvaluationError(
            f"{path}: {len(faults)} of {len(lines)} lines are not multiple-choice records of the "
            'form {"id", "question", "choices": [...], "answer": index from 0}',
            faults,
        )
    if not records:
        raise EvaluationError(f"{path}: no record in it; a task needs at least one")
    return records


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return str(error)


def _checked(raw: object) -> Record:
    """A record with exactly the known fields. Raises ValueError that says what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    missing = [field for field in ("id", "question", "choices", "answer") if field not in raw]
    if missing:
        raise ValueError(f"without {', '.join(missing)}; it has {', '.join(map(str, raw))}")
    question, choices, answer = raw["question"], raw["choices"], raw["answer"]
    if not isinstance(raw["id"], str | int) or isinstance(raw["id"], bool) or raw["id"] == "":
        raise ValueError("id is neither a text nor an integer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("question is not a text, or empty")
    question.encode()  # a lone surrogate, which JSON can write, is no text: a ValueError
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ALPHABET):
        raise ValueError(f"choices is not a list of 2 to {len(ALPHABET)} texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("one of the choices is not a text, or empty")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(f"answer is {answer!r}, not the index of a choice")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer {answer} is outside the {len(choices)} choices (0 is the first)")
    return {
        "id": str(raw["id"]),
        "question": question.strip(),
        "choices": [choice.strip() for choice in choices],
        "answer": answer,
        "subject": str(raw.get("subject") or ""),
    }


def _read_hub(task: str, path: str, name: str | None, split: str) -> list[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the network, the hub and the format fail in many ways
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EvaluationError(
            f"{task}: the data set {path} cannot be had from the hub ({type(error).__name__}: "
            f"{reason}). Check the network, or give a folder of JSON Lines with --data DIR"
        ) from error
    return from_hub(task, rows)


def from_hub(task: str, rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The hub's records of a task in our shape. Raises EvaluationError with row numbers."""
    records: list[Record] = []
    faults: list[str] = []
    for index, row in enumerate(rows):
        try:
            records.append(_checked({"id": f"{task}-{index}", **HUB_SHAPES[task](row)}))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"row {index}: {type(error).__name__}: {error}")
    if faults or not records:
        raise EvaluationError(
            f"{task}: {len(faults)} of {len(faults) + len(records)} records of the hub's data set "
            "do not have the known shape; give a folder of JSON Lines with --data DIR",
            faults,
        )
    return records


def _arc(row: Mapping[str, Any]) -> Record:
    """ARC and CommonsenseQA: labelled choices and the label of the right one."""
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": list(row["choices"]["text"]),
        "answer": list(row["choices"]["label"]).index(row["answerKey"].strip()),
        "subject": row.get("question_concept"),
    }


def _openbookqa(row: Mapping[str, Any]) -> Record:
    return _arc({**row, "question": row["question_stem"]})


def _piqa(row: Mapping[str, Any]) -> Record:
    return {
        "question": row["goal"],
        "choices": [row["sol1"], row["sol2"]],
        "answer": int(row["label"]),
    }


def _mmlu(row: Mapping[str, Any]) -> Record:
    return {
        "question": row["question"],
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
        "subject": row["subject"],
    }


def _logiqa(row: Mapping[str, Any]) -> Record:
    return {
        "question": f"{row['context'].strip()}\n\n{row['question'].strip()}",
        "choices": list(row["options"]),
        "answer": "abcd".index(row["label"].strip()),
    }


def _medqa(row: Mapping[str, Any]) -> Record:
    return {
        "id": row["id"],
        "question": " ".join(text for text in (row["sent1"], row.get("sent2")) if text),
        "choices": [row[f"ending{index}"] for index in range(4)],
        "answer": int(row["label"]),
    }


HUB_SHAPES: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "csqa": _arc,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "mmlu": _mmlu,
    "logiqa": _logiqa,
    "medqa": _medqa,
}
