"""Result files: one line is one example, one file is one task of one variant.

    RUN/settings.json                    what was asked: models, tasks, variants, protocol
    RUN/results/VARIANT/TASK.jsonl       the examples
    RUN/summary.json                     what they add up to (`taia.evaluation.summary`)

A file appears whole or not at all, so a line that does not parse was damaged later, and a
missing file was never computed; either way the same command computes what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from taia.errors import EvaluationError, SelectionError
from taia.evaluation.foreign import stated_as

__all__ = [
    "Example",
    "Results",
    "Settings",
    "TaskInfo",
    "Variant",
    "mending_command",
    "read_examples",
    "read_results",
    "read_settings",
    "variant_folder",
]

PLAIN_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,39}$")
"""Names that are a folder's name as they stand, on every file system."""

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Example:
    """One answered question.

    `prediction` and `target` are indices of choices, or texts where the task is free-form.
    `correct` is the primary metric, whose name is `metric`, from 0 to 1: 0 or 1 where an answer
    is right or wrong, a share where it can be partly right (F1, ROUGE-L); `metrics` holds every
    metric in the same unit. `parsed`: whether an answer could be read; where not, `correct` is
    0. `subject`: the examples that statistics count as one cluster, empty where there are none.
    `loglikelihoods`: one for each choice, natural logarithm, empty for generated answers.
    `prompt_hash`: the first 16 hex digits of the prompt's sha256.
    Files from before `parsed` and `subject` hold multiple choice alone and read with defaults.
    """

    __pydantic_config__ = STRICT

    task: str
    id: str
    prompt_hash: str
    prediction: int | str
    target: int | str
    correct: float
    metric: str
    metrics: dict[str, float]
    loglikelihoods: tuple[float, ...] = ()
    parsed: bool = True
    subject: str = ""

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Example:
        """The example of one line. Raises ValueError (also: an unknown or missing field)."""
        return EXAMPLE.validate_json(line)


@dataclass(frozen=True, slots=True)
class Variant:
    """A named selection under evaluation and the folder of its result files."""

    __pydantic_config__ = STRICT

    name: str
    selection: str
    folder: str


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a task was scored on. `sha256`: of the local file; null where the hub was read."""

    __pydantic_config__ = STRICT

    examples: int
    metric: str
    source: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked of an evaluation; settings.json is this.

    `base_identity` and `tuned_identity` tell whether the files behind the names changed.
    `shots`: worked examples before each question; 0 in files from before there were any.
    `backend`: what computed; empty in files from before it was written down.
    """

    __pydantic_config__ = STRICT

    base: str
    base_identity: str
    tuned: str | None
    tuned_form: str | None
    tuned_identity: str | None
    protocol: str
    limit: int | None
    seed: int
    dtype: str
    batch_size: int | None
    data: str | None
    tasks: dict[str, TaskInfo]
    variants: tuple[Variant, ...]
    versions: dict[str, str]
    shots: int = 0
    backend: str = ""

    def to_json(self) -> str:
        """The text of settings.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


EXAMPLE: TypeAdapter[Example] = TypeAdapter(Example)
SETTINGS: TypeAdapter[Settings] = TypeAdapter(Settings)


@dataclass(frozen=True, slots=True)
class Results:
    """A complete, checked set of result files.

    `examples[variant, task]`: in the order of the task's records, the same ids for every
    variant.
    """

    folder: Path
    settings: Settings
    examples: Mapping[tuple[str, str], tuple[Example, ...]]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants in the order in which they were asked for."""
        return self.settings.variants

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks in the order in which they were asked for."""
        return tuple(self.settings.tasks)

    def correct(self, variant: str, task: str) -> tuple[float, ...]:
        """The primary metric of each example, 0 to 1, in the order that all variants share."""
        return tuple(example.correct for example in self.examples[variant, task])


def variant_folder(name: str) -> str:
    """A folder's name for a variant: plain names as they are, others slugged with a short hash."""
    if PLAIN_NAME.match(name):
        return name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return f"{slug or 'variant'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read_settings(folder: Path) -> Settings:
    """RUN/settings.json. Raises EvaluationError when it is missing or damaged."""
    path = folder / "settings.json"
    try:
        return SETTINGS.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise EvaluationError(
            f"{folder}: no settings.json, so no evaluation was started here. Run "
            f"`taia eval --base BASE --tasks TASKS --out {shlex.quote(str(folder))}`"
        ) from None
    except (OSError, ValidationError) as error:
        raise EvaluationError(
            f"{path}: damaged, so what the result files were made with is not known. "
            "Evaluate again with --overwrite",
            _reasons(error),
        ) from error


