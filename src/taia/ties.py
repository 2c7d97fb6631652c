"""Whether the tie between embedding and head, as config.json states it, is what is stored.

A loader that is told `tie_word_embeddings` uses the embedding as the head, whatever head is
stored; one that is told otherwise and finds no head fills it with random numbers. Both load
without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taia.checkpoint import Tensor
from taia.compare import Pair, differing
from taia.kinds import Kind, classify_all

__all__ = ["stated_tie", "tie_faults"]

HEADED = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How the names of models end that have a head over the vocabulary."""


def tie_faults(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What contradicts `tie_word_embeddings`; a config that says nothing is not asked.

    Raises KindError for tensors that the table does not know.
    """
    tied, model_type = stated_tie(config), config.get("model_type")
    if tied is None or not isinstance(model_type, str):
        return []
    addresses = classify_all(tensors, model_type, config)
    ends: dict[Kind, list[Tensor]] = {Kind.EMBEDDING: [], Kind.HEAD: []}
    for name, address in addresses.items():
        if address.kind in ends and address.tower == "language" and name.endswith(".weight"):
            ends[address.kind].append(tensors[name])
    if not tied:
        architectures = config.get("architectures")
        headed = isinstance(architectures, list) and any(
            isinstance(name, str) and name.endswith(HEADED) for name in architectures
        )
        if headed and not ends[Kind.HEAD] and ends[Kind.EMBEDDING]:
            return ["config.json says that the head is not tied, and no head is stored"]
        return []
    shapes = [tensor.shape for tensor in ends[Kind.EMBEDDING]]
    return [
        f"{head.name}: config.json ties it to the embedding, and its bytes are others; "
        "loaders would drop it"
        for head in ends[Kind.HEAD]
        if shapes.count(head.shape) == 1
        and _differ(folder, head, ends[Kind.EMBEDDING][shapes.index(head.shape)])
    ]


def stated_tie(config: Mapping[str, Any]) -> bool | None:
    """`tie_word_embeddings`, of the model or of its text part; None where it is not stated."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _differ(folder: Path, head: Tensor, embedding: Tensor) -> bool:
    if head.bytes != embedding.bytes:
        return True
    places = (folder / head.file, head.start, folder / embedding.file, embedding.start)
    return bool(differing([Pair(head.name, *places, head.bytes)]))
