"""Class names without the prefix of their family, and integers in tensor names."""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

from taia.kind_table import EXPERT

INTEGER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A whole part of a dotted name that is a number: a layer, an expert."""


def pattern(name: str) -> str:
    """A tensor name with `*` in place of its integers."""
    return EXPERT.sub(r"\1*", INTEGER.sub("*", name))


def bare_class(module: Any, *, shortest: bool = False) -> str:
    """The class name of a module without the prefix of its family.

    shortest: take off the shortest prefix (`SiglipVisionModel` is a `VisionModel`), not
        the longest (a `Model`).
    """
    name: str = type(module).__name__
    if not type(module).__module__.startswith("transformers."):
        return name
    prefixes = _family_prefixes(type(module).__module__)
    for prefix in reversed(prefixes) if shortest else prefixes:
        if name.startswith(prefix) and name != prefix:
            return name.removeprefix(prefix)
    return name


@cache
def _family_prefixes(module: str) -> tuple[str, ...]:
    names = vars(sys.modules[module])
    stems = {n.removesuffix("PreTrainedModel") for n in names if n.endswith("PreTrainedModel")}
    return tuple(sorted(stems - {""}, key=len, reverse=True))
