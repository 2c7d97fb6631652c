"""The model card of an output: `base_model` and tags for the hub, and the exact selection."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from taia.errors import SourceError
from taia.plan import Plan

__all__ = ["model_card"]


def model_card(planned: Plan, title: str) -> str:
    """README.md of a spliced checkpoint, in the form that the hub reads."""
    totals = planned.totals
    rows = [_row(kind, row) for kind, row in totals.items()]
    return card(
        title,
        base=planned.base.text,
        tuned=planned.tuned.text,
        selection=str(planned.selection),
        body="\n".join(
            [
                "| kind | tensors | parameters | bytes from base | from tuned | blended |",
                "|---|---:|---:|---:|---:|---:|",
                *rows,
            ]
        ),
    )


def card(title: str, *, base: str | None, tuned: str, selection: str, body: str) -> str:
    """A model card around `body`, which says what was kept."""
    names = [_public_name(text) for text in (base, tuned) if text]
    on_hub = list(filter(None, map(_repository, filter(None, (base, tuned)))))
    front = ["library_name: transformers", "tags: [taia, merge]"]
    if on_hub:
        front = [
            f"base_model: {json.dumps(on_hub)}",  # JSON is YAML
            "base_model_relation: merge",
            *front,
        ]
    first = f"`{names[0]}`" if base else "its base model"
    return (
        "---\n" + "\n".join(front) + "\n---\n\n"
        f"# {title}\n\n"
        f"The part `{selection}` of what fine-tuning changed between {first} and `{names[-1]}`; "
        "every other weight is the base model's. Made with "
        "TAIA's selections of deltas ([arXiv 2405.20192](https://arxiv.org/abs/2405.20192)): "
        "no training, no data.\n\n"
        f"    selection: {selection}\n\n"
        f"{body}\n\n"
        "`taia.json` states the source of every tensor; `taia verify` checks it.\n"
    )


def _row(kind: str, row: Mapping[str, int]) -> str:
    numbers = [row[key] for key in ("tensors", "parameters", "base", "tuned", "blend")]
    return f"| {kind} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


def _public_name(text: str) -> str:
    """A hub id or package as it is; of a path only the last part, the rest is private."""
    is_path = text.startswith(("/", ".", "~")) or Path(text).exists()
    return Path(text).absolute().name if is_path else text


def _repository(text: str) -> str:
    """The hub's id of a model; empty for any other source, which the hub would refuse there."""
    if Path(text).exists():
        return ""
    from taia.remote_hub import HubAddress

    try:
        name = HubAddress.parse(text).repository
    except SourceError:
        return ""
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else ""
