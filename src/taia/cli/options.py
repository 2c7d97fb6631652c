"""Options that several commands share, so that they are called and told alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = [
    "MODEL",
    "Command",
    "add_json",
    "add_keep",
    "add_models",
    "add_overwrite",
    "split_list",
]

Command = tuple[
    Callable[[argparse.ArgumentParser], None],
    Callable[[argparse.Namespace], None],
]
"""What adds a command's options, and what carries it out (its docstring is the help)."""

MODEL = "a folder, a hub id ORG/NAME, a URL (https, s3), FILE.gguf, or package:NAME"


def add_models(parser: argparse.ArgumentParser) -> None:
    """BASE and TUNED."""
    parser.add_argument("base", metavar="BASE", help=f"the base model: {MODEL}")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the fine-tuned model, or a PEFT adapter's folder"
    )


def add_keep(parser: argparse._ActionsContainer) -> None:
    """--keep SELECTION."""
    parser.add_argument(
        "--keep", metavar="SELECTION", default="attention",
        help="what to keep: a preset (taia, taia-full, taif, vanilla, base) or a selection such "
        "as 'attention + ffn[0:8]*0.3' (default: attention)",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help="print JSON instead of a table"
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def split_list(text: str) -> list[str]:
    """Split at commas outside of brackets: selections may hold commas of their own."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
