"""The folder of a training run, from its first file to its last.

While training: settings.json, log.jsonl, checkpoints/. At the end the adapter or
model and its tokenizer appear, then train.json, and the checkpoints go. A folder
without train.json is therefore an unfinished run, and can be resumed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from taia.errors import OutputError, RecipeError
from taia.files import atomic_write, read_json, refuse_existing
from taia.training.settings import Settings

__all__ = [
    "CHECKPOINTS",
    "LOG",
    "RECORD",
    "SETTINGS",
    "check",
    "other_data",
    "publish",
    "start",
]

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
RECORD = "train.json"
SETTINGS = "settings.json"
DIGEST = "sha256 of the data"
FISHER = "fisher information"
VALIDATION = "sha256 of the validation data"
REWRITES = "sha256 of the rewritten answers"

COMPLETE = ("trainer_state.json", "scheduler.pt")
"""The Trainer writes the first of them last of all, and the optimizer, in a form that depends on
the devices, before the second; a checkpoint without one of them was cut off."""


def check(out: Path, settings: Settings, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Whether `out` may be written; the record in train.json when the run is done already.

    Raises OutputError for a folder that is not ours to write, RecipeError when
    resuming with other settings. Writes nothing.
    """
    for source in settings.sources:
        if Path(source).expanduser().resolve().is_relative_to(out.resolve()):
            raise OutputError(f"{out}: {source} is in there; a run would overwrite what it reads")
    if not (resume and out.is_dir() and any(out.iterdir())):
        refuse_existing(out, overwrite=overwrite)
        return None
    if not (out / SETTINGS).is_file():
        raise OutputError(
            f"{out}: holds no training run to resume ({SETTINGS} is missing); name another folder"
        )
    differing = settings.differences(read_json(out / SETTINGS))
    if differing:
        raise RecipeError(
            f"{out}: was started with other settings. Resume with the same ones, or start anew "
            "in another folder or with --overwrite",
            differing,
        )
    if (out / RECORD).is_file():
        record: dict[str, Any] = read_json(out / RECORD)
        return record
    return None


def start(
    out: Path,
    settings: Settings,
    digest: str,
    *,
    resume: bool,
    fisher: str | None = None,
    validation: str | None = None,
    rewrites: str | None = None,
) -> Path | None:
    """Make the folder ready; the checkpoint to go on from, if resuming and there is one.

    `digest` is that of the data, `validation` that of the validation data, `rewrites` that of the
    answers that Self-Distill trains on, `fisher` names the Fisher information by its content.
    Raises RecipeError when one was another before.
    """
    before = read_json(out / SETTINGS) if resume and (out / SETTINGS).is_file() else {}
    if before.get(DIGEST, digest) != digest:
        raise other_data(out, settings.data_names)
    if before.get(VALIDATION, validation) != validation:
        raise other_data(out, settings.validation)
    if before.get(FISHER, fisher) != fisher:
        raise RecipeError(
            f"{out}: was started with another Fisher information: the base or "
            f"{settings.fisher_data} has changed since. Start anew in another folder or with "
            "--overwrite"
        )
    if before.get(REWRITES, rewrites) != rewrites:
        raise RecipeError(
            f"{out}: was started with other rewrites; the answers were written again since, "
            "or chosen otherwise. Start anew in another folder or with --overwrite"
        )
    try:
        if not resume and out.exists():
            shutil.rmtree(out)  # empty, or the user asked for it: `check` saw to that
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        own = {DIGEST: digest, FISHER: fisher, VALIDATION: validation, REWRITES: rewrites}
        stored = asdict(settings) | own
        atomic_write(out / SETTINGS, json.dumps(stored, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    return _last_checkpoint(out) if resume else None


def other_data(out: Path, data: str | None) -> RecipeError:
    """The error of a run whose data is not what it was."""
    return RecipeError(
        f"{out}: was started with other data: {data} has changed since. Start anew in "
        "another folder or with --overwrite"
    )


def _last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end; later, broken ones are removed."""
    folders = sorted(
        (out / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    for folder in reversed(folders):
        if all((folder / name).is_file() for name in COMPLETE) and _readable(folder):
            return folder
        shutil.rmtree(folder)
    return None


def publish(out: Path, finished: Path, record: dict[str, Any]) -> None:
    """Move the finished files into `out`, write train.json last, drop the checkpoints."""
    for file in sorted(finished.iterdir()):
        if file.is_dir():  # of a run that died here before: a folder does not replace another
            shutil.rmtree(out / file.name, ignore_errors=True)
        file.replace(out / file.name)
    atomic_write(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(out / CHECKPOINTS)


def _readable(folder: Path) -> bool:
    try:
        json.loads((folder / COMPLETE[0]).read_bytes())
    except ValueError:
        return False
    return True
