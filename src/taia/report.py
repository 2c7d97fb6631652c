"""The report of a run: a table in the terminal, and one self-contained report.html.

Everything is computed from the files of a run (settings.json and results/, and where they
are there train/, deltas.json, advice.json, recipe.yaml, lock.json), so it can be made again,
later, on another machine, without the models and without torch. A run that holds only an
evaluation gives a report of that; parts that are missing are left out. A half-written
evaluation gives an error and no report: a table with holes would mislead.

The page loads nothing from anywhere, follows the reader's light or dark scheme, fits a
telephone and prints. What came out is told by fixed rules from the numbers, in the same
words whichever way it went.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import DependencyError, EvaluationError, SourceError
from taia.evaluation.power import LEVEL
from taia.files import atomic_write
from taia.report_plots import heat_map, label, loss_curve, number
from taia.report_scores import difference_axis, forest, how_asked, score_table
from taia.report_shares import share_charts
from taia.report_text import DETECTABLE, corrected

if TYPE_CHECKING:
    from jinja2 import Environment

    from taia.evaluation.summary import Summary

__all__ = ["facts_of_training", "page_maker", "report", "verdict"]


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run, read and checked. Empty values stand for parts that are not there."""

    folder: Path
    summary: Summary
    deltas: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    lock: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    advice: dict[str, Any] | None = None


