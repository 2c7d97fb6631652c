"""The kind of every tensor of a live model, from the modules that stand above it.

A name proves little: `c_proj` is attention and feed-forward in GPT-2, `gate_proj`
is attention in eight families, Nemotron-H calls every block `mixer`. The class of a
module says what it computes, so these rules look at classes and at the attribute
that a parent gives its child, never at a part of the full name. The family's own
prefix is taken off a class name first (`RecurrentGemmaAttention` is an attention).

A walk goes down from the model. The first module that fits opens an area, and all
below it belongs to that area:
    mixer      a class that names a state-space, recurrent or linear-attention mixer
    attention  a class that ends in Attention or MLA, or a module with q, k and v children
    ffn        a class that ends in MLP, FeedForward, FFN, Experts, MoE, MoeBlock; BERT's
               Intermediate and Output; a bare fc1 or fc2 of a decoder layer
    embedding  a class with Embedding in its name
    head       the module that get_output_embeddings returns; LMHead and Prediction classes
    norm       a class with Norm in its name
Two exceptions reach into areas: a router is a router wherever it stands (a class with
Router or TopKGating; inside a MoE block a class that ends in Gate, or a linear layer
called gate, router or classifier; an expert score bias), and a norm in an embedding
area is a norm. A norm inside an attention, ffn, mixer or head module belongs to that
module, because it was trained with it. The gate of a shared expert chooses nothing, so
it is ffn. A module with an attention somewhere below it is never a norm or an embedding.
What fits no rule is `other`.

Projections: by the attribute of the module (or parameter) inside its area. A first
matrix of a feed-forward with twice the rows that its last one reads is fused
(`gate_up`), whatever it is called.

Towers: a child with Vision, Siglip or CLIP in its class is the vision tower, Audio,
Whisper or Speech the audio tower, Projector the projector; all else is language.

Layer: the index in the outermost list of modules that is as long as a stack of
layers, and not a list of embeddings or heads.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

MIXER = re.compile(
    r"Mamba|Mixer|SSM|Delta|Lightning|LinearAttention|Recurrent|ShortConv|Rglru|LSTM"
)
MIXER_CLASSES = {"RwkvSelfAttention", "xLSTMLayer"}
"""Token mixers whose class says otherwise once the family's prefix is off."""

ATTENTION = re.compile(r"(Attention|Attn|MLA|MoA)$")
FFN = re.compile(r"(MLP|Mlp|FeedForward|FFN|Experts?|MoE|Moe|MoEBlock|MoeBlock|MoELayer|MLPBlock)$")
MOE = re.compile(r"(MoE|Moe|MoEBlock|MoeBlock|MoELayer|MoA)$")
BERT_FFN = re.compile(r"^(Intermediate|Output)$")
ROUTER = re.compile(r"Router|TopKGating|MoeStatics")
CONTAINER = re.compile(r"(DecoderLayer|HybridLayer|Model|ForCausalLM)$")
"""Containers say what one of their children is, not what they are."""
NORM = re.compile(r"Norm")
EMBEDDING = re.compile(r"Embedding")
HEAD = re.compile(r"LMHead|LMPrediction|PredictionHead|MLMHead|PredLayer|GeneratorPredictions")
TOWERS = (
    ("projector", re.compile(r"Projector|Projection$")),
    ("vision", re.compile(r"Vision|Siglip|CLIP|ImageEmbedding")),
    ("audio", re.compile(r"Audio|Whisper(?!Decoder|ForCausal|Positional|Attention)|Speech")),
)
BARE_FFN = {"fc1", "fc2"}
ROUTER_NAMES = {"gate", "router", "classifier"}
ROUTER_BIASES = {"e_score_correction_bias", "expert_bias"}
SILENT = re.compile(r"Indexer|Compressor|Scorer|Norm|ShortConv|RelativeLogits")
"""Modules inside an attention or ffn that compute none of its projections."""


LOOSE = (("final_logits_bias", "head"), ("attn_gate", "attention"), ("mlp_gate", "ffn"))
"""Parameters that a layer or model owns itself, by the ending of their name."""

