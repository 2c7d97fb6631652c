"""The commands on finished runs: compare, advise."""

from __future__ import annotations

import argparse
from pathlib import Path

from taia.cli.options import Command, add_json, split_list
from taia.cli.printing import print_json

__all__ = ["COMMANDS"]


def compare_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia compare`."""
    parser.add_argument("one", metavar="RUN_A", type=Path, help="the folder of a run")
    parser.add_argument("other", metavar="RUN_B", type=Path, help="another, or the same again")
    parser.add_argument(
        "--variants", metavar="LIST", type=split_list, default=[],
        help="NAME of both runs, or NAME=NAME of the one and the other, separated by commas; "
        "without it every name that both have",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", metavar="LIST", type=split_list, default=[],
        help="tasks of both runs, separated by commas; without it all",
    )  # fmt: skip
    add_json(parser)


def compare(options: argparse.Namespace) -> None:
    """Compare two runs on the same examples: paired differences, task by task and on average."""
    from taia.evaluation.compare import compare_runs

    found = compare_runs(options.one, options.other, options.variants, options.tasks)
    if options.as_json:
        print_json(found.to_json())
        return
    from rich.console import Console

    from taia.report_text import render_comparison

    console = Console()
    for part in render_comparison(found):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def advise_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia advise`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument(
        "--development", metavar="SHARE", type=float, default=0.5,
        help="share of every task's examples that the choice is made on (default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="which examples (default: 0)")
    add_json(parser)


def advise(options: argparse.Namespace) -> None:
    """Say what of a fine-tune to keep, from a run's results, or that one cannot tell."""
    from taia.evaluation.advise import advise as make_advice

    advice = make_advice(options.run, development=options.development, seed=options.seed)
    if options.as_json:
        print_json(advice.to_json())
        return
    from rich.console import Console

    Console().print(advice.paragraph, markup=False, highlight=False)


COMMANDS: dict[str, Command] = {
    "compare": (compare_options, compare),
    "advise": (advise_options, advise),
}
