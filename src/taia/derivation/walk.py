"""One descent through a live model: the address of every parameter and buffer.

Projections come from the attribute of the module (or parameter) inside its area. A first
matrix of a feed-forward with twice the rows that its last one reads is fused (`gate_up`),
whatever it is called.

Layers are the elements of a list of modules. Each tower has one stack of layers, the one
with the most parameters of attention, FFN and mixers, and only its layers are numbered:
layer 3 of a tower is one place in the model. Lists beside it under the same parent and of
the same length are parts of the same layers (XLM). Further stacks of a tower (the global
layers of Mllama's vision tower, the gated cross-attention of Idefics) have the kind and the
tower, but no layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from taia.derivation.names import bare_class
from taia.derivation.rules import (
    ATTENTION,
    EMBEDDING,
    MOE,
    PROJECTIONS,
    SILENT,
    Place,
    kind_of,
    kind_of_parameter,
    projection_of,
)
from taia.derivation.towers import PROJECTOR_LOOSE, tower_of
from taia.kind_table import Row

__all__ = ["Structure", "UnclassifiedError", "addresses", "structure"]


class UnclassifiedError(Exception):
    """Tensors that no rule fits."""


@dataclass(frozen=True)
class Structure:
    """What one descent finds.

    rows: every parameter and persistent buffer, tied ones under each name.
    attentions: the attention modules themselves, for the stale buffers that old files hold
        in them.
    """

    rows: dict[str, Row]
    attentions: dict[str, Row]


def structure(model: Any) -> Structure:
    """The addresses that a model's modules give its tensors.

    Raises UnclassifiedError with every name that no rule fits.
    """
    walk = _Walk(model)
    walk.go(model, (), Place())
    state = model.state_dict()
    lost = [name for name in state if walk.found[name][0] is None]
    if lost:
        raise UnclassifiedError(", ".join(lost))
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    numbered = _main_stacks(walk.found, sizes)
    rows = {}
    for name in state:
        kind, projection, place = walk.found[name]
        rows[name] = Row(str(kind), projection, place.tower, _at(place, numbered))
    attentions = {
        name: Row("attention", None, place.tower, _at(place, numbered))
        for name, place in walk.attentions.items()
    }
    return Structure(_fuse(rows, sizes), attentions)


def addresses(model: Any) -> dict[str, Row]:
    """The address of every parameter and persistent buffer: `structure(model).rows`."""
    return structure(model).rows


WEIGHTY = {"attention", "ffn", "mixer", "router"}
"""What makes a list of modules a stack of Transformer layers."""

Stack = tuple[str, tuple[str, ...]]
"""A tower, and the path of a list of layers in it."""

Found = tuple[str | None, str | None, Place]
"""Kind, projection and place of one tensor."""


class _Walk:
    """One descent through a model; `found` fills up on the way."""

    def __init__(self, model: Any) -> None:
        self.found: dict[str, Found] = {}
        self.attentions: dict[str, Place] = {}
        self.lengths: dict[tuple[str, ...], int] = {}
        self.head = _asked(model, "get_output_embeddings")
        self.own = _own(model, _asked(model, "get_input_embeddings"))
        lists = [part for part in model.modules() if type(part).__name__ == "ModuleList"]
        self.depths = {len(part) for part in lists if part and list(part[0].children())}

    def go(self, module: Any, path: tuple[str, ...], place: Place) -> None:
        for leaf in (*module._parameters, *module._buffers):
            name = ".".join((*path, leaf))
            own = place
            if place.kind is None and PROJECTOR_LOOSE.search(leaf):
                own = replace(place, kind="other", tower="projector", stack=None)
            kind = kind_of_parameter(path, leaf, own)
            told = None if own.silent else projection_of(kind, name)
            self.found[name] = (kind, told, own)
        for attribute, child in module._modules.items():
            if child is not None:
                below = self._enter(module, path, attribute, child, place)
                self.go(child, (*path, attribute), below)

    def _enter(
        self, parent: Any, path: tuple[str, ...], attribute: str, child: Any, place: Place
    ) -> Place:
        if place.kind is None and not place.in_layer:
            tower = tower_of(parent, attribute, child, place.tower, self.own)
            place = replace(place, tower=tower)
        if not place.in_layer and attribute.isdigit() and self._is_stack(parent):
            self.lengths[path] = len(parent)
            place = replace(place, stack=path, in_layer=True)
        kind = kind_of(attribute, child, place, self.head)
        moe = place.moe or bool(MOE.search(bare_class(child)))
        silent = place.silent or (kind in PROJECTIONS and bool(SILENT.search(bare_class(child))))
        below = replace(place, kind=kind, moe=moe, silent=silent)
        opened = kind == "attention" and place.kind != "attention"
        if opened or (kind == "attention" and ATTENTION.search(bare_class(child))):
            self.attentions[".".join((*path, attribute))] = below
        return below

    def _is_stack(self, parent: Any) -> bool:
        """A list of layers: of modules with children, or one as long as such a list."""
        if type(parent).__name__ != "ModuleList":
            return False
        first = parent[0]
        if EMBEDDING.search(type(first).__name__):
            return False
        return bool(list(first.children())) or len(parent) in self.depths


def _asked(model: Any, method: str) -> Any:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):  # some models have no such module
        return None
    return found if method == "get_output_embeddings" or _is_embedding(found) else None


def _is_embedding(module: Any) -> bool:
    return "Embedding" in type(module).__name__


def _own(model: Any, embedding: Any) -> frozenset[int]:
    """The ids of the base model and of the modules that hold the token embedding."""
    holders = [m for m in model.modules() if any(part is embedding for part in m.modules())]
    base = getattr(model, model.base_model_prefix or "base_model", None)
    return frozenset(id(module) for module in (base, *(holders if embedding is not None else ())))


def _main_stacks(found: dict[str, Found], sizes: dict[str, int]) -> set[Stack]:
    """The one stack of each tower whose layers are numbered, with its parallel lists."""
    weight: Counter[Stack] = Counter()
    layers: dict[Stack, set[str]] = {}
    for name, size in sizes.items():
        place = found[name][2]
        if place.stack is None or place.tower == "projector":
            continue
        key = (place.tower, place.stack)
        weight[key] += size if found[name][0] in WEIGHTY else 0
        layers.setdefault(key, set()).add(name.split(".")[len(place.stack)])
    chosen = set()
    for tower in {tower for tower, _ in weight}:
        stacks = [key for key in weight if key[0] == tower]
        groups = {
            key: [k for k in stacks if k[1][:-1] == key[1][:-1] and layers[k] == layers[key]]
            for key in stacks
        }
        best = max(stacks, key=lambda key: sum(weight[k] for k in groups[key]))
        if weight[best]:
            chosen.update(groups[best])
    return chosen


def _at(place: Place, numbered: set[Stack]) -> int | None:
    if place.stack is None or (place.tower, place.stack) not in numbered:
        return None
    return sum(part.isdigit() for part in place.stack)


def _fuse(rows: dict[str, Row], sizes: dict[str, int]) -> dict[str, Row]:
    """Call a first matrix `gate_up` where it is twice as large as the last one."""
    areas: dict[str, dict[str, Row]] = {}
    for name, row in rows.items():
        if row.kind == "ffn":
            parts = name.split(".")
            for end in range(1, len(parts)):
                areas.setdefault(".".join(parts[:end]), {})[name] = row
    found = dict(rows)
    for name, row in rows.items():
        if row.kind != "ffn" or row.projection != "down" or not name.endswith("weight"):
            continue
        siblings = areas.get(name.rsplit(".", 2)[0], {})
        if any(r.projection == "gate" for r in siblings.values()):
            continue
        for other, first in siblings.items():
            if first.projection == "up" and sizes.get(other) == 2 * sizes[name]:
                found[other] = replace(first, projection="gate_up")
                bias = other.removesuffix("weight") + "bias"
                if other.endswith(".weight") and bias in found:
                    found[bias] = found[other]
    return found
