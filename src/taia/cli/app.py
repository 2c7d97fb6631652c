"""The parser of all commands, and what happens when one fails.

Exit codes: 0 done, 1 a check failed, 2 bad input. Whatever is heavy is imported inside the
command that needs it, so that `taia --help` and `taia plan` do not import torch.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from taia.cli import comparing, models, runs
from taia.errors import DependencyError, TaiaError
from taia.stopping import listen

__all__ = ["build_parser", "main"]

COMMANDS = models.COMMANDS | runs.COMMANDS | comparing.COMMANDS
"""Command -> the function that adds its options, and the one that carries it out."""

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "peft", "trl", "accelerate", "datasets"), "train"),
    "lm_eval": "eval",
    **dict.fromkeys(("jinja2", "scipy", "statsmodels"), "report"),
    "ray": "ray",
    "gguf": "gguf",
}
"""The extra that brings each optional package."""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of `taia`, one subparser a command; `options.do` carries the command out.

    With `only` the other commands are known by name and have no options: adding the options of
    all takes longer than a small plan.
    """
    parser = argparse.ArgumentParser(
        prog="taia",
        description="Keep what fine-tuning taught, drop what it broke.",
        epilog="taia COMMAND --help tells the options of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(prog="taia", metavar="COMMAND", required=True)
    for name, (add_options, do) in COMMANDS.items():
        told = (do.__doc__ or "").strip()
        command = commands.add_parser(name, help=told, description=told, allow_abbrev=False)
        if only in (None, name):
            add_options(command)
        command.set_defaults(do=do)
    return parser


def main() -> NoReturn:
    """Run the command line. A TaiaError becomes one message and its exit code."""
    listen()  # so that half-written outputs go
    if len(sys.argv) == 1:
        build_parser().print_help()
        sys.exit(2)
    only = sys.argv[1] if sys.argv[1] in COMMANDS else None
    options = build_parser(only).parse_args()
    try:
        options.do(options)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except TaiaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        print(
            f"error: this needs the package {package}; install it with `pip install "
            f"'taia[{extra}]'`", file=sys.stderr,
        )  # fmt: skip
        sys.exit(DependencyError.exit_code)
    sys.exit(0)
