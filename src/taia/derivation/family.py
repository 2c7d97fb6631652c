"""The table of one model type: rows by pattern of names, and what patterns miss.

Integers in names become `*`, tensors of one module share a row. The names of live models
and those of their files are both in it.

A pattern with several addresses is told apart by another integer of the name where that is
enough (`layer.0` of a T5 block is its attention). Else it is ambiguous: it has different
addresses in different layers, and is stored with, for each address, its markers: patterns
that only such layers hold.

A table is JSON:
    prefix     the base model's attribute, which some files leave out of every name
    rows       "kind/projection/tower/at/offset" -> patterns
    split      pattern -> {"at": which integer tells, "rows": {integer: row}}
    ambiguous  pattern -> {row: markers}
    extra      expressions for layers behind the last one, which transformers does not load
    dropped    expressions for other tensors that transformers does not load
    foreign    expression -> row, for a tower that another library computes
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from taia.derivation.disk import disk_rows, stale_rows
from taia.derivation.models import FOREIGN, architectures, build, variants
from taia.derivation.names import INTEGER, pattern
from taia.derivation.walk import Structure, structure
from taia.kind_table import Row

LEAF = re.compile(r"\.(weight|bias)$")

EXTRA_LAYER = re.compile(r"layers\\\.\d+(\\\.)?(\.\*)?$")
"""An expression that takes a whole layer by its number."""

Table = dict[str, Any]


def table_of_type(model_type: str) -> Table:
    """The table of a model type, from all its classes with a text decoder and their variants."""
    return table_of(forms_of(model_type), foreign=FOREIGN.get(model_type))


def forms_of(model_type: str) -> list[Any]:
    """Every class with a text decoder of a model type, and its variants, on the meta device."""
    forms = []
    for architecture in architectures()[model_type]:
        model = build(model_type, architecture)
        forms += [model, *variants(model_type, model, architecture)]
    return forms


def table_of(
    models: Sequence[Any],
    *,
    foreign: str | None = None,
    structures: Sequence[Structure] | None = None,
) -> Table:
    """The table of one family in all its forms, the plain one first.

    foreign: the module of a tower that another library computes.
    structures: those of the models, where they are known already.

    Raises UnclassifiedError for a tensor that no rule fits, and ValueError for a name whose
    address nothing in its layer tells.
    """
    found = structures or [structure(model) for model in models]
    named: list[tuple[str, Row]] = []
    for form, told in zip(models, found, strict=True):
        both = [*told.rows.items(), *disk_rows(form, told.rows)]
        named += [(name, row) for name, row in both if not foreign or row.tower != "vision"]
    rows, split, ambiguous = _merge(named)
    for key, row in stale_rows(found[0].attentions).items():
        if _key(key) not in ambiguous | split and not (foreign and row.tower == "vision"):
            rows.setdefault(_key(key), row)
    by_address = defaultdict(list)
    for key, row in rows.items():
        by_address[text_of(row)].append(key)
    table: Table = {
        "prefix": models[0].base_model_prefix,
        "rows": {address: sorted(keys) for address, keys in sorted(by_address.items())},
    }
    if split:
        table["split"] = split
    if ambiguous:
        table["ambiguous"] = ambiguous
    table.update(_not_loaded(models, rows))
    if foreign:
        leaf = foreign.rpartition(".")[2]
        table["foreign"] = {rf"(^|\.){leaf}\.": text_of(Row("other", None, "vision", None))}
    return table


def text_of(row: Row) -> str:
    """A row as the table writes it: "kind/projection/tower/at/offset"."""
    at = "" if row.at is None else str(row.at)
    return f"{row.kind}/{row.projection or ''}/{row.tower}/{at}/{row.offset or ''}"


def _not_loaded(models: Sequence[Any], rows: dict[str, Row]) -> dict[str, list[str]]:
    """What transformers says it does not load: extra layers, and other names.

    Extra layers (multi-token prediction) are stored behind the last layer under the names
    of a layer, so they must be known before the rows are asked.
    """
    found = defaultdict(list)
    ignored = {
        text
        for model in models
        for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    }
    for text in sorted(ignored):
        if EXTRA_LAYER.search(text):
            found["extra"].append(text)
        elif not any(key.endswith(pattern(text)) for key in rows):
            found["dropped"].append(text)
    return dict(found)


def _key(name: str) -> str:
    """The row key of a tensor name: its module, integers replaced."""
    return pattern(LEAF.sub("", name))


Choices = dict[Row, set[tuple[str, ...]]]
"""The addresses of a pattern, each with the integers of the names that have it."""


def _merge(
    named: list[tuple[str, Row]],
) -> tuple[dict[str, Row], dict[str, Any], dict[str, dict[str, list[str]]]]:
    """Rows by pattern; patterns with several rows, split by an integer or by their markers."""
    found: dict[str, Choices] = defaultdict(lambda: defaultdict(set))
    for name, row in named:
        found[_key(name)][row].add(tuple(INTEGER.findall(name)))
    rows = {key: next(iter(choices)) for key, choices in found.items() if len(choices) == 1}
    where = {key: next(iter(found[key].values())) for key in rows}
    split, ambiguous = {}, {}
    for key, choices in sorted(found.items()):
        if len(choices) > 1:
            told = _split(choices)
            if told is not None:
                split[key] = told
            else:
                ambiguous[key] = {
                    text_of(row): _markers(key, row, choices, where) for row in choices
                }
    return rows, split, ambiguous


def _split(choices: Choices) -> dict[str, Any] | None:
    """The one integer, not that of the layer, that tells these addresses apart."""
    count = len(next(iter(next(iter(choices.values())))))
    for at in range(count):
        if any(row.at == at for row in choices):
            continue
        by_value: dict[str, set[str]] = defaultdict(set)
        for row, places in choices.items():
            for place in places:
                by_value[place[at]].add(text_of(row))
        if all(len(rows) == 1 for rows in by_value.values()):
            rows = {value: min(texts) for value, texts in sorted(by_value.items())}
            return {"at": at, "rows": rows}
    return None


def _markers(
    key: str,
    row: Row,
    choices: dict[Row, set[tuple[str, ...]]],
    where: dict[str, set[tuple[str, ...]]],
) -> list[str]:
    """The patterns of its module that every layer with this row holds, and no other layer."""
    yes = choices[row]
    no = set().union(*(places for other, places in choices.items() if other != row))
    parent = key.rsplit(".", 1)[0] + "."
    fit = [k for k, places in where.items() if yes <= places and not no & places]
    near = sorted(k for k in fit if k.startswith(parent))
    if not near:
        told = ", ".join(text_of(choice) for choice in choices)
        raise ValueError(f"{key} has several addresses and nothing tells them apart: {told}")
    return near
