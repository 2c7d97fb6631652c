"""Derive src/taia/layouts.json: how transformers renames and stacks what a file holds.

    python tools/derive_layouts.py            write the table, print what was done
    python tools/derive_layouts.py --check    compare with the shipped table; 1 if it differs

transformers loads the files of many families through rules: a pattern of names, what takes
its place, and for stacked experts or fused projections the operations that join or cut the
tensors. The rules that a model is loaded with depend on its class and its parts, so every class
with a text decoder is built on the meta device and asked. A model type has the layout of its
first class, the causal language model where there is one; a class that differs has its own.
Rules of a kind that only transformers can carry out (they count, or depend on what was seen
before) are left out, and names that need them are not aligned.

Many multimodal classes take a language model of any type, by their text_config. They are built
with their default one; the table says where it stands, and the rules of another are its own.

The table also has, of each layout, the attribute of its base model, the modules that stand
outside of it, the expressions for what it does not load, those of the rules that were left out,
and the weights that it ties: output head -> embedding, by live names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shipped import write_or_check

from taia.derivation.models import architectures, build

TABLE = Path(__file__).parents[1] / "src" / "taia" / "layouts.json"
NAMES = {"MergeModulelist": "stack", "Concatenate": "concatenate", "Chunk": "chunk"}
"""The operations that move whole byte ranges; each is told with its dimension."""

Rule = dict[str, Any]
Layout = dict[str, Any]


def derive(types: Iterable[str]) -> tuple[dict[str, dict[str, Layout]], dict[str, str]]:
    """Model type -> class -> layout, the type's first class first; of what failed the reason."""
    found: dict[str, dict[str, Layout]] = {}
    failed: dict[str, str] = {}
    for model_type in types:
        try:
            found[model_type] = {
                name: layout_of(build(model_type, name)) for name in architectures()[model_type]
            }
        except Exception as error:  # whatever a foreign constructor raises is a reason
            failed[model_type] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found, failed


def layout_of(model: Any) -> Layout:
    """The rules in the order in which transformers applies them, and what is tied."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(model)
    plain = {WeightRenaming, PrefixChange}
    return {
        "renamings": [_rule(rule) for rule in rules if type(rule) in plain],
        "converters": [
            _rule(rule) | {"operations": [_operation(op) for op in rule.operations]}
            for rule in rules
            if isinstance(rule, WeightConverter)
        ],
        "left_out": [
            rule.compiled_sources.pattern
            for rule in rules
            if type(rule) not in plain and not isinstance(rule, WeightConverter)
        ],
        "prefix": model.base_model_prefix,
        "outside": _outside(model),
        "text": _text(model),
        "ignored": sorted(model._keys_to_ignore_on_load_unexpected or []),
        "tied": _tied(model),
    }


def _rule(rule: Any) -> Rule:
    found: Rule = {"find": rule.compiled_sources.pattern, "to": list(rule.target_patterns)}
    if rule.scope_prefix is not None:
        scope = f"{rule.scope_prefix}." if rule.scope_prefix else ""
        base = f"{rule.base_model_prefix}." if rule.base_model_prefix else ""
        found["scopes"] = list(dict.fromkeys([base + scope, scope]))
    return found


def _operation(operation: Any) -> str:
    """Its name and dimension ("stack 0"); the bare class name where bytes would be moved."""
    name = type(operation).__name__
    extra = getattr(operation, "num_shards_attribute", None)
    return f"{NAMES[name]} {operation.dim}" if name in NAMES and extra is None else name


def _outside(model: Any) -> list[str]:
    """The modules beside the base model, by the first part of their tensors' live names."""
    return sorted(
        {name.partition(".")[0] for name in model.state_dict()} - {model.base_model_prefix}
    )


def _text(model: Any) -> list[str] | None:
    """Where a language model of any type stands, and the type of the one that is there."""
    from transformers import AutoConfig, PreTrainedModel

    config = model.config
    if getattr(type(config), "sub_configs", {}).get("text_config") is not AutoConfig:
        return None
    for name, part in model.named_modules():
        if name and isinstance(part, PreTrainedModel) and part.config is config.text_config:
            return [name.removeprefix(f"{model.base_model_prefix}."), part.config.model_type]
    return None


def _tied(model: Any) -> dict[str, str]:
    """Live name of the head's weight -> live name of the embedding's, whether tied or not.

    Nothing for a family that ties other weights as well: one setting unties all of them.
    """
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except NotImplementedError:  # several language models in one, none of which is the model's
        return {}
    names = {module: name for name, module in model.named_modules()}
    if head not in names or embedding not in names:
        return {}
    pair = {f"{names[head]}.weight": f"{names[embedding]}.weight"}
    return pair if model._tied_weights_keys == pair else {}


def to_json(found: dict[str, dict[str, Layout]], version: str) -> str:
    """The file: equal layouts stored once, and only those classes that differ from their type."""
    stored: list[Layout] = []
    models: dict[str, int] = {}
    classes: dict[str, dict[str, int]] = {}
    for model_type, layouts in sorted(found.items()):
        for name, layout in layouts.items():
            if layout not in stored:
                stored.append(layout)
            index = stored.index(layout)
            if models.setdefault(model_type, index) != index:
                classes.setdefault(model_type, {})[name] = index
    lines = [json.dumps(layout, sort_keys=True) for layout in stored]
    table = {"transformers": version, "models": models, "classes": classes}
    head = json.dumps(table, indent=1)[:-2]
    return f'{head},\n "layouts": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def main() -> int:
    """Write or check the table."""
    import transformers

    parser = argparse.ArgumentParser(description="Derive src/taia/layouts.json")
    parser.add_argument("--check", action="store_true", help="compare with the shipped table")
    options = parser.parse_args()
    found, failed = derive(sorted(architectures()))
    text = to_json(found, transformers.__version__)
    layouts = [layout for classes in found.values() for layout in classes.values()]
    rules = sum(len(layout["renamings"]) + len(layout["converters"]) for layout in layouts)
    print(f"model types done      {len(found)}, {len(layouts)} classes with {rules} rules")
    print(f"model types failed    {len(failed)}: {', '.join(sorted(failed))}")
    return write_or_check(TABLE, text, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
