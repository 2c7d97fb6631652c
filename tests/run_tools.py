"""Runs made of nothing but result files, for what is computed from those."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from taia.evaluation.result import Example, Settings, TaskInfo, Variant, variant_folder

SELECTIONS = {"base": "none", "vanilla": "all", "taia": "attention", "taif": "ffn"}

Answers = Mapping[str, Mapping[str, Sequence[float]]]
"""Variant -> task -> one score an example."""


def source_of(sources: Mapping[str, str] | None, task: str) -> tuple[str, str]:
    """A task's file and its SHA-256; where none is stated, one that is gone."""
    if not sources or task not in sources:
        return "gone.jsonl", "0" * 64
    return sources[task], hashlib.sha256(Path(sources[task]).read_bytes()).hexdigest()


def write_run(
    folder: Path,
    answers: Answers,
    *,
    subjects: Mapping[str, Sequence[str]] | None = None,
    ids: Mapping[str, Sequence[str]] | None = None,
    choices: int = 4,
    metric: str = "acc",
    prompts: str = "",
    sources: Mapping[str, str] | None = None,
    **settings: object,
) -> Path:
    """A complete run; a variant's selection is the preset's, else its own name."""
    tasks = {task: len(values) for task, values in next(iter(answers.values())).items()}
    for name, by_task in answers.items():
        for task, values in by_task.items():
            path = folder / "results" / variant_folder(name) / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            examples = [
                Example(
                    task=task,
                    id=ids[task][at] if ids else f"{task}-{at}",
                    prompt_hash=f"{prompts}{at}",
                    prediction=int(value),
                    target=1,
                    correct=float(value),
                    metric=metric,
                    metrics={metric: float(value)},
                    loglikelihoods=(-1.0,) * choices if choices else (),
                    subject=subjects[task][at] if subjects else "",
                )
                for at, value in enumerate(values)
            ]
            path.write_text("".join(f"{one.to_json()}\n" for one in examples), "utf-8")
    stated: dict[str, object] = {
        "base": "some/base",
        "base_identity": "b",
        "tuned": "train",
        "tuned_form": "adapter",
        "tuned_identity": "t",
        "protocol": "chat",
        "limit": None,
        "seed": 0,
        "dtype": "float32",
        "batch_size": 32,
        "data": "data",
        "tasks": {
            task: TaskInfo(count, metric, *source_of(sources, task))
            for task, count in tasks.items()
        },
        "variants": tuple(
            Variant(name, SELECTIONS.get(name, name), variant_folder(name)) for name in answers
        ),
        "versions": {},
    }
    (folder / "settings.json").write_text(Settings(**(stated | settings)).to_json(), "utf-8")
    return folder


def simulated(
    gains: Mapping[str, float],
    examples: int,
    tasks: int = 2,
    *,
    seed: int = 0,
    accuracy: float = 0.45,
    disagree: float = 0.2,
) -> dict[str, dict[str, np.ndarray]]:
    """Answers of variants that differ from the base on so many examples, and in mean by a gain."""
    random = np.random.default_rng(seed)
    answers: dict[str, dict[str, np.ndarray]] = {name: {} for name in gains}
    for task in range(tasks):
        base = random.random(examples) < accuracy
        for name, gain in gains.items():
            broken, mended = (
                (disagree - gain) / 2 / accuracy,
                (disagree + gain) / 2 / (1 - accuracy),
            )
            turned = random.random(examples) < np.where(base, broken, mended)
            answers[name][f"task{task}"] = (base if name == "base" else base ^ turned).astype(float)
    return answers
