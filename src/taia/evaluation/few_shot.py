"""Worked examples for few-shot prompts; never one of the records that are scored.

From the local folder a file of their own (fewshot_TASK.jsonl, fewshot_TASK_dev.jsonl) or of
training records (sft_TASK_train.jsonl, sft_TASK.jsonl); from the hub a split of their own;
for MATH and BIG-Bench Hard the published ones that lm-eval ships, wherever the records are.
The prompt takes the first ones in the order in which they stand there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError
from taia.evaluation.hub import read_hub
from taia.evaluation.records import FORMS, Record, read_records

__all__ = ["bbh_descriptions", "ceval_descriptions", "worked_examples"]

FILES = ("fewshot_{}.jsonl", "fewshot_{}_dev.jsonl", "sft_{}_train.jsonl", "sft_{}.jsonl")


def worked_examples(
    task: str, shape: str, folder: Path | None, hub: tuple[str, str | None, str] | None
) -> list[Record]:
    """The worked examples of a task, in their order.

    `folder`: the local data; None reads `hub`, a (path, configuration, split).
    Raises EvaluationError where there are none.
    """
    if task in SHIPPED:
        return SHIPPED[task]()
    names = [name.format(task) for name in FILES]
    if folder is not None:
        for name in names:
            if (folder / name).is_file():
                return read_records(folder / name, shape)
        raise EvaluationError(
            f"{task}: no few-shot examples: none of {', '.join(names)} is in {folder}. Put "
            f"records there that are not scored ({FORMS[shape]}), or ask for 0 shots"
        )
    if hub is None:
        raise EvaluationError(f"{task}: its data set has no few-shot examples; ask for 0 shots")
    return read_hub(task, shape, *hub)


def _math() -> list[Record]:
    """The four of Minerva (arXiv 2206.14858, appendix D.2), which the field uses for MATH."""
    from lm_eval.tasks.minerva_math.utils import list_fewshot_samples

    records = []
    for number, sample in enumerate(list_fewshot_samples()):
        solution, _, last = sample["solution"].partition("\nFinal Answer:")
        answer = last[last.index("$") : last.rindex("$") + 1]
        fields = {"question": sample["problem"], "answer": answer, "solution": solution}
        records.append({"id": f"minerva-{number}", **fields, "subject": ""})
    return records


def _bbh() -> list[Record]:
    """The three of each subtask that BIG-Bench Hard publishes (arXiv 2210.09261)."""
    records = []
    for subject, task in _lm_eval_files("bbh/cot_fewshot").items():
        for number, sample in enumerate(task["fewshot_config"]["samples"]):
            solution = sample["target"].strip()
            answer = solution.rpartition("answer is ")[2].removesuffix(".")
            fields = {"question": sample["input"].strip(), "answer": answer, "solution": solution}
            records.append({"id": f"{subject}-{number}", **fields, "subject": subject})
    return records


SHIPPED: Mapping[str, Callable[[], list[Record]]] = {"math500": _math, "bbh": _bbh}


def bbh_descriptions() -> dict[str, str]:
    """What each subtask of BIG-Bench Hard asks for, by its name."""
    return {key: task["description"] for key, task in _lm_eval_files("bbh/cot_fewshot").items()}


def ceval_descriptions() -> dict[str, str]:
    """The sentence before a question of each of C-Eval's subjects, by its name."""
    return {key: task["description"] for key, task in _lm_eval_files("ceval").items()}


@functools.cache
def _lm_eval_files(folder: str) -> dict[str, dict[str, Any]]:
    """lm-eval's task files of a family, by the name of their data set's configuration."""
    import lm_eval.tasks
    import yaml

    found = {}
    for path in sorted((Path(lm_eval.tasks.__file__).parent / folder).glob("*.yaml")):
        content = yaml.safe_load(path.read_text("utf-8"))
        if "dataset_name" in content and "description" in content:
            found[content["dataset_name"]] = content
    return found
