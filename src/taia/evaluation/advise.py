"""What to keep of this fine-tune: base, all of it, TAIA, another selection, or one cannot tell.

RUN/advice.json holds a recommendation with one paragraph of reasons: the choice on a development
split of the examples and what the rest shows of it (`taia.evaluation.choice`), the base's score
beside that of guessing (TAIA needs the knowledge to be in the base), how far the training text is
from the questions (`taia.evaluation.mismatch`), and how many examples would tell. The words are
made by fixed rules from the numbers.

Limits: advice is for these tasks, this training run and this way of asking.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taia.errors import EvaluationError
from taia.evaluation.choice import Choice, Half, choose
from taia.evaluation.mismatch import Mismatch, mismatches
from taia.evaluation.result import Results, read_results
from taia.evaluation.statistics import score
from taia.evaluation.summary import Interval, subjects
from taia.files import atomic_write, read_json

__all__ = ["CANNOT_TELL", "Advice", "Chance", "advise", "read_advice"]

CANNOT_TELL = "cannot tell"
KINDS = {"none": "base", "all": "vanilla", "attention": "taia", "all - ffn - router": "taia"}
"""What a selection is called in advice; every other is another selection."""

OTHER = "another selection"


@dataclass(frozen=True, slots=True)
class Chance:
    """The base on one task, with its 95% interval, beside guessing (0 where answers are free)."""

    task: str
    accuracy: float
    low: float
    high: float
    guessing: float


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation: base, vanilla, taia, another selection or "cannot tell".

    `variant`: the recommended one, empty where one cannot tell. `mismatch`: may be empty, then
    `no_mismatch` says why. `answers`: digest of the results that it is made from.
    """

    recommendation: str
    variant: str
    paragraph: str
    choice: Choice
    base: tuple[Chance, ...]
    mismatch: tuple[Mismatch, ...]
    no_mismatch: str
    protocol: str
    shots: int
    development_share: float
    seed: int
    answers: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; the content of advice.json."""
        return dataclasses.asdict(self)


def advise(run: str | Path, *, development: float = 0.5, seed: int = 0) -> Advice:
    """Advice on a complete run, also written to RUN/advice.json.

    `development`: the share of every task's examples that the choice is made on; `seed`: which.
    Raises EvaluationError (not complete, no base or nothing beside it, a task with one example),
    RecipeError (a share that is none).
    """
    results = read_results(run)
    selections = {one.name: one.selection for one in results.variants}
    base = next((name for name, selection in selections.items() if selection == "none"), None)
    if base is None or len(selections) < 2:
        raise EvaluationError(
            f"{results.folder}: advice needs the base and something beside it, and the run has "
            f"{', '.join(selections)}. Evaluate with --variants base,vanilla,taia,taif"
        )
    answers = {
        name: {task: np.asarray(results.correct(name, task)) for task in results.tasks}
        for name in selections
    }
    clusters = {task: subjects(results, task) for task in results.tasks}
    choice = choose(answers, selections, clusters, share=development, seed=seed)
    chances = tuple(_chance(results, base, task) for task in results.tasks)
    distances, why = mismatches(results)
    kind = KINDS.get(selections[choice.leader], OTHER) if choice.chosen else CANNOT_TELL
    told = _sentences(choice, kind, chances, distances, why)
    if choice.chosen and "all" not in selections.values():
        told.append("The whole fine-tune is not in this run, so it may be better still.")
    advice = Advice(
        recommendation=kind,
        variant=choice.leader if choice.chosen else "",
        paragraph=" ".join(told),
        choice=choice,
        base=chances,
        mismatch=distances,
        no_mismatch=why,
        protocol=results.settings.protocol,
        shots=results.settings.shots,
        development_share=development,
        seed=seed,
        answers=_digest(results),
    )
    text = json.dumps(advice.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(results.folder / "advice.json", text + "\n")
    return advice


def _digest(results: Results) -> str:
    """A hash of what was right and wrong, by which advice knows the results it is of."""
    digest = hashlib.sha256()
    for (variant, task), examples in results.examples.items():
        digest.update(f"{variant} {task}\n".encode())
        for example in examples:
            digest.update(f"{example.id} {example.correct}\n".encode())
    return digest.hexdigest()


def read_advice(results: Results) -> dict[str, Any] | None:
    """advice.json of a run; None where there is none, or it was made from other results."""
    path = results.folder / "advice.json"
    if not path.is_file():
        return None
    content = read_json(path)
    same = isinstance(content, dict) and content.get("answers") == _digest(results)
    return content if same else None


def _chance(results: Results, base: str, task: str) -> Chance:
    examples = results.examples[base, task]
    found = score([example.correct for example in examples], subjects(results, task))
    choices = [len(example.loglikelihoods) for example in examples]
    guessing = float(np.mean([1 / count if count > 1 else 0.0 for count in choices]))
    return Chance(task, found.mean, found.low, found.high, guessing)


def _sentences(
    choice: Choice,
    kind: str,
    chances: tuple[Chance, ...],
    distances: tuple[Mismatch, ...],
    why: str,
) -> list[str]:
    told = [_first(choice, kind)]
    half, rest = choice.development, choice.rest
    told.append(
        f"On the {half.examples:,} examples set aside to choose, {_shown(half, choice.leader)} "
        "(points, on average over the tasks, with 95% intervals and corrected p values)."
    )
    if choice.chosen:
        if choice.rivals:
            told.append(f"{_listed(choice.rivals)} may be as good: that is not told apart.")
    else:
        told.append(_wanting(choice))
    told.append(f"On the {rest.examples:,} that had no say, {_shown(rest, choice.leader)}.")
    if choice.chosen:
        told.append(_held(choice))
    guessed = [one.task for one in chances if one.guessing > 0 and one.low <= one.guessing]
    if guessed:
        told.append(
            f"On {_listed(guessed)} the base is not distinguishably above guessing: TAIA needs the "
            "knowledge to be in the base, so it has little to show there."
        )
    told.append(_mismatch_told(distances, why))
    return told


def _first(choice: Choice, kind: str) -> str:
    if choice.chosen:
        return f"Recommended: {kind if kind != OTHER else f'{OTHER}, {choice.leader}'}."
    beaten = [name for name in choice.development.differences if name not in choice.rivals]
    besides = f"; {_listed(beaten)} {'is' if len(beaten) == 1 else 'are'} worse" if beaten else ""
    return (
        f"One cannot tell with so many examples: {choice.leader} leads, and is not "
        f"distinguishable from {_listed(choice.against)}{besides}."
    )


def _shown(half: Half, leader: str) -> str:
    """The leader's score and differences on one side of the split."""
    differences = ", ".join(
        f"{_points(row['mean'])} against {name} ({_points(row['low'])} to {_points(row['high'])}, "
        f"p {_p(row)})"
        for name, row in half.differences.items()
    )
    return f"{leader} scores {100 * half.scores[leader].mean:.1f}%: {differences}"