def report(run: str | Path) -> Path:
    """Write report.html and summary.json into the run folder; returns the page's path.

    Raises SourceError (no such folder), EvaluationError (no results, or half written, with
    every fault; nothing is written then), DependencyError (jinja2 is not installed).
    """
    contents = read_run(Path(run))
    page = render_html(contents)
    summary = json.dumps(contents.summary, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(contents.folder / "summary.json", summary + "\n")
    path = contents.folder / "report.html"
    atomic_write(path, page)
    return path


def read_run(folder: Path) -> Run:
    """Read and check the files of a run. Raises SourceError and EvaluationError."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder; give the folder of a run")
    from taia.evaluation.advise import read_advice
    from taia.evaluation.result import read_results
    from taia.evaluation.summary import summarise

    results = read_results(folder)
    summary = summarise(results)
    train = folder / "train"
    return Run(
        folder=folder,
        summary=summary,
        deltas=_optional(folder / "deltas.json").get("kinds", []),
        log=_lines(train / "log.jsonl"),
        training=_optional(train / "train.json"),
        lock=_optional(folder / "lock.json"),
        recipe=_text(folder / "recipe.yaml"),
        advice=read_advice(results),
    )


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What came out, one sentence a variant, by the same rules whichever way it went.

    A difference is called distinguishable from zero when its p value is below 5% after Holm's
    correction over all comparisons of the run.
    """
    from taia.evaluation.summary import REFERENCES

    means = {row["variant"]: row for row in summary["means"]}
    tasks = summary["tasks"]
    examples = sum(task["examples"] for task in tasks.values())
    sentences = [
        f"Averaged over {len(tasks)} tasks with {examples:,} examples:"
        if len(tasks) > 1
        else f"On {next(iter(tasks))} with {examples:,} examples:"
    ]
    for name, row in means.items():
        told = f"{label(name)} scores {100 * row['accuracy']:.1f}%"
        compared = [
            _compared(reference, row["differences"][reference])
            for reference in REFERENCES
            if reference in row["differences"] and name != "base"
        ]
        sentences.append(", ".join([told, " and ".join(compared)] if compared else [told]) + ".")
    if len(means) > 1:
        sentences.append(_highest(means))
    smallest = [one["detectable"] for row in means.values() for one in row["differences"].values()]
    if smallest:
        sentences.append(
            f"Distinguishable means {corrected(summary)}; so many examples would miss most "
            f"differences below {100 * max(smallest):.1f} points."
        )
    return sentences


def _highest(means: Mapping[str, Mapping[str, Any]]) -> str:
    scores = {name: f"{100 * row['accuracy']:.1f}" for name, row in means.items()}
    top = max(scores.values(), key=float)
    best = " and ".join(label(name) for name, score in scores.items() if score == top)
    return f"The highest score is that of {best}."


def _compared(reference: str, difference: Mapping[str, Any]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    amount = f"{abs(mean):.1f}"
    unit = "point" if amount == "1.0" else "points"
    place = f"{amount} {unit} {_side(mean)}" if float(amount) else "level with"
    certain = "is" if difference["p_holm"] < LEVEL else "is not"
    bounds = f"{number(low, 1)} to {number(high, 1)}"
    return (
        f"{place} {label(reference)} (95% interval {bounds}: the difference {certain} "
        "distinguishable from zero)"
    )


def _side(mean: float) -> str:
    return "above" if mean > 0 else "below"


def page_maker() -> Environment:
    """What fills in the templates. Raises DependencyError."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise DependencyError(
            "report.html needs jinja2; install it with `pip install 'taia[report]'`"
        ) from error
    environment = Environment(
        loader=PackageLoader("taia", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["label"] = label
    return environment


def render_html(run: Run) -> str:
    """The whole page as text. Raises DependencyError."""
    from taia.evaluation.summary import REFERENCES

    summary = run.summary
    axis = difference_axis(summary)
    told = run.lock.get("report", {})
    forests = [made for name in REFERENCES if (made := forest(summary, name, axis))]
    return (
        page_maker()
        .get_template("report_template.html.jinja")
        .render(
            title=told.get("title")
            or f"What of the fine-tuning to keep: {_short(run.folder.name)}",
            expected=told.get("expected") or "",
            outcome=verdict(summary),
            summary=summary,
            table=score_table(summary),
            forests=forests,
            asked=how_asked(summary),
            advice=run.advice,
            halves=_halves(run.advice),
            corrected=corrected(summary),
            detectable=DETECTABLE,
            unread=_unread(summary),
            clustered=[name for name, task in summary["tasks"].items() if task["subjects"]],
            curve=loss_curve(run.log),
            shares=share_charts(run.log, run.training),
            heat=heat_map(run.deltas),
            training=facts_of_training(run.training),
            settings=_settings(summary),
            versions=sorted(_versions(run).items()),
            hashes=_hashes(run),
            tasks=[(name, task, _short(task["source"])) for name, task in summary["tasks"].items()],
            recipe=run.recipe,
        )
    )


def _halves(advice: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    """Every variant's score on the development split and on the rest, with intervals."""
    if advice is None:
        return []
    halves = [advice["choice"][half]["scores"] for half in ("development", "rest")]
    return [
        (
            name,
            [f"{100 * half[name][key]:.1f}" for half in halves for key in ("mean", "low", "high")],
        )
        for name in halves[0]
    ]


def _unread(summary: Summary) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """Tasks with answers that could not be read: for each variant how many, of how many."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for row in summary["scores"]:
        told = (row["variant"], row["unparsed"], row["examples"])
        found.setdefault(row["task"], []).append(told)
    return [(task, rows) for task, rows in found.items() if any(count for _, count, _ in rows)]


def _settings(summary: Summary) -> list[tuple[str, str]]:
    limit = summary["limit"]
    return [
        ("Base model", _short(summary["base"])),
        ("Fine-tuned model", _short(summary["tuned"] or "none")),
        ("Protocol", summary["protocol"]),
        ("Few-shot examples", str(summary["shots"])),
        ("Examples a task", "all" if limit is None else f"at most {limit:,}"),
        ("Seed", str(summary["seed"])),
    ]


def facts_of_training(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of train.json in reading order; unknown settings are shown as they are."""
    if not train:
        return []
    data = train.get("data") or {}
    source = data.get("path", "")
    names = [part["name"] for part in data.get("parts") or ()]
    rows = [
        ("Method", train.get("method")),
        ("Trained", train.get("train")),
        ("Data", _short(source) if isinstance(source, str) else ", ".join(names)),
        ("Examples", data.get("examples")),
        ("Steps", train.get("steps")),
        ("Tokens trained on", train.get("tokens")),
        ("Time", _duration(train.get("seconds"))),
        ("Final loss", train.get("final_loss")),
    ]
    rows += [
        (name.replace("_", " ").capitalize(), value)
        for name, value in (train.get("settings") or {}).items()
        if isinstance(value, str | int | float) and name not in ("method", "train", "data", "base")
    ]
    return [(name, _show(value)) for name, value in rows if value not in (None, "")]


def _versions(run: Run) -> dict[str, str]:
    own = {name: run.lock[name] for name in ("python", "platform") if name in run.lock}
    found = (run.training.get("versions"), run.summary["versions"], run.lock.get("versions"), own)
    return {name: version for versions in found for name, version in (versions or {}).items()}


def _hashes(run: Run) -> list[tuple[str, str]]:
    """Every SHA-256 that the run recorded, by what it is of."""
    found = [
        (f"evaluation data: {name}", task["sha256"]) for name, task in run.summary["tasks"].items()
    ]
    found.insert(0, ("training data", (run.training.get("data") or {}).get("sha256")))
    found += list((run.lock.get("hashes") or {}).items())
    unique = {digest: name for name, digest in reversed(found) if digest}
    return [(name, digest) for digest, name in reversed(unique.items())]


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is not there. Raises EvaluationError."""
    try:
        value = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: not valid JSON ({error}); make it again") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{path}: a JSON object is expected; make it again")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a training log. A last line cut short by an interruption is left out."""
    rows = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error


def _short(text: str) -> str:
    """A local path by its last two parts, anything else as it is: a report names no home."""
    path = Path(text)
    return "/".join(path.parts[-2:]) if path.is_absolute() else text


def _duration(seconds: float | None) -> str | None:
    if seconds is None or not math.isfinite(seconds):
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