def read_examples(path: Path, *, expected: int) -> tuple[Example, ...]:
    """The examples of one file. Raises EvaluationError that names every broken line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from error
    examples: list[Example] = []
    faults: list[str] = []
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            examples.append(Example.from_json(line))
        except ValueError as error:
            faults.append(f"line {number}: {'; '.join(_reasons(error))}")
    if content and not content.endswith(b"\n"):
        faults.append(f"line {len(lines)}: its end is missing, the file was cut")
    if not faults and len(examples) != expected:
        faults.append(f"{len(examples)} examples, where there must be {expected}")
    if len({example.id for example in examples}) != len(examples):
        faults.append("the same example id stands on several lines")
    if faults:
        raise EvaluationError(f"{path}: not a complete result file", faults)
    return tuple(examples)


def read_results(folder: str | Path) -> Results:
    """All result files of a run, checked against its settings and against each other.

    Raises EvaluationError with every fault and the command that mends them.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    examples: dict[tuple[str, str], tuple[Example, ...]] = {}
    faults: list[str] = []
    for task, info in settings.tasks.items():
        for variant in settings.variants:
            path = folder / "results" / variant.folder / f"{task}.jsonl"
            try:
                examples[variant.name, task] = read_examples(path, expected=info.examples)
            except EvaluationError as error:
                faults.append(str(error).replace("\n", "\n  "))
        faults += _unlike(folder, settings, task, examples)
    if faults:
        raise EvaluationError(
            f"{folder}: the results are not complete. This computes what is missing: "
            f"{mending_command(settings, folder)}",
            faults,
        )
    return Results(folder, settings, examples)


def mending_command(settings: Settings, folder: Path) -> str:
    """The `taia eval` command that computes what is missing in `folder`."""
    words = ["taia", "eval", "--base", settings.base]
    if settings.tuned is not None:
        words += [f"--{settings.tuned_form}", settings.tuned]
    texts = [_variant_text(variant) for variant in settings.variants]
    tasks = [stated_as(name, info.source) for name, info in settings.tasks.items()]
    words += ["--variants", ",".join(texts), "--tasks", ",".join(tasks)]
    if settings.data is not None:
        words += ["--data", settings.data]
    if settings.limit is not None:
        words += ["--limit", str(settings.limit)]
    for option, value, usual in (
        ("--protocol", settings.protocol, "chat"),
        ("--dtype", settings.dtype, "bfloat16"),
        ("--seed", settings.seed, 0),
        ("--shots", settings.shots, 0),
        ("--backend", settings.backend or "hf", "hf"),
    ):
        if value != usual:
            words += [option, str(value)]
    return shlex.join([*words, "--out", str(folder)])


def _variant_text(variant: Variant) -> str:
    """How the variant is asked for: by its name where that says it all, else NAME=SELECTION."""
    from taia.evaluation.loracl import LORACL
    from taia.selection import Selection

    if variant.name == variant.selection == LORACL:
        return LORACL
    with contextlib.suppress(SelectionError):
        if str(Selection.parse(variant.name)) == variant.selection:
            return variant.name
    return f"{variant.name}={variant.selection}"


def _unlike(
    folder: Path,
    settings: Settings,
    task: str,
    examples: Mapping[tuple[str, str], tuple[Example, ...]],
) -> Sequence[str]:
    """Variants whose examples of `task` are not the first variant's: a pair needs both."""
    there = [variant for variant in settings.variants if (variant.name, task) in examples]
    if not there:
        return []
    first = examples[there[0].name, task]
    faults = []
    for variant in there[1:]:
        for one, other in zip(first, examples[variant.name, task], strict=False):
            if (one.id, one.prompt_hash, one.target) != (other.id, other.prompt_hash, other.target):
                path = folder / "results" / variant.folder / f"{task}.jsonl"
                faults.append(
                    f"{path}: its example {other.id} is not {there[0].name}'s {one.id} (id, "
                    "prompt and target must agree); remove the file"
                )
                break
    return faults


def _reasons(error: Exception) -> list[str]:
    """What pydantic found, in short, or the error itself."""
    if isinstance(error, ValidationError):
        return [
            f"{'.'.join(map(str, one['loc'])) or 'record'}: {one['msg']}" for one in error.errors()
        ]
    return [str(error)]