def _held(choice: Choice) -> str:
    """Whether the rest agrees with the choice."""
    lost = [
        name
        for name, row in choice.rest.differences.items()
        if name not in choice.rivals and row["mean"] <= 0
    ]
    weak = [
        name
        for name, row in choice.rest.differences.items()
        if name not in (*choice.rivals, *lost) and row["low"] <= 0
    ]
    if lost:
        return f"There it is not above {_listed(lost)}, so take the advice with care."
    if weak:
        return f"There the difference from {_listed(weak)} holds in sign, not beyond chance."
    return "There the differences hold."


def _wanting(choice: Choice) -> str:
    smallest = max(choice.development.differences[name]["detectable"] for name in choice.against)
    told = f"So many examples would miss most differences below {100 * smallest:.1f} points"
    if choice.needed is None:
        return f"{told}, and what is seen is too small for any sensible number of them."
    return (
        f"{told}; if the differences seen are the true ones, about {_rounded(choice.needed):,} "
        "examples in all would tell."
    )


def _mismatch_told(distances: tuple[Mismatch, ...], why: str) -> str:
    if not distances:
        return f"How far training is from the questions was not measured: {why}."
    distance = float(np.mean([one.distance for one in distances]))
    yardstick = float(np.mean([one.yardstick for one in distances]))
    return (
        f"In its words the training text is {distance:.2f} from the questions (Jensen-Shannon "
        f"distance), whose own halves are {yardstick:.2f} from each other."
    )


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _p(row: Interval) -> str:
    return "below 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"


def _rounded(count: int) -> int:
    """To two digits: more would pretend to know."""
    power = int(10 ** max(0, len(str(count)) - 2))
    return math.ceil(count / power) * power


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else str(last)