ATTENTION_PROJECTIONS = {
    "q": "q q_proj q_lin q_a_proj q_b_proj query query_proj wq Wq project_q input_linear",
    "k": "k k_proj k_lin key key_proj wk Wk project_k",
    "v": "v v_proj v_lin value value_proj wv Wv project_v",
    "kv": "kv_a_proj_with_mqa kv_b_proj kv_proj",
    "o": "o o_proj out_proj out_lin dense c_proj wo Wo proj output_linear attention_out "
    "o_a_proj o_b_proj",
    "qkv": "qkv qkv_proj c_attn query_key_value Wqkv in_proj_weight in_proj",
    "gate": "gate_proj g_proj",
}
FFN_PROJECTIONS = {
    "gate": "gate_proj w1 w_0",
    "up": "up_proj w3 v1 fc1 fc_in c_fc dense_h_to_4h lin1 w_1 layer_1 proj_up intermediate",
    "down": "down_proj w2 fc2 fc_out c_proj dense_4h_to_h lin2 Wo layer_2 w_out output_linear "
    "proj_down output",
    "gate_up": "gate_up_proj input_linear Wi proj_up_gate",
}


def _by_leaf(table: dict[str, str]) -> dict[str, str]:
    return {leaf: projection for projection, leaves in table.items() for leaf in leaves.split()}


