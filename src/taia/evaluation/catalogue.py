"""Which tasks there are, where their records come from, and the lm-eval task that scores them.

A task of ours is a YAML file in `tasks/`; the user types `arc_easy`, lm-eval knows it as
`taia_arc_easy`. `NAME-small` is a seeded subset of it, a group (`paper`) several tasks.
With a local folder any other FOLDER/eval_NAME.jsonl or FOLDER/NAME.jsonl is a task too,
asked by the shape of its records. Any other name, and `lm_eval:NAME`, is lm-eval's own task.

Limits: lm-eval's own tasks read the data set that their file names, and are asked as lm-eval
asks them; groups of lm-eval are run task by task.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from taia.errors import EvaluationError, nearest
from taia.evaluation.foreign import FOREIGN, foreign_file, load_foreign, name_of, stated_as
from taia.evaluation.protocol import check_protocol
from taia.evaluation.quiet import quiet_lm_eval
from taia.evaluation.records import local_file, read_records, shape_of
from taia.evaluation.tasks import utils

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = [
    "FOLDER",
    "GROUPS",
    "PREFIX",
    "TaskSource",
    "expand_groups",
    "find_tasks",
    "known_tasks",
    "load_task",
]

FOLDER = Path(__file__).parent / "tasks"
"""The YAML files; what `lm_eval --include_path` wants."""

PREFIX = "taia_"
"""What lm-eval's name of a task has before ours, so that it cannot hide lm-eval's own."""

SMALL = "-small"

PAPER = ("math500", "bbh", "csqa", "logiqa", "svamp", "medqa", "mmlu")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "paper": PAPER,
    "paper-small": tuple(f"{name}{SMALL}" for name in PAPER),
}
"""Names that stand for several tasks: the paper's seven, and subsets of them for two cores."""

GENERIC = {
    "choice": FOLDER / "_cloze.yaml",
    "free": FOLDER / "_free.yaml",
    "reading": FOLDER / "_reading.yaml",
    "summary": FOLDER / "_summary.yaml",
}
"""What asks a local file that is no task of ours, by the shape of its records."""

SHOWN = 20
"""How many local files a message names."""

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


@dataclass(frozen=True, slots=True)
class TaskSource:
    """A task that was found.

    `source`: the path of the local file, hub:DATASET[/CONFIG][SPLIT], or lm_eval:NAME.
    `sha256`: that of the local file, else empty. `yaml`: the file that asks it.
    `small`: how many records a subset takes; None takes all.
    """

    name: str
    yaml: Path
    source: str
    sha256: str
    data: str
    small: int | None = None

    @property
    def stated(self) -> str:
        """The name by which `find_tasks` finds this very task."""
        return stated_as(self.name, self.source)


def known_tasks() -> tuple[str, ...]:
    """The names of the tasks that ship with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.yaml")))


def expand_groups(names: Sequence[str]) -> list[str]:
    """The names with every group's own tasks in its place."""
    return [task for name in names for task in GROUPS.get(name, (name,))]


def find_tasks(names: Sequence[str], data: Path | None = None) -> tuple[TaskSource, ...]:
    """The tasks of those names and groups, their local files read and checked.

    `data` is the local folder; None is the hub. Raises EvaluationError with every fault:
    unknown names, missing files, broken records.
    """
    names = expand_groups(names)
    if not names:
        raise EvaluationError(f"no task is named; there are {_offered()}")
    twice = sorted({name for name in names if names.count(name) > 1})
    faults = [f"{name}: named twice" for name in twice]
    found: list[TaskSource] = []
    for name in dict.fromkeys(names):
        try:
            found.append(_find(name, data))
        except EvaluationError as error:
            faults.append(str(error).replace("\n", "\n  "))
    called = [task.name for task in found]
    faults += [
        f"{name}: stands for {' and '.join(task.stated for task in found if task.name == name)}, "
        "whose results would have one name; evaluate them into two folders"
        for name in sorted({name for name in called if called.count(name) > 1})
    ]
    if faults:
        raise EvaluationError("the tasks cannot be run:", faults)
    return tuple(found)


