"""Derive src/taia/kinds.json from the module structure of transformers' models.

    python tools/derive_kinds.py            write the table, print what was done
    python tools/derive_kinds.py --check    compare with the shipped table; 1 if it differs
    python tools/derive_kinds.py llama ...  print the rows of a few model types

Every model type with a causal language model is built from its default config on the
meta device (no memory, no weights); some need a value or two, stated in kind_configs.py.
kind_rules.py gives each parameter and persistent buffer its address from the modules
above it; kind_disk.py adds the names that the same tensors have in files. Then integers
in names become `*`, tensors of one module share a row, and equal tables are stored once.

A pattern that has different addresses in different layers is ambiguous. It is stored
with, for each address, its markers: patterns that only such layers hold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kind_configs import build, model_types, variants
from kind_disk import disk_rows, stale_rows
from kind_rules import Row, addresses

TABLE = Path(__file__).parents[1] / "src" / "taia" / "kinds.json"
INTEGER = re.compile(r"(?<![^.])\d+(?![^.])")
LEAF = re.compile(r"\.(weight|bias)$")

EXTRA_LAYER = re.compile(r"layers\\\.\d+(\\\.)?(\.\*)?$")
"""An expression that takes a whole layer by its number."""

Family = dict[str, Any]


def derive(types: Iterable[str]) -> tuple[dict[str, Family], dict[str, str]]:
    """The table of each model type, and for those that failed the reason."""
    families: dict[str, Family] = {}
    failed: dict[str, str] = {}
    for model_type in types:
        try:
            model = build(model_type)
        except Exception as error:  # whatever a foreign constructor raises is a reason
            failed[model_type] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        families[model_type] = family_of(model, *variants(model_type, model))
    return families, failed


def family_of(model: Any, *others: Any) -> Family:
    """The table of one family: prefix, rows by address, ambiguous patterns, dropped names.

    model, others: the family in its default form, and with options.
    """
    named: list[tuple[str, Row]] = []
    for form in (model, *others):
        live = addresses(form)
        named += [*live.items(), *disk_rows(form, live)]
    rows, ambiguous = _merge(named)
    for key, row in stale_rows(model).items():
        if key not in ambiguous:
            rows.setdefault(pattern(key), row)
    by_address = defaultdict(list)
    for key, row in rows.items():
        by_address[text_of(row)].append(key)
    family: Family = {
        "prefix": model.base_model_prefix,
        "rows": {address: sorted(keys) for address, keys in sorted(by_address.items())},
    }
    if ambiguous:
        family["ambiguous"] = ambiguous
    family.update(_not_loaded(model, rows))
    return family


def _not_loaded(model: Any, rows: dict[str, Row]) -> dict[str, list[str]]:
    """What transformers says it does not load: extra layers, and other names.

    Extra layers (multi-token prediction) are stored behind the last layer under the names
    of a layer, so they must be known before the rows are asked.
    """
    found = defaultdict(list)
    for text in sorted(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []):
        if EXTRA_LAYER.search(text):
            found["extra"].append(text)
        elif not any(key.endswith(INTEGER.sub("*", text)) for key in rows):
            found["dropped"].append(text)
    return dict(found)


def pattern(name: str) -> str:
    """The row key of a tensor name: its module, integers replaced."""
    return INTEGER.sub("*", LEAF.sub("", name))


def text_of(row: Row) -> str:
    """A row as the table writes it: "kind/projection/tower/at/offset"."""
    at = "" if row.at is None else str(row.at)
    return f"{row.kind}/{row.projection or ''}/{row.tower}/{at}/{row.offset or ''}"


def _merge(named: list[tuple[str, Row]]) -> tuple[dict[str, Row], dict[str, dict[str, list[str]]]]:
    """Rows by pattern; patterns with several rows apart, with their markers."""
    found: dict[str, dict[Row, set[tuple[str, ...]]]] = defaultdict(lambda: defaultdict(set))
    for name, row in named:
        found[pattern(name)][row].add(tuple(INTEGER.findall(name)))
    rows = {key: next(iter(choices)) for key, choices in found.items() if len(choices) == 1}
    where = {key: next(iter(found[key].values())) for key in rows}
    ambiguous = {
        key: {text_of(row): _markers(key, row, choices, where) for row in choices}
        for key, choices in sorted(found.items())
        if len(choices) > 1
    }
    return rows, ambiguous


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
        raise ValueError(f"{key} has several addresses and nothing that tells them apart")
    return near


def to_json(families: dict[str, Family], version: str) -> str:
    """The file: equal tables stored once, one row of addresses a line."""
    stored: list[Family] = []
    models = {}
    for model_type, family in sorted(families.items()):
        if family not in stored:
            stored.append(family)
        models[model_type] = stored.index(family)
    table = {"transformers": version, "models": models, "families": stored}
    lines = json.dumps(table, indent=1)
    return re.sub(r'\[\n\s+("[^\]]*?)\n\s+\]', _one_line, lines) + "\n"


def _one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\n\s+", " ", match.group(1)) + "]"


def count(families: dict[str, Family], failed: dict[str, str]) -> None:
    """Print what was derived and what was not."""
    other = {
        (model_type, key)
        for model_type, family in families.items()
        for address, keys in family["rows"].items()
        for key in keys
        if address.startswith("other/")
    }
    print(f"model types done      {len(families)}")
    print(f"model types failed    {len(failed)}")
    for model_type, reason in failed.items():
        print(f"  {model_type}: {reason}")
    rows = sum(len(keys) for f in families.values() for keys in f["rows"].values())
    print(f"rows                  {rows}, {len(other)} of them of kind other")
    for model_type, family in families.items():
        for key, choices in family.get("ambiguous", {}).items():
            print(f"  by layer: {model_type} {key}: {', '.join(choices)}")


def main() -> int:
    """Write, check or print the table."""
    import transformers

    parser = argparse.ArgumentParser(description="Derive src/taia/kinds.json")
    parser.add_argument("types", nargs="*", help="print the rows of these model types only")
    parser.add_argument("--check", action="store_true", help="compare with the shipped table")
    options = parser.parse_args()
    families, failed = derive(options.types or model_types())
    text = to_json(families, transformers.__version__)
    if options.types:
        print(text)
        return 0
    count(families, failed)
    if options.check:
        same = TABLE.read_text(encoding="utf-8") == text
        print("the shipped table is the derived one" if same else "the shipped table differs")
        return 0 if same else 1
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