PROJECTIONS = {
    "attention": _by_leaf(ATTENTION_PROJECTIONS),
    "ffn": _by_leaf(FFN_PROJECTIONS),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a walk stands: what the modules above say. `at` counts integers of the name."""

    kind: str | None = None
    tower: str = "language"
    at: int | None = None
    in_layer: bool = False
    moe: bool = False
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The address of one tensor. `at`: which integer of its name is the layer."""

    kind: str
    projection: str | None
    tower: str
    at: int | None
    offset: int = 0


@cache
def _family_prefixes(module: str) -> tuple[str, ...]:
    names = vars(sys.modules[module])
    stems = {n.removesuffix("PreTrainedModel") for n in names if n.endswith("PreTrainedModel")}
    return tuple(sorted(stems - {""}, key=len, reverse=True))


def bare_class(module: Any) -> str:
    """The class name of a module without the prefix of its family."""
    name: str = type(module).__name__
    if not type(module).__module__.startswith("transformers."):
        return name
    for prefix in _family_prefixes(type(module).__module__):
        if name.startswith(prefix) and name != prefix:
            return name.removeprefix(prefix)
    return name


def addresses(model: Any) -> dict[str, Row]:
    """Every parameter and persistent buffer of a model, tied ones under each name."""
    walk = _Walk(model)
    walk.go(model, (), Place())
    state = model.state_dict()
    rows = {name: walk.rows[name] for name in state}
    return _fuse(rows, {name: tensor.numel() for name, tensor in state.items()})


def attention_modules(model: Any) -> dict[str, Row]:
    """The attention modules themselves, for the stale buffers that old files hold in them."""
    walk = _Walk(model)
    walk.go(model, (), Place())
    return walk.attentions


class _Walk:
    """One descent through a model; `rows` fills up on the way."""

    def __init__(self, model: Any) -> None:
        self.rows: dict[str, Row] = {}
        self.attentions: dict[str, Row] = {}
        self.head = model.get_output_embeddings()
        lists = [part for part in model.modules() if type(part).__name__ == "ModuleList"]
        self.depths = {len(part) for part in lists if part and list(part[0].children())}

    def go(self, module: Any, path: tuple[str, ...], place: Place) -> None:
        own = [*module._parameters, *module._buffers]
        for leaf in own:
            self.rows[".".join((*path, leaf))] = self._row(path, leaf, place)
        for attribute, child in module._modules.items():
            if child is not None:
                below = self._enter(module, path, attribute, child, place)
                self.go(child, (*path, attribute), below)

    def _enter(
        self, parent: Any, path: tuple[str, ...], attribute: str, child: Any, place: Place
    ) -> Place:
        if place.kind is None and not place.in_layer:
            place = replace(place, tower=_tower(child, place.tower))
        if place.at is None and attribute.isdigit() and self._is_stack(parent):
            depth = sum(part.isdigit() for part in path)
            place = replace(place, at=depth, in_layer=True)
        kind = self._kind(attribute, child, place)
        moe = place.moe or bool(MOE.search(bare_class(child)))
        silent = place.silent or (kind in PROJECTIONS and bool(SILENT.search(bare_class(child))))
        below = replace(place, kind=kind, moe=moe, silent=silent)
        opened = kind == "attention" and place.kind != "attention"
        if opened or (kind == "attention" and ATTENTION.search(bare_class(child))):
            name = ".".join((*path, attribute))
            self.attentions[name] = Row("attention", None, below.tower, below.at)
        return below

    def _kind(self, attribute: str, child: Any, place: Place) -> str | None:
        name = bare_class(child)
        if place.kind == "router" or _is_router(attribute, child, name, place):
            return "router"
        if place.kind == "embedding" and NORM.search(name) and not EMBEDDING.search(name):
            return "norm"
        if place.kind is not None or place.tower == "projector":
            return place.kind or "other"
        if child is self.head or HEAD.search(name) or attribute == "lm_head":
            return "head"
        if _is_mixer(child, name):
            return "mixer"
        if ATTENTION.search(name) or _owns_qkv(child):
            return "attention"
        if FFN.search(name) or (place.in_layer and BERT_FFN.search(name)):
            return "ffn"
        if place.in_layer and name == "Sequential" and _all_linear(child):
            return "ffn"
        return _leaf_kind(attribute, name, place, child)

    def _row(self, path: tuple[str, ...], leaf: str, place: Place) -> Row:
        kind = place.kind or next((k for end, k in LOOSE if leaf.endswith(end)), "other")
        if leaf in ROUTER_BIASES:
            kind = "router"
        projection = None if place.silent else _projection(kind, path, leaf)
        return Row(kind, projection, place.tower, place.at)

    def _is_stack(self, parent: Any) -> bool:
        """A list of layers: of modules with children, or one as long as such a list."""
        if type(parent).__name__ != "ModuleList":
            return False
        first = parent[0]
        if EMBEDDING.search(type(first).__name__):
            return False
        return bool(list(first.children())) or len(parent) in self.depths


def _is_mixer(child: Any, name: str) -> bool:
    if CONTAINER.search(name):
        return False
    return type(child).__name__ in MIXER_CLASSES or bool(MIXER.search(name))


def _all_linear(sequential: Any) -> bool:
    weighty = [child for child in sequential if list(child.parameters())]
    return len(weighty) > 1 and all(type(child).__name__ == "Linear" for child in weighty)


def _leaf_kind(attribute: str, name: str, place: Place, child: Any) -> str | None:
    if _has_layers(child):
        return None
    if EMBEDDING.search(name):
        return "embedding"
    if NORM.search(name):
        return "norm"
    if place.in_layer and attribute in BARE_FFN:
        return "ffn"
    return None


def _has_layers(module: Any) -> bool:
    """Phi-4 calls a whole encoder an embedding, DBRX an attention between norms a norm."""
    return any(ATTENTION.search(type(part).__name__) for part in module.modules())


def _tower(child: Any, tower: str) -> str:
    if tower != "language":
        return tower
    name = type(child).__name__
    for found, pattern in TOWERS:
        if pattern.search(name):
            return found
    return tower


def _is_router(attribute: str, child: Any, name: str, place: Place) -> bool:
    if ROUTER.search(name) and "Gated" not in name:
        return True
    if not place.moe:
        return False
    linear = type(child).__name__ == "Linear"
    return name.endswith("Gate") or (linear and attribute in ROUTER_NAMES)


def _owns_qkv(module: Any) -> bool:
    own = {*module._modules, *module._parameters}
    found = {PROJECTIONS["attention"].get(name) for name in own}
    return {"q", "k", "v"} <= found


def _projection(kind: str, path: tuple[str, ...], leaf: str) -> str | None:
    known = PROJECTIONS.get(kind)
    if known is None:
        return None
    own = leaf.removesuffix("_bias")
    if own in known and own != "proj":
        return known[own]
    return next((known[part] for part in path[:-3:-1] if part in known), None)


def _fuse(rows: dict[str, Row], sizes: dict[str, int]) -> dict[str, Row]:
    """Call a first matrix `gate_up` where it is twice as large as the last one."""
    found = dict(rows)
    for name, row in rows.items():
        if row.kind != "ffn" or row.projection != "down" or not name.endswith("weight"):
            continue
        stem = name.rsplit(".", 2)[0] + "."
        siblings = {n: r for n, r in rows.items() if n.startswith(stem) and r.kind == "ffn"}
        if any(r.projection == "gate" for r in siblings.values()):
            continue
        for other, first in siblings.items():
            if first.projection == "up" and sizes.get(other) == 2 * sizes[name]:
                found[other] = replace(first, projection="gate_up")
    return found


def projection_of(kind: str, name: str) -> str | None:
    """The projection that the last parts of a tensor's name tell, or None."""
    *path, leaf = name.split(".")
    return _projection(kind, tuple(path), leaf)
