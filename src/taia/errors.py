"""What can go wrong, and how it is told.

    TaiaError                   bad input; exit code 2
    |-- SelectionError          a selection that does not parse, or names what is not there
    |-- KindError               a model type or tensor name that the table does not know
    |-- SourceError             a base, tuned model or adapter that cannot be found or opened
    |-- CheckpointError         a file that is not what its format says
    |-- MismatchError           two inputs that do not belong together
    |-- OutputError             a destination that cannot be written
    |-- DataError               a training or evaluation file with a broken record
    |-- RecipeError             a recipe or an option that states nothing runnable
    |-- EvaluationError         an unknown task, an incomplete result folder
    |-- ClusterError            a Ray cluster that does not answer, or cannot do what is asked
    |-- DependencyError         a package that an optional feature needs is not installed
    `-- VerificationError       a checkpoint that is not what its receipt says; exit code 1

A message says what is wrong, where, and how to mend it. Several faults of one
input are told together, one a line, so that the user mends them in one go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = [
    "CheckpointError",
    "ClusterError",
    "DataError",
    "DependencyError",
    "EvaluationError",
    "KindError",
    "MismatchError",
    "OutputError",
    "RecipeError",
    "SelectionError",
    "SourceError",
    "TaiaError",
    "VerificationError",
    "nearest",
    "printable",
]

FAULTS_SHOWN = 20
"""How many faults a message lists before it only counts the rest; a failed check lists all."""


FAULT_LENGTH = 2_000
"""Characters of a fault that a message shows; names come from outside and may be long."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What could steer a terminal, or cannot be printed: never left in a message."""


class TaiaError(Exception):
    """Bad input, told in full. `faults` holds each single one."""

    exit_code = 2
    shown = FAULTS_SHOWN

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        self.faults = tuple(faults)
        shown = [f"  - {fault[:FAULT_LENGTH]}" for fault in self.faults[: self.shown]]
        hidden = len(self.faults) - len(shown)
        if hidden > 0:
            shown.append(f"  and {hidden} more")
        super().__init__(printable("\n".join([message, *shown])))


class SelectionError(TaiaError):
    """A selection that does not parse, or names what is not there."""


class KindError(TaiaError):
    """A model type or a tensor name that the table of kinds does not know."""


class SourceError(TaiaError):
    """A base, tuned model or adapter that cannot be found or opened."""


class CheckpointError(TaiaError):
    """A file that is not what its format says."""


class MismatchError(TaiaError):
    """Two inputs that do not belong together."""


class OutputError(TaiaError):
    """A destination that cannot be written."""


class DataError(TaiaError):
    """A training or evaluation file with a broken record."""


class RecipeError(TaiaError):
    """A recipe or an option that states nothing runnable."""


class EvaluationError(TaiaError):
    """An unknown task, or a result folder that is not complete."""


class ClusterError(TaiaError):
    """A Ray cluster that does not answer, or cannot do what is asked of it."""


class DependencyError(TaiaError):
    """A package that an optional feature needs is not installed."""


class VerificationError(TaiaError):
    """A checkpoint that is not what its receipt says. Its message lists every fault."""

    exit_code = 1
    shown = 1_000_000


def printable(text: str) -> str:
    """The text with whatever could steer a terminal, or cannot be printed, as an escape."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The known words closest to `word`, for the end of an error message.

    Returns `"; did you mean 'a' or 'b'?"`, or an empty string where nothing is close.
    """
    import difflib

    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(candidate) for candidate in close) + "?"
