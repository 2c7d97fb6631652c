"""Derive src/taia/fused.json: how each family shares out the rows of its fused projections.

    python tools/derive_fused.py            write the table, print what was done
    python tools/derive_fused.py --check    compare with the shipped table; 1 if it differs
    python tools/derive_fused.py phi3 ...   print the rules of a few model types

For every fused tensor of kinds.jsonl (qkv, kv, gate_up) a small model is built and
fused_laws.py tells the part of each row. The rule of taia.fused that gives the same parts is
the family's, if it does so for every variant of VARIANTS that the family has. A tensor that
no rule explains, or that cannot be run, is not in the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_laws import attention_rows, feed_forward_rows
from shipped import write_or_check
from small_models import small

from taia.derivation.models import causal_types
from taia.fused import RULES, cut_rule
from taia.kind_table import family, known_types
from taia.kinds import Address, classify_all
from taia.selection import PARTS

TABLE = Path(__file__).parents[1] / "src" / "taia" / "fused.json"

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_attention_heads": 8, "num_key_value_heads": 2, "num_kv_heads": 2},
    {"new_decoder_architecture": True, "num_kv_heads": 2, "num_attention_heads": 4},
    {"new_decoder_architecture": False, "multi_query": True},
    {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
)
"""Numbers and switches that decide how rows are shared out."""

Found = dict[str, dict[str, str]]


def derive(types: Iterable[str]) -> tuple[Found, dict[str, str]]:
    """Model type -> leaf and dimensions -> rule; and the reasons for what is left out."""
    found: Found = {}
    left: dict[str, str] = {}
    for model_type in types:
        rules: dict[str, set[str]] = {}
        for changes in VARIANTS:
            try:
                model = small(model_type, **changes).double()
            except Exception as error:  # whatever a foreign constructor raises is a reason
                if not changes:
                    left[model_type] = _told(error)
                continue
            if changes and not any(hasattr(model.config, name) for name in changes):
                continue
            for name, address in _fused(model, model_type).items():
                key = f"{_leaf(name)}/{model.get_parameter(name).dim()}"
                try:
                    fit = rules_of(model, name, address, model_type)
                except Exception as error:
                    left[f"{model_type} {name}"] = _told(error)
                    fit = set()
                rules[key] = rules.get(key, fit) & fit
        chosen = {key: _simplest(fit) for key, fit in rules.items() if fit}
        left |= {f"{model_type} {key}": "no rule fits" for key, fit in rules.items()
                 if not fit and not any(k.startswith(f"{model_type} ") for k in left)}  # fmt: skip
        if chosen:
            found[model_type] = chosen
    return found, left


def fused_types() -> list[str]:
    """The model types that have a fused projection, by the table of kinds."""
    causal = causal_types()
    return [
        model_type
        for model_type, line in sorted(known_types().items())
        if model_type in causal
        and any(row.projection in PARTS for row in family(line).rows.values())
    ]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _fused(model: Any, model_type: str) -> dict[str, Address]:
    """The first of each kind of fused weights, biases of modules left out: they go with them."""
    addresses = classify_all(model.state_dict(), model_type)
    first: dict[tuple[str, int, str], str] = {}
    for name, address in addresses.items():
        if address.projection in PARTS and not name.endswith(".bias"):
            try:
                dimensions = model.get_parameter(name).dim()
            except AttributeError:  # a buffer
                continue
            first.setdefault((_leaf(name), dimensions, address.tower), name)
    return {name: addresses[name] for name in first.values()}


def rules_of(model: Any, name: str, address: Address, model_type: str) -> set[str]:
    """Every rule and axis whose parts are those that the forward pass tells."""
    shape = tuple(model.get_parameter(name).shape)
    config = model.config.to_dict()
    fit = set()
    for axis in range(len(shape)):
        cuts = {
            rule: cut
            for rule in RULES
            if (cut := cut_rule(f"{rule} {axis}", shape, address, config)) is not None
        }
        if not cuts:
            continue
        told = rows_of(model, name, address, model_type, axis)
        for rule, cut in cuts.items():
            parts = [part for start, stop, part in cut.spans() for _ in range(start, stop)]
            if parts == told:
                fit.add(f"{rule} {axis}")
    return fit


def rows_of(model: Any, name: str, address: Address, model_type: str, axis: int) -> list[str]:
    """The part of each row along an axis, by what the row does."""
    if address.kind == "ffn":
        return feed_forward_rows(model, name, axis)
    addresses = classify_all(model.state_dict(), model_type)
    same = (address.layer, address.tower)
    output = next(
        other.rpartition(".")[0]
        for other, place in addresses.items()
        if place.projection == "o" and (place.layer, place.tower) == same
    )
    if address.projection == "kv" or model.get_parameter(name).dim() != 2:
        raise ValueError("no law for it")
    return attention_rows(model, name, output, axis)


def _simplest(fit: set[str]) -> str:
    return min(fit, key=lambda rule: RULES.index(rule.split()[0]))


def to_json(found: Found, version: str) -> str:
    """The file, one model type a line."""
    rows = ",\n".join(f"  {json.dumps(m)}: {json.dumps(r, sort_keys=True)}"
                      for m, r in sorted(found.items()))  # fmt: skip
    return f'{{\n "transformers": {json.dumps(version)},\n "models": {{\n{rows}\n }}\n}}\n'


def main() -> int:
    """Write, check or print the table."""
    import transformers

    parser = argparse.ArgumentParser(description="Derive src/taia/fused.json")
    parser.add_argument("types", nargs="*", help="print the rules of these model types only")
    parser.add_argument("--check", action="store_true", help="compare with the shipped table")
    options = parser.parse_args()
    found, left = derive(options.types or fused_types())
    text = to_json(found, transformers.__version__)
    for name, reason in left.items():
        print(f"  left out: {name}: {reason}")
    print(f"{len(found)} model types, {sum(map(len, found.values()))} fused tensors")
    if options.types:
        print(text)
        return 0
    return write_or_check(TABLE, text, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
