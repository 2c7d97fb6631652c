"""Two runs on the same examples, side by side: any two models, or two variants of one run.

Examples are paired by their ids within a task. They are the same when ids, targets and metric
are; the prompts may differ (another model has another chat template, another protocol asks
otherwise), and how many do is told. p values are corrected by Holm's method over all rows of
the comparison.

Limits: only what both runs have is compared, and only whole tasks; two runs on different
examples are refused, because their difference would be one of questions, not of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError, nearest
from taia.evaluation.result import Example, Results, read_results
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

__all__ = ["Comparison", "Row", "Side", "compare_runs"]

SHOWN = 3
"""How many ids a message names."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs: its folder, its models and their content, how it was asked."""

    run: str
    base: str
    tuned: str | None
    protocol: str
    shots: int
    base_identity: str
    tuned_identity: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """Variant `a` of the first run and `b` of the second on one task; on average: task "".

    `first`, `second`: accuracies from 0 to 1. `difference`: first minus second.
    """

    a: str
    b: str
    task: str
    first: Score
    second: Score
    difference: Interval
    unparsed: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs say of each other; `notes` tells what else differs between them."""

    sides: tuple[Side, Side]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def compare_runs(
    one: str | Path,
    other: str | Path,
    variants: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> Comparison:
    """Compare variants of `one` with variants of `other`, example by example.

    `variants`: NAME (of both runs) or NAME=NAME (of the first, of the second); without them
    every name that both runs have, or the only variant of each. `tasks`: of both runs; without
    them all, which then must be the same. Raises EvaluationError with every fault: a run that
    is not complete, an unknown variant or task, different examples (which, and how many).
    """
    first, second = read_results(one), read_results(other)
    pairs = _pair_variants(first, second, variants)
    names = _shared_tasks(first, second, tasks)
    aligned = _align(first, second, pairs, names)
    found: list[tuple[str, str, str, Score, Score, Difference, tuple[int, int]]] = []
    for a, b in pairs:
        parts = [_compare(*aligned[a, b, task]) for task in names]
        found += [(a, b, task, *part) for task, part in zip(names, parts, strict=True)]
        if len(names) > 1:
            scores, others, differences, unparsed = zip(*parts, strict=True)
            total = (sum(left for left, _ in unparsed), sum(right for _, right in unparsed))
            found.append(
                (a, b, "", macro_score(scores), macro_score(others),
                 macro_difference(differences), total)
            )  # fmt: skip
    corrected = holm([row[5].p for row in found])
    rows = tuple(
        Row(a, b, task, score_a, score_b, interval_row(difference, p), unparsed)
        for (a, b, task, score_a, score_b, difference, unparsed), p in zip(
            found, corrected, strict=True
        )
    )
    sides = (_side(first), _side(second))
    return Comparison(sides, rows, tuple(_notes(sides, aligned)))


def _pair_variants(
    first: Results, second: Results, wanted: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    ours = [one.name for one in first.variants]
    theirs = [one.name for one in second.variants]
    if not wanted:
        shared = tuple((name, name) for name in ours if name in theirs)
        if shared:
            return shared
        if len(ours) == len(theirs) == 1:
            return ((ours[0], theirs[0]),)
        raise EvaluationError(
            f"{first.folder} and {second.folder}: no variant has the same name in both; say which "
            f"two, as in --variants '{ours[0]}={theirs[0]}'",
            [f"{first.folder}: {', '.join(ours)}", f"{second.folder}: {', '.join(theirs)}"],
        )
    pairs, faults = [], []
    for text in wanted:
        a, _, b = (part.strip() for part in text.partition("="))
        pairs.append((a, b or a))
        faults += [
            f"{results.folder}: has no variant {name!r}{nearest(name, known)} "
            f"It has {', '.join(known)}"
            for results, name, known in ((first, a, ours), (second, b or a, theirs))
            if name not in known
        ]
    faults += [f"{a}={b}: given twice" for a, b in sorted({p for p in pairs if pairs.count(p) > 1})]
    if faults:
        raise EvaluationError("the variants cannot be compared:", faults)
    return tuple(pairs)


def _shared_tasks(first: Results, second: Results, wanted: Sequence[str]) -> tuple[str, ...]:
    faults = []
    for mine, its in ((first, second), (second, first)):
        if wanted:
            faults += [f"{task}: not in {mine.folder}" for task in wanted if task not in mine.tasks]
        else:
            faults += [f"{task}: only in {mine.folder}" for task in mine.tasks
                       if task not in its.tasks]  # fmt: skip
    if faults:
        shared = [task for task in first.tasks if task in second.tasks]
        mend = f"--tasks {','.join(shared)} compares what both have" if shared else "none is shared"
        raise EvaluationError(f"the two runs do not have the same tasks; {mend}:", faults)
    return tuple(dict.fromkeys(wanted)) or first.tasks


Aligned = Mapping[tuple[str, str, str], tuple[Sequence[Example], Sequence[Example]]]
"""Examples of variants a and b on a task, in the order of the first run."""


def _align(
    first: Results, second: Results, pairs: Sequence[tuple[str, str]], tasks: Sequence[str]
) -> Aligned:
    aligned: dict[tuple[str, str, str], tuple[Sequence[Example], Sequence[Example]]] = {}
    faults: list[str] = []
    for task in tasks:
        a, b = pairs[0]  # all variants of a run have the same examples
        faults += _unlike(task, first, first.examples[a, task], second, second.examples[b, task])
        if faults:
            continue
        for a, b in pairs:
            theirs = {example.id: example for example in second.examples[b, task]}
            ours = first.examples[a, task]
            aligned[a, b, task] = ours, [theirs[example.id] for example in ours]
    if faults:
        raise EvaluationError(
            "the two runs are on different examples, so their difference would be one of "
            "questions; evaluate both with the same --data and --limit (and --protocol, where the "
            "metrics differ):",
            faults,
        )
    return aligned


def _unlike(
    task: str, first: Results, ours: Sequence[Example], second: Results, theirs: Sequence[Example]
) -> list[str]:
    """In what the examples of a task differ."""
    mine, its = ({example.id: example for example in side} for side in (ours, theirs))
    faults = []
    shared = [name for name in mine if name in its]
    for folder, only in (
        (first.folder, [name for name in mine if name not in its]),
        (second.folder, [name for name in its if name not in mine]),
    ):
        if only:
            faults.append(
                f"{task}: {len(only)} examples only in {folder} ({_some(only)}); "
                f"{len(shared)} are in both"
            )
    other = [name for name in shared if mine[name].target != its[name].target]
    if other:
        faults.append(
            f"{task}: {len(other)} of {len(shared)} examples have another answer in "
            f"{second.folder} ({_some(other)})"
        )
    metrics = first.settings.tasks[task].metric, second.settings.tasks[task].metric
    if metrics[0] != metrics[1]:
        faults.append(f"{task}: scored by {metrics[0]} in {first.folder}, by {metrics[1]} in "
                      f"{second.folder}")  # fmt: skip
    return faults


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _compare(
    ours: Sequence[Example], theirs: Sequence[Example]
) -> tuple[Score, Score, Difference, tuple[int, int]]:
    subjects = [a.subject or b.subject for a, b in zip(ours, theirs, strict=True)]
    clusters = subjects if any(subjects) else ()
    first, second = ([example.correct for example in side] for side in (ours, theirs))
    unparsed = tuple(sum(not example.parsed for example in side) for side in (ours, theirs))
    return (
        score(first, clusters),
        score(second, clusters),
        paired_difference(first, second, clusters),
        (unparsed[0], unparsed[1]),
    )


def _side(results: Results) -> Side:
    told = results.settings
    return Side(
        str(results.folder), told.base, told.tuned, told.protocol, told.shots,
        told.base_identity, told.tuned_identity,
    )  # fmt: skip


def _notes(sides: tuple[Side, Side], aligned: Aligned) -> list[str]:
    """What differs between the runs beside the answers."""
    one, other = sides
    notes = []
    if one.base_identity != other.base_identity:
        notes.append(f"different base models: {_both(one.base, other.base)}")
    if one.tuned_identity != other.tuned_identity:
        notes.append(f"different fine-tunes: {_both(one.tuned, other.tuned)}")
    asked = [f"{side.protocol} with {side.shots} shots" for side in sides]
    if asked[0] != asked[1]:
        notes.append(f"asked differently: {asked[0]} and {asked[1]}")
    prompts = {
        (task, example.id): example.prompt_hash == its.prompt_hash
        for (_, _, task), both in aligned.items()
        for example, its in zip(*both, strict=True)
    }
    differing = sum(not same for same in prompts.values())
    if differing:
        notes.append(f"{differing:,} of {len(prompts):,} prompts are not word for word the same")
    return notes


def _both(one: str | None, other: str | None) -> str:
    if one == other:
        return f"{one} in both, with other files"
    return f"{one or 'none'} and {other or 'none'}"
