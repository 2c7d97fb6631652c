"""Which variant to keep, chosen on a development split of the examples, reported on the rest.

Rule, fixed before any number is seen: the variant with the highest mean over tasks on the
development split leads. It is compared there with every other, and every pair of variants with
each other; p values are corrected by Holm's method over all pairs, so that the chance of any
false difference is at most 5%. A leader that is a part of the fine-tune is chosen when it is
distinguishable from the base and from the whole fine-tune, whatever other parts do as well; the
base or the whole fine-tune is chosen when it is distinguishable from everything else. Otherwise
one cannot tell. What the rest shows decides nothing: it says how large the difference is without
the luck of the chosen.

Limits: examples are split, not subjects; one training run. Several parts that are as good as
each other are not told apart.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taia.errors import EvaluationError, RecipeError
from taia.evaluation.power import LEVEL, examples_needed
from taia.evaluation.statistics import (
    Difference,
    Score,
    holm,
    macro_difference,
    macro_score,
    paired_difference,
    score,
)
from taia.evaluation.summary import Interval, interval_row

__all__ = ["Answers", "Choice", "Half", "choose", "split"]

WHOLE = ("none", "all")
"""The selections that keep nothing, or everything, of the fine-tune."""

Answers = Mapping[str, Mapping[str, npt.NDArray[np.float64]]]
"""Variant -> task -> scores from 0 to 1, in an order that all variants share."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Half:
    """What one side of the split shows: every variant's mean, and the leader's differences.

    `differences`: leader minus each other variant. On the development split `p_holm` is corrected
    over all pairs of variants, on the rest over the leader's differences.
    """

    examples: int
    scores: Mapping[str, Score]
    differences: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class Choice:
    """The leader, whether it is chosen, and what stands in its way.

    `rivals`: variants that the development split does not tell from the leader. `against`: those
    of them that keep it from being chosen. `needed`: how many examples in all would tell it from
    them, if the differences seen are the true ones; 0 where it is chosen, None where no sensible
    number would.
    """

    leader: str
    chosen: bool
    rivals: tuple[str, ...]
    against: tuple[str, ...]
    needed: int | None
    development: Half
    rest: Half


def split(tasks: Mapping[str, int], share: float, seed: int) -> dict[str, tuple[Numbers, Numbers]]:
    """For every task with so many examples, the numbers of those for choosing and of the rest.

    Depends on `seed` and on the task's name and size, on nothing else. Raises RecipeError for a
    share that is not between 0 and 1 or a negative seed, EvaluationError for a task with fewer than
    two examples.
    """
    if not 0 < share < 1:
        raise RecipeError(f"development share {share}: a number between 0 and 1 is needed")
    if seed < 0:
        raise RecipeError(f"seed {seed}: a whole number from 0 is needed")
    small = [f"{task}: {count} example" for task, count in tasks.items() if count < 2]
    if small:
        raise EvaluationError("a task needs two examples or more to be split:", small)
    found = {}
    for task, count in tasks.items():
        random = np.random.default_rng([seed, zlib.crc32(task.encode())])
        order = random.permutation(count)
        cut = min(count - 1, max(1, round(share * count)))
        found[task] = np.sort(order[:cut]), np.sort(order[cut:])
    return found


def choose(
    answers: Answers,
    selections: Mapping[str, str],
    subjects: Mapping[str, Sequence[str]],
    *,
    share: float = 0.5,
    seed: int = 0,
) -> Choice:
    """Choose among variants by the rule of this module.

    `selections`: what each variant keeps. `subjects`: of each task's examples, or nothing.
    """
    names = list(answers)
    counts = {task: len(values) for task, values in answers[names[0]].items()}
    parts = split(counts, share, seed)
    chosen, others = (
        {name: {task: answers[name][task][parts[task][side]] for task in counts} for name in names}
        for side in (0, 1)
    )
    clusters = [
        {task: [subjects[task][at] for at in parts[task][side]] if subjects.get(task) else ()
         for task in counts}
        for side in (0, 1)
    ]  # fmt: skip
    scores = _scores(chosen, clusters[0])
    leader = max(names, key=lambda name: scores[name].mean)  # the first of equals
    first = [leader, *(name for name in names if name != leader)]
    pairs = list(itertools.combinations(first, 2))
    found = {pair: _difference(chosen, *pair, clusters[0]) for pair in pairs}
    corrected = holm([found[pair].p for pair in pairs])
    development = {
        other: interval_row(found[one, other], p)
        for (one, other), p in zip(pairs, corrected, strict=True)
        if one == leader
    }
    rivals = tuple(name for name, row in development.items() if row["p_holm"] >= LEVEL)
    whole = selections[leader] in WHOLE
    against = tuple(name for name in rivals if whole or selections[name] in WHOLE)
    total = sum(counts.values())
    return Choice(
        leader=leader,
        chosen=not against,
        rivals=rivals,
        against=against,
        needed=_needed([found[leader, name] for name in against], len(pairs), total),
        development=Half(sum(len(one) for one, _ in parts.values()), scores, development),
        rest=_rest(others, leader, clusters[1], sum(len(one) for _, one in parts.values())),
    )


def _rest(
    answers: Answers, leader: str, clusters: Mapping[str, Sequence[str]], examples: int
) -> Half:
    found = {
        name: _difference(answers, leader, name, clusters) for name in answers if name != leader
    }
    corrected = holm([one.p for one in found.values()])
    rows = {
        name: interval_row(one, p) for (name, one), p in zip(found.items(), corrected, strict=True)
    }
    return Half(examples, _scores(answers, clusters), rows)


def _scores(answers: Answers, clusters: Mapping[str, Sequence[str]]) -> dict[str, Score]:
    return {
        name: macro_score(
            [score(values.tolist(), clusters[task]) for task, values in by_task.items()]
        )
        for name, by_task in answers.items()
    }


def _difference(
    answers: Answers, one: str, other: str, clusters: Mapping[str, Sequence[str]]
) -> Difference:
    return macro_difference(
        [
            paired_difference(values.tolist(), answers[other][task].tolist(), clusters[task])
            for task, values in answers[one].items()
        ]
    )


def _needed(differences: Sequence[Difference], pairs: int, total: int) -> int | None:
    """Examples in all, of both sides of the split, that would show every one of these.

    The level is that of the strictest of Holm's steps, so it is rather too many than too few.
    The errors are of the development split and the number of the whole, in the same proportion.
    """
    needed = [
        examples_needed(one.mean, one.standard_error, total, LEVEL / pairs) for one in differences
    ]
    counts = [count for count in needed if count is not None]
    return max(counts, default=0) if len(counts) == len(needed) else None
