"""Embeddings and output heads of two checkpoints, and what only one of the two stores.

A tied head is stored once, as the embedding. When one of two checkpoints ties and the other
does not, the head of the first one is its embedding: it is read as a view of the same bytes, and
the output stores both. So `tie_word_embeddings` in its config follows from what is stored.

transformers does not load everything that a file may hold: buffers that a model computes
itself, and layers behind the last one (multi-token prediction). Such a tensor may stand in
one checkpoint alone. The base's survive; the tuned model's have no base, and are left out.
Both are told, as notes. Any other tensor that only one of the two has is a fault.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from taia.checkpoint import Checkpoint, Tensor
from taia.errors import KindError
from taia.kinds import Address, Kind, classify, is_extra_layer
from taia.layouts import Family, family_of, place_of
from taia.ties import stated_tie

__all__ = ["TIE", "is_buffer", "left_over", "text_config", "tie_setting", "unsettled", "untie"]

TIE = "tie_word_embeddings"

BUFFERS = (
    (re.compile(r"(^|\.)rotary_emb\.(\w+_)?inv_freq$"), 1),
    (re.compile(r"(^|\.)rotary_emb\.(cos|sin)_cached$"), None),
    (re.compile(r"(^|\.)\w*(attn|attention)\.bias$"), 4),
    (re.compile(r"(^|\.)\w*(attn|attention)\.masked_bias$"), 0),
    (re.compile(r"(^|\.)position_ids$"), 2),
)  # fmt: skip
"""Buffers that old releases stored and that models compute: name, dimensions (None: any).

The causal mask has the name of a bias; its four dimensions tell it from one.
"""

BUFFER_ENDS = ("inv_freq", "_cached", "bias", "position_ids")
"""How their names end; of the 90,000 names of a large model hardly one does."""

DEPTHS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers",
          "num_layers")  # fmt: skip
"""Where configs state the layers of the language tower; a decoder's own number comes first."""

NAMED_AT_ONCE = 4
"""Names that a note lists before it only counts."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def untie(
    base: Checkpoint, tuned: Checkpoint
) -> tuple[Checkpoint, Checkpoint, list[str], list[str]]:
    """Both checkpoints with a stored head, if one of them has it; a note if one was added.

    The last list holds a fault where the config of the other says that its head is not tied:
    then it was saved without its head, and what its head was is not known.
    """
    family = family_of(base.model_type, base.config)
    for head, embedding in family.tied:
        found = [_stored(checkpoint, family, head) for checkpoint in (base, tuned)]
        if (found[0] is None) == (found[1] is None):
            continue
        name = next(tensor.name for tensor in found if tensor is not None)
        bare = base if found[0] is None else tuned
        source = _stored(bare, family, embedding)
        if source is None:
            continue
        added = _with_head(bare, source, name)
        base, tuned = (added, tuned) if bare is base else (base, added)
        side = "base" if found[0] is None else "tuned model"
        if _is_untied(bare.config):
            return base, tuned, [], [
                f"{name}: the {side} stores no head, and its config.json says that it is not tied "
                "to the embedding; save it as the whole model, or give "
                f'"{TIE}": true if it is tied'
            ]  # fmt: skip
        note = f"{name}: tied in the {side}, whose head is read from {source.name}; stored here"
        return base, tuned, [note], []
    return base, tuned, [], []


def _is_untied(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its head has weights of its own, and nowhere the contrary."""
    stated = [part.get(TIE) for part in (config, text_config(config))]
    return False in stated and True not in stated


def _stored(checkpoint: Checkpoint, family: Family, live: str) -> Tensor | None:
    """The stored tensor that is loaded whole into a live one."""
    direct = checkpoint.tensors.get(live)
    if direct is not None:
        return direct
    key, leaf = family.key(live), live.rpartition(".")[2]
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(leaf) and "layers" not in name:
            place = place_of(name, family)
            if place.lives == (key,) and not place.operations:
                return tensor
    return None


def _with_head(checkpoint: Checkpoint, embedding: Tensor, name: str) -> Checkpoint:
    """The checkpoint with a head that is a view of its embedding, behind it."""
    tensors: dict[str, Tensor] = {}
    for stored, tensor in checkpoint.tensors.items():
        tensors[stored] = tensor
        if stored == embedding.name:
            tensors[name] = dataclasses.replace(embedding, name=name)
    return dataclasses.replace(checkpoint, tensors=tensors)


