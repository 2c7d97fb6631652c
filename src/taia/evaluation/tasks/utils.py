"""What the task files call: records, scores, and prompts that a template cannot say.

lm-eval loads this file by its path and calls `load` with a task's `dataset_kwargs` and the
run's `metadata`; the key `data` of the latter names the local folder of JSON Lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError
from taia.evaluation.answers import UNANSWERABLE, grade_free, grade_math, grade_span, grade_summary
from taia.evaluation.few_shot import bbh_descriptions, ceval_descriptions, worked_examples
from taia.evaluation.hub import read_hub
from taia.evaluation.records import ALPHABET, Record, local_file, read_records, subset

__all__ = [
    "grade_free",
    "grade_math",
    "grade_span",
    "grade_summary",
    "hellaswag_choices",
    "hellaswag_text",
    "letters",
    "load",
    "span",
    "worked_answer",
    "worked_solution",
]

MOST_WORKED = 64
"""How many worked examples are kept where the subject does not matter: the first ones."""


DESCRIPTIONS: dict[str, Callable[[], dict[str, str]]] = {
    "bbh": bbh_descriptions,
    "ceval": ceval_descriptions,
}


def __getattr__(name: str) -> Any:
    """`RecordTask`, the class that the task files name; made when lm-eval asks for it."""
    if name == "RecordTask":
        from taia.evaluation.record_task import record_task

        return record_task()
    raise AttributeError(name)


def load(
    record_task: str,
    shape: str,
    hub_path: str | None = None,
    hub_name: str | None = None,
    hub_split: str = "test",
    hub_worked: str | None = None,
    data: str | None = None,
    small: int | None = None,
    shots: int = 0,
    shots_by_subject: bool = False,
    **_: object,
) -> dict[str, Any]:
    """The records of a task as lm-eval wants them: `{"test": Dataset, "worked": list}`.

    `data` is the local folder; without it the hub is read. `small` takes that many of the
    records. `worked` holds the few-shot examples, where `shots` is not 0. Further keywords
    (lm-eval passes its own) are ignored. Raises EvaluationError.
    """
    from datasets import Dataset

    folder = Path(data) if data is not None else None
    if folder is not None:
        records = read_records(local_file(record_task, folder), shape)
    elif hub_path is None:
        raise EvaluationError(f"{record_task}: a local task; name its folder with --data DIR")
    else:
        records = read_hub(record_task, shape, hub_path, hub_name, hub_split)
    if small is not None:
        records = subset(records, small)
    worked: list[Record] = []
    if shots:
        hub = (hub_path, hub_name, hub_worked) if hub_path and hub_worked else None
        worked = worked_examples(record_task, shape, folder, hub)
        worked = worked if shots_by_subject else worked[:MOST_WORKED]
    described = DESCRIPTIONS.get(record_task, dict)()
    if described:  # the sentence that stands before each question of a subject
        for record in (*records, *worked):
            record["description"] = described.get(record["subject"], "")
    return {"test": Dataset.from_list(records), "worked": worked}


def letters(doc: Mapping[str, Any]) -> list[str]:
    """The letters that stand for a record's choices: A, B, C, ..."""
    return list(ALPHABET[: len(doc["choices"])])


def span(doc: Mapping[str, Any]) -> str:
    """The first gold span of a reading record, or that there is none, as in lm-eval's squadv2."""
    return str(doc["answers"][0]) if doc["answers"] else UNANSWERABLE


def worked_solution(doc: Mapping[str, Any]) -> str:
    """A few-shot answer as it was published: the solution, or the bare answer without one."""
    return str(doc["solution"] or doc["answer"])


def worked_answer(doc: Mapping[str, Any]) -> str:
    """A few-shot answer that reasons and ends as the question asks: The answer is ANSWER."""
    solution = doc["solution"].partition("####")[0].strip()
    if "answer is" in solution.lower().rpartition("\n")[2]:
        return str(solution)
    return f"{solution}\nThe answer is {doc['answer']}.".strip()


def hellaswag_text(doc: Mapping[str, Any]) -> str:
    """lm-eval's prompt: the activity, then the text to be continued, without WikiHow's marks."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    return str(preprocess(f"{doc['subject']}: {doc['question']}"))


def hellaswag_choices(doc: Mapping[str, Any]) -> list[str]:
    """The endings, cleaned as lm-eval does."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    return [str(preprocess(choice)) for choice in doc["choices"]]