def load_task(task: TaskSource, *, protocol: str = "chat", shots: int = 0) -> Task:
    """lm-eval's task object with its records, as `protocol` asks it after `shots` examples.

    Raises EvaluationError (hub, records, no few-shot examples).
    """
    from lm_eval.tasks import TaskManager

    faults = check_protocol(protocol, shots)
    if faults:
        raise EvaluationError("the task cannot be run:", faults)
    if task.source.startswith(FOREIGN):
        if protocol == "paper":
            raise EvaluationError(
                f"{task.name}: lm-eval's own task, which it asks in its own way; take the protocol "
                "chat or plain"
            )
        with quiet_lm_eval():
            return load_foreign(task.name, task.yaml, shots)
    spec = _asked(task, protocol, shots)
    with quiet_lm_eval():
        metadata = {"data": task.data} if task.data else {}
        manager = TaskManager(include_defaults=False, metadata=metadata)
        loaded: Task = next(iter(manager.load([spec])["tasks"].values()))
    return loaded


def _asked(task: TaskSource, protocol: str, shots: int) -> dict[str, Any]:
    """lm-eval's configuration of a task of ours under a protocol."""
    spec = _read_yaml(task.yaml)
    if protocol == "paper":
        overlay = _read_yaml(FOLDER / spec["metadata"]["paper"])
        metric = overlay.pop("primary_metric", spec["metadata"]["primary_metric"])
        spec |= overlay
        spec["metadata"] = {**spec["metadata"], "primary_metric": metric}
    known = spec.get("dataset_kwargs", {})
    own = {"record_task": _full(task.name), "shots": shots, "small": task.small}
    return spec | {
        "task": f"{PREFIX}{task.name}",
        "num_fewshot": shots,
        "dataset_kwargs": {**known, **own},
    }


def _find(name: str, data: Path | None) -> TaskSource:
    if name.startswith(FOREIGN):
        bare = name.removeprefix(FOREIGN)
        return _find_foreign(bare, f"{name}: lm-eval has no such task, and it is no .yaml file")
    full = _full(name)
    local = data is not None and bool(NAME.match(full)) and _local_names(full, data)
    if full not in known_tasks() and not local:
        if not NAME.match(name) or (data is not None and not data.is_dir()):
            raise EvaluationError(_unknown(name, data))
        return _find_foreign(name, _unknown(name, data))
    path = FOLDER / f"{full}.yaml"
    if full not in known_tasks():
        assert data is not None
        path = GENERIC[shape_of(local_file(full, data))]
    settings = _read_yaml(path)["metadata"]
    small = settings["small_size"] if name != full else None
    if data is None:
        return TaskSource(name, path, _hub_source(path), "", "", small)
    file = local_file(full, data)
    read_records(file, settings["shape"])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return TaskSource(name, path, str(file), digest, str(data), small)


def _find_foreign(name: str, message: str) -> TaskSource:
    path = foreign_file(name)
    if path is None:
        raise EvaluationError(message)
    return TaskSource(name_of(name), path, f"{FOREIGN}{name}", "", "")


def _full(name: str) -> str:
    """The task that a subset is of; any other name as it is."""
    return name.removesuffix(SMALL)


def _local_names(name: str, data: Path) -> bool:
    return any((data / file).is_file() for file in (f"eval_{name}.jsonl", f"{name}.jsonl"))


def _offered() -> str:
    return f"{', '.join(known_tasks())} (each also as NAME{SMALL}) and {', '.join(GROUPS)}"


def _unknown(name: str, data: Path | None) -> str:
    known = [*known_tasks(), *GROUPS]
    message = f"{name}: unknown task{{}}. There are {_offered()}, lm-eval's own tasks"
    if data is None:
        message += ", and with --data DIR any DIR/NAME.jsonl"
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
    """One task file with what it includes; `!function utils.NAME` becomes the function."""

    class Loader(yaml.SafeLoader):
        """Its own class, because constructors are registered on the class."""

    def function(_: Any, node: yaml.ScalarNode) -> Any:
        return getattr(utils, str(node.value).removeprefix("utils."))

    Loader.add_constructor("!function", function)
    content: dict[str, Any] = yaml.load(path.read_text("utf-8"), Loader=Loader)  # noqa: S506
    included = content.pop("include", None)
    return {**_read_yaml(path.parent / included), **content} if included else content