def tie_setting(tuned: Checkpoint, *, untied: bool) -> dict[str, Any]:
    """What must change in the tuned model's config, so that it says what the output stores.

    untied: the output stores a head, and it may differ from the embedding.
    """
    config = tuned.config
    if not untied or not family_of(tuned.model_type, config).tied:
        return {}
    text = config.get("text_config")
    change: dict[str, Any] = {}
    if config.get(TIE) is not False:
        change[TIE] = False
    if isinstance(text, dict) and text.get(TIE) is not False:
        change["text_config"] = {**text, TIE: False}
    return change


def unsettled(
    base: Checkpoint,
    tuned: Checkpoint,
    addresses: Mapping[str, Address],
    wanted: Mapping[str, float | None],
) -> list[str]:
    """The fault of a head that is untied under a config that ties it, and maybe more besides.

    Of such a family it is not known what `tie_word_embeddings: false` would untie as well.
    """
    if not stated_tie(tuned.config) or family_of(tuned.model_type, tuned.config).tied:
        return []
    ends: dict[Kind, list[str]] = {Kind.EMBEDDING: [], Kind.HEAD: []}
    for name, address in addresses.items():
        if address.kind in ends and address.tower == "language" and name in tuned.tensors:
            ends[address.kind].append(name)
    shapes = [tuned.tensors[name].shape for name in ends[Kind.EMBEDDING]]
    heads = [name for name in ends[Kind.HEAD] if tuned.tensors[name].shape in shapes]
    strengths = {wanted[name] for name in [*heads, *ends[Kind.EMBEDDING]]}
    if strengths == {1} or (strengths == {0} and stated_tie(base.config) is not False):
        return []
    return [
        f"{name}: config.json of {tuned.text} ties it to the embedding, and what else it ties is "
        f"not known for {tuned.model_type}; take both from it: '+ embedding + head'"
        for name in heads
    ]


def left_over(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, list[str], list[str]]:
    """The tuned checkpoint without what the base lacks, notes, and faults.

    A note stands for tensors that transformers does not load, a fault for any other.
    """
    only_base = [name for name in base.tensors if name not in tuned.tensors]
    only_tuned = [name for name in tuned.tensors if name not in base.tensors]
    if not only_base and not only_tuned:
        return tuned, [], []
    family, notes, faults = family_of(base.model_type, base.config), [], []
    for checkpoint, names, what in (
        (base, only_base, "only in the base, kept from it"),
        (tuned, only_tuned, "only in the tuned model, left out"),
    ):
        silent = _not_loaded(checkpoint, names, family)
        if silent:
            listed = ", ".join(silent[:NAMED_AT_ONCE])
            more = f" and {len(silent) - NAMED_AT_ONCE:,} more" if silent[NAMED_AT_ONCE:] else ""
            notes.append(f"{listed}{more}: {what}; transformers does not load such tensors")
        side = "in the base, not in the tuned model"
        if checkpoint is tuned:
            side = "in the tuned model, not in the base"
        faults += [f"{name}: {side}" for name in names if name not in set(silent)]
    if only_tuned:
        kept = {name: tensor for name, tensor in tuned.tensors.items() if name in base.tensors}
        tuned = dataclasses.replace(tuned, tensors=kept)
    return tuned, notes, faults


def _not_loaded(checkpoint: Checkpoint, names: list[str], family: Family) -> list[str]:
    """Those of `names` that transformers passes over when it loads the checkpoint."""
    config = text_config(checkpoint.config)
    depth = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), None)
    found = []
    for name in names:
        if is_buffer(checkpoint.tensors[name]):
            found.append(name)
            continue
        try:
            further = is_extra_layer(name, checkpoint.model_type, checkpoint.config)
            address = classify(name, checkpoint.model_type, checkpoint.config)
        except KindError:  # nothing is known about it, so it is not passed over
            continue
        if further or _is_extra(name, address, family, depth):
            found.append(name)
    return found


def is_buffer(tensor: Tensor) -> bool:
    """Whether a tensor is one that every model computes by itself, a mask or an angle."""
    return tensor.name.endswith(BUFFER_ENDS) and any(
        pattern.search(tensor.name) and dimensions in (None, len(tensor.shape))
        for pattern, dimensions in BUFFERS
    )


def _is_extra(name: str, address: Address, family: Family, depth: int | None) -> bool:
    """Whether a tensor is in a layer behind the last one, or is ignored by its family."""
    layer = address.layer if address.tower == "language" else None
    if layer is not None and depth is not None and layer >= depth:
        return True
    unplaced = address.kind is Kind.OTHER and address.layer is None
    return unplaced and any(pattern.search(name) for pattern in family.ignored)
