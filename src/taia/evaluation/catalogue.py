"""Which tasks there are, where their records come from, and the lm-eval task that scores them.

A task of ours is a YAML file in `tasks/`; the user types `arc_easy`, lm-eval knows it as
`taia_arc_easy`. Any other name stands for FOLDER/eval_NAME.jsonl or FOLDER/NAME.jsonl in
the local data folder, and is scored with the shared cloze prompt.

Limits: multiple choice; lm-eval's own tasks are run with lm-eval, not here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from taia.errors import EvaluationError, nearest
from taia.evaluation.protocol import check_protocol
from taia.evaluation.scoring import quiet_lm_eval
from taia.evaluation.tasks import utils

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["FOLDER", "PREFIX", "TaskSource", "find_tasks", "known_tasks", "load_task"]

FOLDER = Path(__file__).parent / "tasks"
"""The YAML files; what `lm_eval --include_path` wants."""

PREFIX = "taia_"
"""What lm-eval's name of a task has before ours, so that it cannot hide lm-eval's own."""

GENERIC = FOLDER / "_cloze.yaml"
SHOWN = 20
"""How many local files a message names."""

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


@dataclass(frozen=True, slots=True)
class TaskSource:
    """A task that was found. `sha256` is that of the local file; empty for the hub.

    `source` is the path of the file, or hub:DATASET[/CONFIG][SPLIT].
    """

    name: str
    yaml: Path
    source: str
    sha256: str
    data: str


def known_tasks() -> tuple[str, ...]:
    """The names of the tasks that ship with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.yaml")))


def find_tasks(names: Sequence[str], data: Path | None = None) -> tuple[TaskSource, ...]:
    """The tasks of those names, their local files read and checked.

    `data` is the local folder; None is the hub. Raises EvaluationError with every fault:
    unknown names, missing files, broken records.
    """
    if not names:
        raise EvaluationError(f"no task is named; there are {', '.join(known_tasks())}")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    faults = [f"{name}: named twice" for name in twice]
    found: list[TaskSource] = []
    for name in dict.fromkeys(names):
        try:
            found.append(_find(name, data))
        except EvaluationError as error:
            faults.append(str(error).replace("\n", "\n  "))
    if faults:
        raise EvaluationError("the tasks cannot be run:", faults)
    return tuple(found)


def load_task(task: TaskSource, *, protocol: str = "chat", shots: int = 0) -> Task:
    """lm-eval's task object with its records, as `protocol` asks it after `shots` examples.

    Raises EvaluationError (hub, records, no few-shot examples).
    """
    from lm_eval.tasks import TaskManager

    faults = check_protocol(protocol, shots)
    if shots > 0:
        faults.append(f"{task.name}: has no few-shot examples beside those that are scored")
    if faults:
        raise EvaluationError("the task cannot be run:", faults)

    spec: str | dict[str, Any] = str(task.yaml)
    if task.yaml == GENERIC:
        own = {"task": f"{PREFIX}{task.name}", "dataset_kwargs": {"record_task": task.name}}
        spec = _read_yaml(GENERIC) | own
    metadata = {"data": task.data} if task.data else {}
    with quiet_lm_eval():
        manager = TaskManager(include_defaults=False, metadata=metadata)
        loaded: Task = next(iter(manager.load([spec])["tasks"].values()))
    return loaded


def _find(name: str, data: Path | None) -> TaskSource:
    path = FOLDER / f"{name}.yaml"
    known = name in known_tasks()
    if not known and (data is None or not NAME.match(name) or not _local_names(name, data)):
        raise EvaluationError(_unknown(name, data))
    if data is None:
        return TaskSource(name, path, _hub_source(path), "", "")
    file = utils.local_file(name, data)
    utils.read_records(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return TaskSource(name, path if known else GENERIC, str(file), digest, str(data))


def _local_names(name: str, data: Path) -> bool:
    return any((data / file).is_file() for file in (f"eval_{name}.jsonl", f"{name}.jsonl"))


def _unknown(name: str, data: Path | None) -> str:
    known = list(known_tasks())
    message = f"{name}: unknown task{{}}. There are {', '.join(known)}"
    if data is None:
        message += ", and with --data DIR any DIR/NAME.jsonl of multiple-choice records"
    elif data.is_dir():
        local = sorted({path.stem.removeprefix("eval_") for path in data.glob("*.jsonl")})
        shown = ", ".join(local[:SHOWN]) + (", ..." if len(local) > SHOWN else "")
        message += f"; {data} holds {shown or 'no .jsonl file'}"
        known += [one for one in local if one not in known]
    else:
        message += f"; {data}: no such folder"
    return message.format(nearest(name, known))


def _hub_source(path: Path) -> str:
    hub = _read_yaml(path)["dataset_kwargs"]
    config = f"/{hub['hub_name']}" if hub["hub_name"] else ""
    return f"hub:{hub['hub_path']}{config}[{hub['hub_split']}]"


def _read_yaml(path: Path) -> dict[str, Any]:
    """One task file without its includes; `!function utils.NAME` becomes the function."""

    class Loader(yaml.SafeLoader):
        """Its own class, because constructors are registered on the class."""

    def function(_: Any, node: yaml.ScalarNode) -> Any:
        return getattr(utils, str(node.value).removeprefix("utils."))

    Loader.add_constructor("!function", function)
    content: dict[str, Any] = yaml.load(path.read_text("utf-8"), Loader=Loader)  # noqa: S506
    return content
