"""The commands on models: plan, splice, verify."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

from taia.cli.options import Command, add_json, add_keep, add_models, add_overwrite
from taia.cli.printing import (
    bytes_progress,
    print_explanation,
    print_extraction,
    print_json,
    print_plan,
    print_receipt,
)
from taia.errors import OutputError

__all__ = ["COMMANDS"]


def plan_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia plan`."""
    add_models(parser)
    add_requantize(parser)
    either = parser.add_mutually_exclusive_group()
    add_keep(either)
    either.add_argument(
        "--against", metavar="OUT", help="explain what this checkpoint is made of; reads weights"
    )
    add_json(parser)


def plan(options: argparse.Namespace) -> None:
    """Show what a splice would do. Reads headers only; with an adapter, plans its merge."""
    if options.against is not None:
        return _explain(options)
    from taia.plan import plan as make_plan

    planned = make_plan(options.base, options.tuned, options.keep, requantize=options.requantize)
    if options.as_json:
        print_json(planned.to_json())
    else:
        print_plan(planned)
    planned.refuse_faults()


def _explain(options: argparse.Namespace) -> None:
    from taia.explain import explain

    explained = explain(options.base, options.tuned, options.against)
    if options.as_json:
        print_json(explained.to_json())
    else:
        print_explanation(explained)


def splice_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia splice`."""
    add_models(parser)
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="the folder to write, or the .gguf file"
    )
    add_keep(parser)
    add_requantize(parser)
    parser.add_argument(
        "--merge", action="store_true", help="of an adapter, write a full checkpoint"
    )
    parser.add_argument(
        "--extract",
        metavar="RANK",
        type=rank,
        help="of two checkpoints, write a LoRA adapter of this rank, or of 'full' rank",
    )
    parser.add_argument(
        "--hash", action="store_true", help="store digests, to verify without the sources"
    )
    parser.add_argument(
        "--keep-downloads", action="store_true",
        help="leave what was downloaded of remote models in the cache",
    )  # fmt: skip
    parser.add_argument(
        "--shard-size", metavar="SIZE", help="cut the weights anew, as in 5GB; else as the base's"
    )
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="then upload OUT to the hub, with its model card"
    )
    parser.add_argument("--private", action="store_true", help="a new model on the hub is private")
    add_overwrite(parser)
    add_json(parser)


def splice(options: argparse.Namespace) -> None:
    """Write the model, or the sliced adapter, that keeps a selection of the delta."""
    if options.private and not options.push:
        raise OutputError("--private is for --push: nothing is uploaded without it")
    if options.extract is not None:
        extract(options)
        return
    from taia.splice import splice as carry_out

    if options.push and options.out.suffix == ".gguf":
        raise OutputError(f"{options.out}: --push is for folders; `hf upload` takes a GGUF file")
    if options.push:
        from taia.push import check_push

        check_push(options.push, overwrite=options.overwrite, private=options.private)
    with bytes_progress() as on_progress:
        receipt = carry_out(
            options.base,
            options.tuned,
            options.out,
            options.keep,
            merge=options.merge,
            requantize=options.requantize,
            hash=options.hash or bool(options.push),  # others have no sources
            shard_size=options.shard_size,
            overwrite=options.overwrite,
            keep_downloads=options.keep_downloads,
            on_progress=on_progress,
            on_note=tell_note,
        )
    print_receipt(receipt, options.out, "written", options.as_json)
    if options.push:
        from taia.push import push

        address = push(options.out, options.push, private=options.private)
        print(f"uploaded: {address}", file=sys.stderr if options.as_json else sys.stdout)


def tell_note(note: str) -> None:
    """Print a note beside the output, which may be JSON."""
    from taia.errors import printable

    print(f"note: {printable(note)}", file=sys.stderr)


def rank(text: str) -> int | Literal["full"]:
    """The value of --extract."""
    return "full" if text == "full" else int(text)


def extract(options: argparse.Namespace) -> None:
    """Carry out `taia splice --extract`."""
    from taia.errors import SelectionError
    from taia.extract import extract as carry_out

    if options.merge:
        raise SelectionError("--merge makes a checkpoint of an adapter, --extract the reverse")
    others = [f"--{name.replace('_', '-')}"
              for name in ("requantize", "shard_size", "keep_downloads", "push")
              if getattr(options, name)]  # fmt: skip
    if others:
        raise SelectionError(f"{', '.join(others)}: not for an extracted adapter, a small folder")
    extraction = carry_out(
        options.base,
        options.tuned,
        options.out,
        None if options.extract == "full" else options.extract,
        options.keep,
        overwrite=options.overwrite,
        on_note=tell_note,
    )
    print_extraction(extraction, options.out, options.as_json)


def verify_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia verify`."""
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a folder or .gguf file that taia wrote"
    )
    add_json(parser)


def verify(options: argparse.Namespace) -> None:
    """Check an output against its receipt, byte for byte. Exit code 1 if it differs."""
    from taia.verify import verify as check

    receipt = check(options.out, on_note=tell_note)
    print_receipt(receipt, options.out, "verified", options.as_json)


def add_requantize(parser: argparse.ArgumentParser) -> None:
    """--requantize: of GGUF files."""
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="where two GGUF files have different types, or quantised tensors are blended, "
        "unpack and pack again",
    )


COMMANDS: dict[str, Command] = {
    "plan": (plan_options, plan),
    "splice": (splice_options, splice),
    "verify": (verify_options, verify),
}
