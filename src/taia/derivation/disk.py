"""The names that a model's tensors have in files, where those are not the live names.

transformers 5 writes several families in the layout of their first release and turns
names and shapes round when it loads. This module runs that conversion backwards to list
the names on disk, then forwards, name by name, to find the live tensor behind each: the
disk name has the kind, layer and tower of that tensor. Its projection comes from its own
last parts, because a conversion may split or stack projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from taia.derivation.names import INTEGER, pattern
from taia.derivation.rules import PROJECTIONS, projection_of
from taia.kind_table import Row

FAR = 900001
"""A layer number that no model has."""

Rename = Callable[[str], str]


def disk_rows(model: Any, live: dict[str, Row]) -> Iterator[tuple[str, Row]]:
    """(name on disk, row) of every tensor that a file of this model may hold."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    every = get_model_conversion_mapping(model, add_legacy=False)
    layouts = [every]
    if any(isinstance(rule, PrefixChange) for rule in every):
        layouts.append([rule for rule in every if not isinstance(rule, PrefixChange)])
    for rules in layouts:
        if rules:
            yield from _layout(model, live, rules)


def _layout(model: Any, live: dict[str, Row], rules: list[Any]) -> Iterator[tuple[str, Row]]:
    names = _reverted(model, rules, _few_layers(live))
    rename = _loader(rules)
    pairs = [(name, rename(name)) for name in names]
    by_pattern: dict[tuple[str, Row], tuple[int | None, int]] = {}
    for name, loaded in pairs:
        row = _row_of(loaded, live, model.base_model_prefix)
        if name in live and (row is None or live[name] == row):
            continue
        if row is None:
            continue  # a name that transformers cannot load back is in no file
        key = (INTEGER.sub("*", name), row)
        if key not in by_pattern:
            by_pattern[key] = _layer_of(name, loaded, row, rename)
        at, offset = by_pattern[key]
        yield name, replace(row, at=at, offset=offset, projection=_projection(row, name, loaded))


def _few_layers(live: dict[str, Row]) -> set[str]:
    """The names outside of layers, and those of the first layers that hold all there is.

    The reversal compiles expressions anew for each tensor, and layers repeat each other.
    """
    layers: dict[tuple[str, int | None], list[str]] = {}
    for name, row in live.items():
        number = None if row.at is None else int(INTEGER.findall(name)[row.at])
        layers.setdefault((row.tower, number), []).append(name)
    seen: set[tuple[str, Row]] = set()
    kept: set[str] = set()
    for (_, number), names in layers.items():
        held = {(pattern(name), live[name]) for name in names}
        if number is None or held - seen:
            kept.update(names)
            seen |= held
    return kept


def _reverted(model: Any, rules: list[Any], names: set[str] | None = None) -> list[str]:
    """The names on disk of a model's tensors, or of some, by transformers' own reversal."""
    from transformers.core_model_loading import revert_weight_conversion

    model._weight_conversions = rules
    state = {k: v for k, v in model.state_dict().items() if names is None or k in names}
    try:
        return sorted(revert_weight_conversion(model, state))
    finally:
        del model._weight_conversions


def _loader(rules: list[Any]) -> Rename:
    """What loading makes of a name on disk."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return lambda name: str(rename_source_key(name, renamings, converters)[0])


def _row_of(loaded: str, live: dict[str, Row], prefix: str) -> Row | None:
    for name in (loaded, f"{prefix}.{loaded}", loaded.removeprefix(f"{prefix}.")):
        if name in live:
            return live[name]
    return None


def _layer_of(name: str, loaded: str, row: Row, rename: Rename) -> tuple[int | None, int]:
    """Which integer of the disk name is the layer, and what to add to it.

    Found by asking the loader where a number that no model has ends up.
    """
    if row.at is None:
        return None, 0
    layer = int(INTEGER.findall(loaded)[row.at])
    for at, match in enumerate(INTEGER.finditer(name)):
        probe = f"{name[: match.start()]}{FAR}{name[match.end() :]}"
        numbers = INTEGER.findall(rename(probe))
        if len(numbers) > row.at and abs(int(numbers[row.at]) - FAR) < 100:
            return at, layer - int(match.group())
    raise ValueError(f"{name}: no integer of this name becomes the layer of {loaded}")


def _projection(row: Row, name: str, loaded: str) -> str | None:
    if row.kind not in PROJECTIONS or name.split(".")[-2:] == loaded.split(".")[-2:]:
        return row.projection
    return projection_of(row.kind, name) or row.projection


def stale_rows(attentions: dict[str, Row]) -> dict[str, Row]:
    """Rows for buffers that old files hold in an attention module and that no model loads."""
    found = {}
    for name, row in attentions.items():
        found[f"{name}.bias"] = row
        found[f"{name}.rotary_emb.weight"] = row
    return found
