"""The records of a task from its data set on the Hugging Face hub, in our shapes.

Limits: records are taken as they are published; a task takes one split, of one configuration
or of all of them (`*`, where every subject is a configuration of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from taia.errors import EvaluationError
from taia.evaluation.records import Record, checked

__all__ = ["from_hub", "read_hub"]

Row = Mapping[str, Any]


def read_hub(task: str, shape: str, path: str, name: str | None, split: str) -> list[Record]:
    """The records of one split. `name`: a configuration, None for the only one, `*` for all.

    `path` may be the address of a file of JSON Lines, also one inside an archive
    (zip://FILE::hf://...). Raises EvaluationError.
    """
    import datasets

    try:
        if "://" in path:
            rows: Iterable[Row] = datasets.load_dataset("json", data_files=path, split="train")
        elif name == "*":
            rows = _all_configurations(path, split)
        else:
            rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the network, the hub and the format fail in many ways
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EvaluationError(
            f"{task}: the data set {path} cannot be had from the hub ({type(error).__name__}: "
            f"{reason}). Check the network, or give a folder of JSON Lines with --data DIR"
        ) from error
    return from_hub(task, rows, shape)


def _all_configurations(path: str, split: str) -> list[Row]:
    import datasets

    def rows(name: str) -> Iterator[Row]:
        for row in datasets.load_dataset(path, name, split=split):
            yield {**row, "subject": name}

    return [row for name in datasets.get_dataset_config_names(path) for row in rows(name)]


def from_hub(task: str, rows: Iterable[Row], shape: str = "choice") -> list[Record]:
    """The hub's records of a task in our shape. Raises EvaluationError with row numbers."""
    records: list[Record] = []
    faults: list[str] = []
    for index, row in enumerate(rows):
        try:
            records.append(checked({"id": f"{task}-{index}", **HUB_SHAPES[task](row)}, shape))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"row {index}: {type(error).__name__}: {error}")
    if faults or not records:
        raise EvaluationError(
            f"{task}: {len(faults)} of {len(faults) + len(records)} records of the hub's data set "
            "do not have the known shape; give a folder of JSON Lines with --data DIR",
            faults,
        )
    return records


def _arc(row: Row) -> Record:
    """ARC and CommonsenseQA: labelled choices and the label of the right one."""
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": list(row["choices"]["text"]),
        "answer": list(row["choices"]["label"]).index(row["answerKey"].strip()),
        "subject": row.get("question_concept"),
    }


def _openbookqa(row: Row) -> Record:
    return _arc({**row, "question": row["question_stem"]})


def _piqa(row: Row) -> Record:
    return {
        "question": row["goal"],
        "choices": [row["sol1"], row["sol2"]],
        "answer": int(row["label"]),
    }


def _mmlu(row: Row) -> Record:
    return {
        "question": row["question"],
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
        "subject": row["subject"],
    }


def _ceval(row: Row) -> Record:
    return {
        "id": f"{row['subject']}-{row['id']}",
        "question": row["question"],
        "choices": [row[letter] for letter in "ABCD"],
        "answer": "ABCD".index(row["answer"].strip()),
        "subject": row["subject"],
    }


def _logiqa(row: Row) -> Record:
    return {
        "question": f"{row['context'].strip()}\n\n{row['question'].strip()}",
        "choices": list(row["options"]),
        "answer": "abcd".index(row["label"].strip()),
    }


def _medqa(row: Row) -> Record:
    return {
        "id": row["id"],
        "question": " ".join(text for text in (row["sent1"], row.get("sent2")) if text),
        "choices": [row[f"ending{index}"] for index in range(4)],
        "answer": int(row["label"]),
    }


def _mmedbench(row: Row) -> Record:
    labels = sorted(label for label, text in row["options"].items() if text)
    return {
        "question": row["question"],
        "choices": [row["options"][label] for label in labels],
        "answer": labels.index(row["answer_idx"].strip()),
        "subject": row.get("meta_info"),
    }


def _hellaswag(row: Row) -> Record:
    return {
        "question": f"{row['ctx_a']} {row['ctx_b'].capitalize()}",
        "choices": list(row["endings"]),
        "answer": int(row["label"]),
        "subject": row["activity_label"],
    }


def _pubmedqa(row: Row) -> Record:
    context = "\n".join(row["CONTEXTS"])
    return {
        "question": f"Context: {context}\n\nQuestion: {row['QUESTION']}",
        "choices": ["yes", "no", "maybe"],
        "answer": ["yes", "no", "maybe"].index(row["final_decision"]),
    }


def _math500(row: Row) -> Record:
    return {
        "id": row["unique_id"],
        "question": row["problem"],
        "answer": row["answer"],
        "solution": row["solution"],
        "subject": row["subject"],
    }


def _gsm8k(row: Row) -> Record:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"question": row["question"], "answer": answer, "solution": row["answer"]}


def _svamp(row: Row) -> Record:
    body = row["Body"].strip()
    stop = "" if body.endswith((".", "?", "!", ",")) else "."
    return {
        "id": row["ID"],
        "question": f"{body}{stop} {row['Question'].strip()}",
        "answer": str(row["Answer"]).removesuffix(".0"),
        "subject": row["Type"],
    }


def _bbh(row: Row) -> Record:
    return {"question": row["input"], "answer": row["target"], "subject": row["subject"]}


def _squad2(row: Row) -> Record:
    return {
        "id": row["id"],
        "context": row["context"],
        "question": row["question"],
        "answers": list(dict.fromkeys(row["answers"]["text"])),
        "subject": row["title"],
    }


def _xsum(row: Row) -> Record:
    return {"id": row["id"], "document": row["document"], "summary": row["summary"]}


HUB_SHAPES: dict[str, Callable[[Row], Record]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "bbh": _bbh,
    "ceval": _ceval,
    "csqa": _arc,
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "logiqa": _logiqa,
    "math500": _math500,
    "medqa": _medqa,
    "mmedbench": _mmedbench,
    "mmlu": _mmlu,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "pubmedqa": _pubmedqa,
    "squad2": _squad2,
    "svamp": _svamp,
    "xsum": _xsum,
}
