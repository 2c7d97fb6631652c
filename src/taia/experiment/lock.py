"""The lock of a run: what its recipe resolved to, and which of its stages are done.

A run belongs to one recipe and to the data as they were: anything else is refused, because a
folder with parts of two experiments looks like one. What changes no result is not compared: the
resources that Ray reserves, the axis of a figure, fields that a later version added.

Limits: no names of hosts or users are recorded.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from taia.errors import OutputError, RecipeError
from taia.experiment.cell import Cell
from taia.files import atomic_write, read_json
from taia.receipt import digest_of
from taia.recipe import Recipe

__all__ = [
    "FOLDER_MEND",
    "LOCK",
    "begin",
    "check_folder",
    "finish_stage",
    "forget_after",
    "read_lock",
    "remove",
    "start_anew",
    "write_lock",
]

LOCK = "lock.json"
OWN = (
    "recipe.yaml", LOCK, "train", "overlap.json", "deltas.json", "settings.json", "results",
    "parts", "summary.json", "advice.json", "report.html", "cells", "sweep.json",
)  # fmt: skip
"""Everything that a run writes, in its order; `overwrite` removes these and nothing else."""

PACKAGES = (
    "taia", "torch", "transformers", "peft", "trl", "accelerate", "lm_eval", "safetensors", "numpy",
)  # fmt: skip

FOLDER_MEND = "Give the recipe another name, name another folder, or start over with --overwrite"


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is not empty and not a run."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK).is_file():
        mend = "; it is not a run, so --overwrite does not touch it either" if overwrite else ""
        raise OutputError(f"{out}: exists and is not a run; name another folder{mend}")


def read_lock(out: Path) -> dict[str, Any] | None:
    """The lock of a run or sweep, None where there is none. Raises RecipeError for what is none."""
    path = out / LOCK
    if not path.is_file():
        return None
    lock = read_json(path)
    if not isinstance(lock, dict) or not isinstance(lock.get("recipe"), dict):
        raise RecipeError(f"{path}: is not the lock of a run; use --overwrite")
    return lock


def begin(cell: Cell, inputs: Mapping[str, str], *, overwrite: bool) -> dict[str, Any]:
    """The run's lock: the one that is there, if of the same recipe and inputs, or a new one.

    Writes nothing (`start_anew` does). Raises RecipeError with every difference.
    """
    stated = _stated(cell.recipe)
    lock = None if overwrite else read_lock(cell.out)
    if lock is None:
        return {
            "recipe": stated,
            "report": stated["report"],
            "inputs": dict(inputs),
            "hashes": {},
            "stages": {},
            "versions": _versions(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        }
    if not isinstance(lock.get("stages"), dict):
        raise RecipeError(f"{cell.out / LOCK}: is not the lock of a single run; use --overwrite")
    before = {"recipe": _as_of_today(lock["recipe"]), "inputs": lock.get("inputs")}
    differing = _differences(before, {"recipe": stated, "inputs": dict(inputs)})
    if differing:
        raise RecipeError(
            f"{cell.out}: is a run of another recipe, or of other data. {FOLDER_MEND}", differing
        )
    return lock


def start_anew(out: Path, lock: Mapping[str, Any], text: str) -> None:
    """Remove what a run wrote into `out`, and write its first two files."""
    for name in OWN:
        remove(out / name)
    write_lock(out, lock)
    atomic_write(out / "recipe.yaml", text)


def finish_stage(cell: Cell, lock: dict[str, Any], name: str, facts: Mapping[str, Any]) -> None:
    """Write down that a stage is done."""
    lock["stages"][name] = dict(facts)
    lock["hashes"] = _hashes(cell, lock["inputs"])
    write_lock(cell.out, lock)


def forget_after(cell: Cell, lock: dict[str, Any], product: str) -> None:
    """Remove what comes after `product`: it belongs to an earlier one, if there is anything."""
    for later in OWN[OWN.index(product) + 1 :]:
        remove(cell.out / later)
    lock["stages"].clear()


def write_lock(out: Path, lock: Mapping[str, Any]) -> None:
    """Write RUN/lock.json."""
    atomic_write(out / LOCK, json.dumps(lock, indent=1, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there; of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _stated(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that decide what comes out and what is told of it."""
    shown = recipe.model_dump_json(exclude={"resources": True, "report": {"x"}})
    stated: dict[str, Any] = json.loads(shown)
    return stated


def _as_of_today(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of fields that did not exist when it was stored."""
    with suppress(ValidationError):
        return _stated(Recipe.model_validate(stored))
    return stored


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every field of recipe and inputs that is not what the lock holds."""
    old, new = _flat(dict(before)), _flat(dict(now))
    return [
        f"{name}: {old.get(name)!r} before, {new.get(name)!r} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf
        for field, item in value.items()
        for key, leaf in _flat(item, f"{name}.{field}" if name else field).items()
    }


def _hashes(cell: Cell, inputs: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the data and of the adapter's weights, for the lock and the report."""
    found = {name: value for name, value in inputs.items() if len(value) == 64}
    weights = Path(cell.change) / "adapter_model.safetensors"
    if weights.is_file():
        found["adapter"] = digest_of(weights)
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
