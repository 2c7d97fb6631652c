"""The kind of a module, from its class, its attribute and what stands above it.

A name proves little: `c_proj` is attention and feed-forward in GPT-2, `gate_proj`
is attention in eight families, Nemotron-H calls every block `mixer`. The class of a
module says what it computes, so these rules look at classes and at the attribute
that a parent gives its child, never at a part of the full name. The family's own
prefix is taken off a class name first (`RecurrentGemmaAttention` is an attention).

A walk goes down from the model (walk.py). The first module that fits a rule opens an
area, and all below it belongs to that area. `RULES` states every rule in words, in the
order in which they are asked; docs/kinds.md prints it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from taia.derivation.names import bare_class

RULES: tuple[tuple[str, str], ...] = (
    (
        "router",
        "A router is a router wherever it stands, inside an attention as well: a class with "
        "Router or TopKGating in its name; inside a Mixture-of-Experts block a class that ends "
        "in Gate, or a linear layer called gate, router, router_gate or classifier; and the "
        "score-correction bias of the experts (`e_score_correction_bias`, `expert_bias`).",
    ),
    (
        "projector",
        "What carries one tower's states into another (projector, connector, merger, resampler, "
        "Q-Former) is `other` as a whole.",
    ),
    (
        "head",
        "The module that transformers calls the output embedding, and masked-language-model heads.",
    ),
    (
        "mixer",
        "A class that names a state-space, recurrent or linear-attention mixer. Where a family "
        "calls every block `mixer`, the class of each block decides, layer by layer.",
    ),
    (
        "attention",
        "A class that ends in Attention, Attn, MLA or MoA, or any module with q, k and v of its "
        "own. All inside belongs to it: `q_norm`, `kv_a_layernorm`, sinks, relative positions, "
        "an indexer, a gate on its output, experts of attention. Cross-attention is attention, "
        "and so is its gate.",
    ),
    (
        "ffn",
        "A class that ends in MLP, FeedForward, FFN, FF, Experts, MoE or MoeBlock, BERT's "
        "Intermediate and Output, T5's Dense*Dense, a bare fc1 or fc2 of a layer. All inside "
        "belongs to it, norms and shared experts with their gates too.",
    ),
    ("embedding", "A class with Embed in its name. A norm inside is a norm."),
    (
        "norm",
        "A class with Norm in its name that stands in none of the areas above. A norm that feeds "
        "both attention and FFN (parallel blocks) is a norm like any other.",
    ),
    (
        "residual",
        "`other`: what a layer adds to or mixes into the residual stream beside its attention "
        "and FFN: AltUp, LAuReL, per-layer inputs, hyper-connections, residual scales and gates, "
        "the linear layer behind a shared block (Zamba).",
    ),
    (
        "learned input",
        "`other`: vectors that a model reads in place of a token, poolers, and linear maps "
        "between embedding and layers.",
    ),
    (
        "other tower",
        "`other`: what a tower that is not text holds besides the parts above: convolutions, "
        "codebooks, scales, query vectors, poolers. A tower computed by another library (timm) "
        "is `other` as a whole.",
    ),
)
"""Name and words of every rule, in the order in which they are asked."""

MIXER = re.compile(
    r"Mamba|Mixer|SSM|Delta|Lightning|LinearAttention|Recurrent|ShortConv|Rglru|LSTM"
)
MIXER_CLASSES = {"RwkvSelfAttention", "xLSTMLayer"}
"""Token mixers whose class says otherwise once the family's prefix is off."""

ATTENTION = re.compile(r"(Attention|Attn|MLA|MoA)$")
FFN = re.compile(
    r"(MLP|Mlp|FeedForward|FFN|LayerFF|Dense(Gated)?ActDense|Experts?|MoE|Moe|MoEBlock|MoeBlock|MoELayer|MLPBlock)$"
)
MOE = re.compile(r"(MoE|Moe|MoEBlock|MoeBlock|MoELayer|MoA)$")
BERT_FFN = re.compile(r"^(Intermediate|Output)$")
ROUTER = re.compile(r"Router|TopKGating|MoeStatics")
CONTAINER = re.compile(r"(DecoderLayer|HybridLayer|Model|ForCausalLM)$")
"""Containers say what one of their children is, not what they are."""
NORM = re.compile(r"Norm")
EMBEDDING = re.compile(r"Embed")
HEAD = re.compile(r"LMHead|LMPrediction|PredictionHead|MLMHead|PredLayer|GeneratorPredictions")
HEAD_NAMES = {"lm_head", "audio_lm_head", "output_projection", "logits_dense"}
BARE_FFN = {"fc1", "fc2"}
ROUTER_NAMES = {"gate", "router", "router_gate", "classifier"}
ROUTER_BIASES = {"e_score_correction_bias", "expert_bias"}
SILENT = re.compile(r"Indexer|Compressor|Scorer|Norm|ShortConv|RelativeLogits")
"""Modules inside an attention or ffn that compute none of its projections."""


