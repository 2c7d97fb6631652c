"""Tasks that are lm-eval's own, by their name or by the path of a task file.

lm-eval's index of all its tasks takes it a minute; the file of one task is found here by a
search for the line that names it.

Limits: a name that lm-eval only makes up while it loads (members of a `task_list`) is not
found; a group is refused, with the way to name its tasks.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from taia.errors import EvaluationError

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["FOREIGN", "foreign_file", "load_foreign", "name_of", "stated_as"]

FOREIGN = "lm_eval:"
"""What stands before the name of a task of lm-eval's that one of ours would hide."""


def name_of(stated: str) -> str:
    """What a task is called in results: its name without `lm_eval:`, folder and ending."""
    bare = stated.removeprefix(FOREIGN)
    return Path(bare).stem if bare.endswith(".yaml") else bare


def stated_as(name: str, source: str) -> str:
    """The name that finds a task of these results again, whatever else is called the same."""
    return source if source.startswith(FOREIGN) else name


def foreign_file(name: str) -> Path | None:
    """The file of lm-eval's task `name`, or `name` itself where it is the path of one.

    None where lm-eval has no task of that name. Raises EvaluationError for a group.
    """
    if name.endswith(".yaml"):
        return Path(name) if Path(name).is_file() else None
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        return None
    text = re.escape(name)
    line = re.compile(rf"""^["']?(task|group)["']?\s*:\s*["']?{text}["']?\s*$""", re.MULTILINE)
    for path in sorted((Path(found.origin).parent / "tasks").rglob("*.yaml")):
        content = path.read_bytes()
        if name.encode() not in content:
            continue
        match = line.search(content.decode("utf-8", "replace"))
        if match and match[1] == "group":
            raise EvaluationError(
                f"{name}: a group of lm-eval ({path.name} lists its tasks); name the tasks that "
                "are wanted"
            )
        if match:
            return path
    return None


def load_foreign(name: str, path: Path, shots: int) -> Task:
    """lm-eval's task of a file. Raises EvaluationError when it or its data set cannot be had."""
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_defaults=False)
        loaded: Task = next(iter(manager.load([str(path)])["tasks"].values()))
    except Exception as error:  # the network, the hub, the file and its code fail in many ways
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EvaluationError(
            f"{name}: lm-eval cannot load its task ({type(error).__name__}: {reason}). Its data "
            "set comes from the hub; a folder of JSON Lines with --data DIR needs none"
        ) from error
    if shots:
        loaded.set_config("num_fewshot", shots)
    elif loaded.config.num_fewshot:
        loaded.set_config("num_fewshot", 0)
    return loaded
