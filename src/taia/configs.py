"""What the configs of two models say differently, and what an output makes of it.

An output has the tuned model's config.json, or its fields of a GGUF file. Where that computes
otherwise than the base's (another rope_theta, another count of experts a token), weights of the
base run under a setting that they were not trained with. Shapes do not show it, so it is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from taia.checkpoint import Checkpoint

__all__ = ["ADAPTER", "config_notes", "settings_note"]

INERT = re.compile(
    r"_name_or_path|transformers_version|(torch_)?dtype|architectures|auto_map|use_cache"
    r"|_attn_implementation.*|_commit_hash|\w*token_ids?|\w*(dropout|drop|pdrop)|initializer_\w+"
    r"|vocab_size|tie_word_embeddings|quantization_config|id2label|label2id|problem_type"
    r"|output_(attentions|hidden_states|router_logits)|return_dict|\w*_loss_coef|gradient_\w+"
    r"|task_specific_params|pretraining_tp|unsloth_\w+"
)
"""Settings that do not change what a model computes, or that are looked after elsewhere."""

SHOWN = 6
"""Settings that a note lists before it only counts."""


CHECKPOINT = "the output has the tuned model's, and weights of the base will run under it"
ADAPTER = "an adapter has none and runs under the base's, for which the tuned weights were not made"
"""What comes of settings that differ, in an output that is a model and in one that is not."""


def config_notes(base: Checkpoint, tuned: Checkpoint, outcome: str = CHECKPOINT) -> list[str]:
    """A note on the settings that both configs state and that differ; none if none do."""
    return settings_note(
        "config.json of base and tuned differ",
        [(n, f"{old!r:.60}", f"{new!r:.60}")
         for n, old, new in _differences(base.config, tuned.config)],
        outcome,
    )  # fmt: skip


def settings_note(
    what: str, differences: Sequence[tuple[str, str, str]], outcome: str = CHECKPOINT
) -> list[str]:
    """The note on settings (name, of the base, of the tuned model) that differ; none if none do."""
    told = [f"{name} ({old} and {new})" for name, old, new in differences]
    if not told:
        return []
    more = f" and {len(told) - SHOWN} more" if told[SHOWN:] else ""
    return [f"{what} in {', '.join(told[:SHOWN])}{more}; {outcome}"]


def _differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value of the base, value of the tuned model), parts of the model included."""
    for key, old in base.items():
        new = tuned.get(key, old)
        if INERT.fullmatch(key) or old == new:
            continue
        if key.endswith("_config") and isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", old, new
