"""docs/kinds.md, made of the rules in taia/derivation and of the shipped table."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from taia.derivation.models import NO_TEXT_DECODER
from taia.derivation.rules import RULES
from taia.derivation.towers import TOWERS

Table = dict[str, Any]

TOP = """\
# Which kind is a tensor?

This page is made by `tools/derive_kinds.py` from the rules and the table that it describes; a test
makes it again. The table holds {types} model types of transformers {version}: every one with a
causal language model or another class with a text decoder.

    python tools/derive_kinds.py --docs

An address has a kind, a layer, a projection and a tower:

    attention.q[0:8]@language       kind attention, projection q, layers 0 to 7, tower language

## Kinds

The class of a module says what it computes, so the rules look at the classes of the modules above
a tensor, never at a part of its name. They are asked in this order, from the outermost module
inwards; the first that fits decides for all that is inside, but for a router, and for a norm in an
embedding. A tensor that no rule fits stops the derivation.

"""

MIDDLE = """
## Towers

"""

REST = """
## Layers

A layer is counted from 0 in its tower. Each tower has one stack of layers, the one with the most
parameters of attention, FFN and mixers; layer 3 of a tower is one place in the model. Further
stacks (the global layers of Mllama's vision tower, the gated cross-attention of Idefics, one of the
two levels of HRM) have their kind and tower but no layer, so that a range of layers never takes two
places for one. Lists of equal length beside each other under one parent are parts of the same
layers (XLM). In an encoder-decoder the encoder is a tower of its own, so `[0:4]@encoder` and
`[0:4]@language` are different layers, and cross-attention stands in the layers of the decoder.

## Names

- A bias, and what a quantiser stores beside a weight (`qweight`, `weight_scale_inv`, `absmax`), has
  the address of the weight. Buffers that old files hold inside an attention are attention.
- The names of a live model and those of its files are both known, with and without the base model's
  prefix. Names on disk come from transformers' own conversion rules, run backwards.
- Tied tensors have one stored name and so one address; `lm_head` is the head where it is stored.
- A block that many layers share (Zamba) is stored once, under the first layer that uses it.
- What transformers drops on load (multi-token prediction, stored as further layers) is `other` and
  has no layer.
- Where a name means different things in different layers, what else the layer holds tells
  (`classify_all`); where another number of the name tells (`layer.0` and `layer.1` of a T5 block),
  that number does.

## Types that are not here

A newer transformers than the table: the type is derived on the spot from the checkpoint's
config.json and kept in `$TAIA_CACHE/kinds` (default `~/.cache/taia/kinds`). The same happens where
a known type has names that the table lacks: parts that it has not seen together, or an option that
no default config sets. Code that comes with weights is never run; such a type is refused, with the
command that would help.

Classes of conditional generation that are left out, since they write no text:

"""

FAMILIES = """
## Families

Names inside a layer of the language tower, those of live models and of files; `*` is a number. The
types of one line have the same table.

| model type | attention | feed-forward | router | mixer | notes |
|---|---|---|---|---|---|
"""


def page(text: str) -> str:
    """The page for a table, as it is in kinds.jsonl."""
    lines = text.rstrip("\n").split("\n")
    index = json.loads(lines[0])
    types = defaultdict(list)
    for model_type, line in index["models"].items():
        types[line].append(model_type)
    told = [TOP.format(types=len(index["models"]), version=index["transformers"])]
    told += [f"{at}. **{name}**: {words}\n" for at, (name, words) in enumerate(RULES, 1)]
    told.append(MIDDLE)
    told += [f"- **{name}**: {words}\n" for name, words in TOWERS]
    told.append(REST)
    told += [f"- `{name}`: {why}\n" for name, why in NO_TEXT_DECODER.items()]
    told.append(FAMILIES)
    for line in sorted(types, key=lambda line: types[line][0]):
        told.append(_line(types[line], json.loads(lines[line])))
    return "".join(told)


def _line(model_types: list[str], table: Table) -> str:
    cells = [_names(table, kind) for kind in ("attention", "ffn", "router", "mixer")]
    return f"| {', '.join(model_types)} | {' | '.join(cells)} | {_notes(table)} |\n"


def _names(table: Table, kind: str) -> str:
    """What the language tower's layers hold of one kind, leaves of a module together."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for text, keys in table["rows"].items():
        found, _, tower, at, _ = text.split("/")
        if found == kind and tower == "language":
            for key in keys:
                if not key.endswith("rotary_emb"):
                    module, _, leaf = _inside(key, at).rpartition(".")
                    leaves[module].add(leaf)
    return ", ".join(f"`{_joined(module, found)}`" for module, found in sorted(leaves.items()))


def _inside(key: str, at: str) -> str:
    """What follows the layer's number."""
    return key.split("*", int(at) + 1)[-1].lstrip(".") if at else key


def _joined(module: str, leaves: set[str]) -> str:
    named = sorted(leaves)
    inner = named[0] if len(named) == 1 else "{" + ",".join(named) + "}"
    return f"{module}.{inner}" if module else inner


def _notes(table: Table) -> str:
    towers = {text.split("/")[2] for text in table["rows"]} - {"language"}
    notes = [f"towers: {', '.join(sorted(towers))}"] if towers else []
    if table.get("ambiguous"):
        notes.append("some names differ by layer")
    if table.get("extra") or table.get("dropped"):
        notes.append("holds tensors that are not loaded")
    if table.get("foreign"):
        notes.append("vision tower of timm, `other` as a whole")
    return "; ".join(notes)
