"""Derive src/taia/kinds.jsonl from the module structure of transformers' models.

    python tools/derive_kinds.py            write the table and docs/kinds.md, print the counts
    python tools/derive_kinds.py --check    compare with the shipped table; 1 if it differs
    python tools/derive_kinds.py --docs     write docs/kinds.md from the shipped table
    python tools/derive_kinds.py llama ...  print the table of a few model types

Every model type with a causal language model or another class with a text decoder is built
on the meta device (no memory, no weights): taia/derivation has the rules and the configs.
Then every name of every live model is looked up in the new table, and its address compared
with the one that the structure gave.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinds_page import page
from shipped import write_or_check

from taia.derivation.family import forms_of, table_of
from taia.derivation.models import FOREIGN, architectures, causal_types
from taia.derivation.walk import structure
from taia.kind_table import Family, read_family
from taia.kinds import Address, Kind, _addresses

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src" / "taia" / "kinds.jsonl"
PAGE = ROOT / "docs" / "kinds.md"

Table = dict[str, Any]


@dataclass
class Derived:
    """What came out: tables, failures, and every name on which table and structure differ."""

    tables: dict[str, Table] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)
    tensors: int = 0
    models: int = 0

    def add(self, model_type: str) -> None:
        """Derive one model type and look every tensor of its models up again."""
        foreign = FOREIGN.get(model_type)
        try:
            forms = forms_of(model_type)
            structures = [structure(form) for form in forms]
            table = table_of(forms, foreign=foreign, structures=structures)
        except Exception as error:  # whatever a foreign constructor raises is a reason
            self.failed[model_type] = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        self.tables[model_type] = table
        family = read_family(table)
        for told in structures:
            self.models += 1
            rows = told.rows
            if foreign is not None:
                rows = {name: row for name, row in rows.items() if row.tower != "vision"}
            self._compare(model_type, family, rows)

    def _compare(self, model_type: str, family: Family, rows: dict[str, Any]) -> None:
        found = _addresses(list(rows), family)
        self.tensors += len(rows)
        for name, row in rows.items():
            if found[name] != address_of(name, row):
                self.disagreements.append(f"{model_type}: {name}")


def address_of(name: str, row: Any) -> Address:
    """What the structure says of one tensor."""
    integers = [int(part) for part in name.split(".") if part.isdecimal()]
    layer = None if row.at is None else integers[row.at] + row.offset
    return Address(Kind(row.kind), layer, row.projection, row.tower)


def derive(types: Iterable[str]) -> Derived:
    """The tables of some model types, checked."""
    derived = Derived()
    for model_type in types:
        derived.add(model_type)
    return derived


def to_lines(tables: dict[str, Table], version: str) -> str:
    """The file: an index, then a table a line; equal tables are stored once."""
    lines: list[str] = []
    models = {}
    for model_type, table in sorted(tables.items()):
        line = json.dumps(table, separators=(",", ":"))
        if line not in lines:
            lines.append(line)
        models[model_type] = lines.index(line) + 1
    index = json.dumps({"transformers": version, "models": models}, separators=(",", ":"))
    return "\n".join([index, *lines]) + "\n"


def count(derived: Derived) -> list[str]:
    """What was derived and what was not, a line each."""
    causal = causal_types()
    classes = [name for names in architectures().values() for name in names]
    done = [t for t in causal if t in derived.tables]
    others = [t for t in architectures() if t not in causal]
    lines = [
        f"causal language models       {len(done)} of {len(causal)} model types",
        "conditional generation       "
        f"{len([t for t in others if t in derived.tables])} of {len(others)} further model types",
        f"classes with a text decoder  {len(classes)}",
        f"models built                 {derived.models}",
        f"tensors compared             {derived.tensors}",
        f"types that failed            {len(derived.failed)}",
        *(f"  {model_type}: {reason}" for model_type, reason in derived.failed.items()),
        "unclassified tensors         "
        f"{sum('UnclassifiedError' in reason for reason in derived.failed.values())}",
        f"table against structure      {len(derived.disagreements)} disagreements",
        *(f"  {text}" for text in derived.disagreements[:20]),
    ]
    rows = sum(len(keys) for t in derived.tables.values() for keys in t["rows"].values())
    other = sum(
        len(keys)
        for t in derived.tables.values()
        for text, keys in t["rows"].items()
        if text.startswith("other/")
    )
    return [*lines, f"rows                         {rows}, {other} of them of kind other"]


def main() -> int:
    """Write, check or print the table."""
    import transformers

    parser = argparse.ArgumentParser(description="Derive src/taia/kinds.jsonl")
    parser.add_argument("types", nargs="*", help="print the tables of these model types only")
    parser.add_argument("--check", action="store_true", help="compare with the shipped table")
    parser.add_argument("--docs", action="store_true", help="write docs/kinds.md and stop")
    options = parser.parse_args()
    if options.docs:
        PAGE.write_text(page(TABLE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    derived = derive(options.types or sorted(architectures()))
    if options.types:
        print(json.dumps(derived.tables, indent=1))
        print("\n".join(f"{t}: {reason}" for t, reason in derived.failed.items()), file=sys.stderr)
        return 1 if derived.failed else 0
    print("\n".join(count(derived)))
    if derived.failed or derived.disagreements:
        return 1
    text = to_lines(derived.tables, transformers.__version__)
    if not options.check:
        PAGE.write_text(page(text), encoding="utf-8")
    return write_or_check(TABLE, text, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
