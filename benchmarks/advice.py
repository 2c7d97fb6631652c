"""How often `taia advise` is right, on simulated answers with a planted truth.

    python benchmarks/advice.py

Four tasks, four variants (base, vanilla, taia, taif) that disagree with the base on one example
in five, as SmolLM2's variants do. A scenario states each variant's true gain over the base in
points; the right advice is then known. Prints how often it was given, another was given (wrong),
or none (cannot tell), for several numbers of examples. One half of them is the development split.
"""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Mapping

import numpy as np

from taia.evaluation import statistics
from taia.evaluation.choice import choose

SELECTIONS = {"base": "none", "vanilla": "all", "taia": "attention", "taif": "ffn"}
DISAGREE = 0.2
ACCURACY = 0.45

SCENARIOS: dict[str, tuple[dict[str, float], str]] = {
    "nothing differs": ({}, ""),
    "fine-tuning only harms": ({"vanilla": -8, "taia": -8, "taif": -8}, "base"),
    "fine-tuning only helps": ({"vanilla": 8, "taia": 0, "taif": 0}, "vanilla"),
    "attention helps, the rest harms": ({"vanilla": -4, "taia": 4, "taif": -8}, "taia"),
    "the same, half as much": ({"vanilla": -2, "taia": 2, "taif": -4}, "taia"),
    "feed-forward helps, the rest harms": ({"vanilla": -4, "taia": -8, "taif": 4}, "taif"),
}


def simulate(
    gains: Mapping[str, float], examples: int, tasks: int, random: np.random.Generator
) -> dict[str, dict[str, np.ndarray]]:
    """Answers of every variant: the base's, each turned over where the variant disagrees.

    Of the base's wrong answers a share becomes right, of its right ones a share wrong, so that
    one in five differs and the mean moves by the gain.
    """
    answers: dict[str, dict[str, np.ndarray]] = {name: {} for name in SELECTIONS}
    for task in range(tasks):
        base = random.random(examples) < ACCURACY
        for name in SELECTIONS:
            gain = gains.get(name, 0) / 100
            mended = (DISAGREE + gain) / 2 / (1 - ACCURACY)
            broken = (DISAGREE - gain) / 2 / ACCURACY
            turned = random.random(examples) < np.where(base, broken, mended)
            found = base if name == "base" else base ^ turned
            answers[name][str(task)] = found.astype(float)
    return answers


def rates(
    gains: Mapping[str, float], right: str, examples: int, tasks: int, sets: int
) -> tuple[float, float, float]:
    """Shares of right advice, wrong advice, and none."""
    random = np.random.default_rng(examples)
    told: Counter[str] = Counter()
    for seed in range(sets):
        choice = choose(simulate(gains, examples, tasks, random), SELECTIONS, {}, seed=seed)
        said = choice.leader if choice.chosen else ""
        told["none" if not said else "right" if said == right else "wrong"] += 1
    return told["right"] / sets, told["wrong"] / sets, told["none"] / sets


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=500, help="simulated runs a cell")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--examples", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--repeats", type=int, default=0, help="few sets, to see that it runs")
    options = parser.parse_args()
    statistics.FLIPS = 2_000  # p values to a thousandth are enough here
    choose(simulate({}, 10, 1, np.random.default_rng(0)), SELECTIONS, {})
    gc.freeze()  # multipletests collects garbage at every call, which is most of the time
    sets = 10 * options.repeats or options.sets
    counts = [f"{options.tasks} x {examples:,}" for examples in options.examples]
    print("right / wrong / cannot tell, in % of " + f"{sets:,} simulated runs\n")
    print("| planted | right is | " + " | ".join(counts) + " |")
    print("|---|---|" + "---:|" * len(counts))
    for name, (gains, right) in SCENARIOS.items():
        cells = []
        for examples in options.examples:
            shares = rates(gains, right, examples, options.tasks, sets)
            cells.append(" / ".join(f"{100 * share:.1f}" for share in shares))
        print(f"| {name} | {right or 'cannot tell'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