LOOSE = (
    ("final_logits_bias", "head"),
    ("attn_gate", "attention"),
    ("mlp_gate", "ffn"),
    ("alpha_cross_attn", "attention"),
    ("alpha_dense", "ffn"),
)
"""Parameters that a layer or model owns itself, by the ending of their name."""

OTHER = re.compile(
    # the residual stream
    r"^(altup\w*|laurel|per_layer_\w+|\w*hyper_connection\w*|\w*_hc|hc_\w+|layer_scalar|\w*residual\w*"
    r"|linear|input_hidden_states_\w+|attention_input|mlp_input|final_input"
    # learned inputs, poolers, maps between embedding and layers
    r"|mask_emb|z_L_init|latents|pooler|\w*embedding_projection|embeddings_project"
    r"|embedding_hidden_mapping_in|self_conditioning|project_(in|out)|(pre|post)_projection)$"
)
"""Attributes of what is neither attention, FFN, norm nor embedding in a language model."""


ATTENTION_PROJECTIONS = {
    "q": "q q_proj q_lin linear_q to_q q_a_proj q_b_proj query query_proj wq Wq project_q "
    "input_linear",
    "k": "k k_proj k_lin linear_k key key_proj wk Wk project_k",
    "v": "v v_proj v_lin linear_v value value_proj wv Wv project_v",
    "kv": "kv_a_proj_with_mqa kv_b_proj kv_proj to_kv",
    "o": "o o_proj out_proj out_lin dense c_proj wo Wo proj output_linear attention_out "
    "o_a_proj o_b_proj linear_out to_out projection projection_layer",
    "qkv": "qkv qkv_proj c_attn query_key_value Wqkv in_proj_weight in_proj",
    "gate": "gate_proj g_proj",
}
FFN_PROJECTIONS = {
    "gate": "gate_proj w1 w_0 wi_0",
    "up": "up_proj w3 v1 fc1 fc_in c_fc dense_h_to_4h lin1 w_1 layer_1 proj_up intermediate "
    "wi wi_1 linear_fc1 linear1 intermediate_dense ffw_layer_1",
    "down": "down_proj w2 fc2 fc_out c_proj dense_4h_to_h lin2 Wo layer_2 w_out output_linear "
    "proj_down output wo linear_fc2 linear2 output_dense ffw_layer_2",
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
    """Where a walk stands: what the modules above say. `stack` is the list of its layer."""

    kind: str | None = None
    tower: str = "language"
    stack: tuple[str, ...] | None = None
    in_layer: bool = False
    moe: bool = False
    silent: bool = False


def kind_of(attribute: str, child: Any, place: Place, head: Any) -> str | None:
    """The kind of all that is in `child`, or None where only its parts can tell."""
    name = bare_class(child)
    if place.kind == "router" or _is_router(attribute, child, name, place):
        return "router"
    if place.kind == "embedding" and NORM.search(name) and not EMBEDDING.search(name):
        return "norm"
    if place.kind is not None or place.tower == "projector":
        return place.kind or "other"
    if child is head or attribute in HEAD_NAMES or (HEAD.search(name) and not _has_layers(child)):
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


def kind_of_parameter(path: tuple[str, ...], leaf: str, place: Place) -> str | None:
    """The kind of a parameter or buffer that a module in `place` owns; None if no rule fits."""
    if leaf in ROUTER_BIASES:
        return "router"
    if place.kind is not None:
        return place.kind
    owned = next((kind for end, kind in LOOSE if leaf.endswith(end)), None)
    if owned is not None:
        return owned
    if place.tower not in ("language", "encoder"):
        return "other"
    return "other" if any(OTHER.search(part) for part in (*path[-2:], leaf)) else None


def projection_of(kind: str | None, name: str) -> str | None:
    """The projection that the last parts of a tensor's name tell, or None."""
    known = PROJECTIONS.get(kind or "")
    if known is None:
        return None
    *path, leaf = name.split(".")
    own = leaf.removesuffix("_bias")
    if own in known and own != "proj":
        return known[own]
    return next((known[part] for part in path[:-3:-1] if part in known), None)


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
