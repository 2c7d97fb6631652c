"""The commands of an experiment: train, eval, run, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from taia.cli.options import MODEL, Command, add_json, add_overwrite, split_list
from taia.cli.printing import is_sweep, print_json, print_summary, read_summary
from taia.errors import RecipeError

if TYPE_CHECKING:
    from taia.training.finetune import TrainResult
    from taia.training.preview import Preview

__all__ = ["COMMANDS"]


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help=f"the base model: {MODEL}")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of everything that is random (default: 0)"
    )


def train_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia train`; the defaults are the paper's."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", nargs="?", type=Path,
        help="a recipe, whose training alone is carried out, in place of --base, --data and the "
        "settings")  # fmt: skip
    add("--base", help=f"the base model: {MODEL}")
    add(
        "--data",
        help="a JSON Lines file, a folder, a hub dataset id, or a mixture (YAML, or a .yaml file)",
    )
    add("--out", type=Path, help="the folder of the adapter or model")
    add("--dry-run", action="store_true", help="tell what the data holds, and write nothing")
    add("--method", default="lora", help="lora (default), molora, dora or full")
    add("--train", metavar="SELECTION", default="all", help="what is trained (default: all)")
    add("--rank", type=int, default=16, help="LoRA rank (default: 16)")
    add("--alpha", type=float, default=32, help="LoRA alpha (default: 32)")
    add("--dropout", type=float, default=0.05, help="LoRA dropout (default: 0.05)")
    add("--experts", type=int, default=4, help="molora: experts on a layer (default: 4)")
    add(
        "--experts-per-token",
        type=int,
        default=1,
        help="molora: of which a token takes (default: 1)",
    )
    add("--balance", type=float, default=0.0, help="molora: load-balancing loss (default: 0)")
    add(
        "--expert-dropout",
        type=float,
        default=0.0,
        help="molora: how likely a token is kept from an expert (default: 0)",
    )
    add(
        "--penalty", metavar="NAME=STRENGTH", type=_strength, action="append", default=[],
        help="hold the fine-tune near the base: l2, ewc or kl; may be given several times",
    )  # fmt: skip
    add("--fisher-data", help="ewc: chats that tell what matters to the base")
    add("--fisher-examples", type=int, default=64, help="ewc: the first so many (default: 64)")
    add("--learning-rate", type=float, default=2e-4, help="peak learning rate (default: 2e-4)")
    add("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    add("--max-steps", type=int, help="stop after so many steps")
    add(
        "--batch-size", type=int, default=16,
        help="examples a step, over all devices (default: 16)",
    )  # fmt: skip
    add("--per-device-batch-size", type=int, help="of which so many are in memory at once")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps (default: 0.03)")
    add("--scheduler", default="cosine", help="of the learning rate (default: cosine)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: 0)")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--max-length", type=int, default=3072, help="tokens an example, at most (default: 3072)")
    add(
        "--self-distill", action="store_true",
        help="the base first rewrites every answer in its own words",
    )  # fmt: skip
    add("--packing", action="store_true", help="several examples in a row, to spare padding")
    add("--max-examples", type=int, help="take the first so many examples")
    add("--validation", help="chats on which to take the loss; the best checkpoint is kept")
    add("--validate-steps", type=int, default=100, help="steps between (default: 100)")
    add("--patience", type=int, help="stop after so many in a row without a better loss")
    add(
        "--report-to", metavar="TRACKERS", type=split_list, default=[],
        help="tensorboard, trackio, wandb, ...: trackers of transformers, separated by commas",
    )  # fmt: skip
    add("--save-steps", type=int, default=100, help="steps between checkpoints (default: 100)")
    _add_seed(parser)
    add("--resume", action="store_true", help="continue where it stopped")
    add_overwrite(parser)
    add_json(parser)


def _strength(text: str) -> tuple[str, float]:
    """`l2=0.1` as a name and a number."""
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=STRENGTH, as in l2=0.1") from None


def _once(penalties: list[tuple[str, float]]) -> dict[str, float]:
    """Strengths by name. Raises RecipeError for a name that is given twice."""
    names = [name for name, _ in penalties]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"--penalty {', '.join(twice)}: given more than once")
    return dict(penalties)


def train(options: argparse.Namespace) -> None:
    """Fine-tune a model on chats. Defaults are the paper's; loss on the assistant's tokens."""
    import dataclasses

    from taia.training.ranks import is_first

    if options.dry_run:
        told = _preview(options)
        if options.as_json:
            print_json(told.as_json())
        else:
            print(told)
        return
    if options.out is None:
        raise RecipeError("--out: needed, for the adapter or model; only --dry-run goes without")
    result = _train_recipe(options) if options.recipe else _train_options(options)
    if not is_first():
        return
    if options.as_json:
        print_json(dataclasses.asdict(result))
    else:
        print(f"{options.out}: trained {result.steps} steps, {result.tokens:,} tokens, "
              f"final loss {result.final_loss:.4f}")  # fmt: skip


def _train_recipe(options: argparse.Namespace) -> TrainResult:
    from taia.experiment import train_recipe

    _refuse_settings(options)
    return train_recipe(
        options.recipe, options.out, resume=options.resume, overwrite=options.overwrite
    )


def _refuse_settings(options: argparse.Namespace) -> None:
    """Raise RecipeError for options beside a recipe that the recipe should state."""
    parser = argparse.ArgumentParser()
    train_options(parser)
    own = {"recipe", "out", "resume", "overwrite", "as_json", "dry_run"}
    defaults = vars(parser.parse_args([]))
    stated = [f"--{name.replace('_', '-')}" for name, default in defaults.items()
              if name not in own and getattr(options, name) != default]  # fmt: skip
    if stated:
        raise RecipeError(f"{', '.join(stated)}: is for the recipe to state; write it in there")


def _require_sources(options: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("base", "data") if getattr(options, name) is None]
    if missing:
        raise RecipeError(f"{' and '.join(missing)}: needed where no recipe is given")


def _train_options(options: argparse.Namespace) -> TrainResult:
    from taia.recipe import load_data
    from taia.training.finetune import finetune

    _require_sources(options)
    return finetune(
        options.base, load_data(options.data), options.out, method=options.method,
        train=options.train,
        rank=options.rank, alpha=options.alpha, dropout=options.dropout,
        experts=options.experts, experts_per_token=options.experts_per_token,
        balance=options.balance, expert_dropout=options.expert_dropout,
        penalty=_once(options.penalty), fisher_data=options.fisher_data,
        fisher_examples=options.fisher_examples,
        learning_rate=options.learning_rate, epochs=options.epochs, max_steps=options.max_steps,
        batch_size=options.batch_size, per_device_batch_size=options.per_device_batch_size,
        warmup_ratio=options.warmup_ratio, scheduler=options.scheduler,
        weight_decay=options.weight_decay, max_length=options.max_length, dtype=options.dtype,
        packing=options.packing, self_distill=options.self_distill,
        max_examples=options.max_examples, save_steps=options.save_steps,
        validation=options.validation, validate_steps=options.validate_steps,
        patience=options.patience, report_to=options.report_to, seed=options.seed,
        resume=options.resume, overwrite=options.overwrite,
    )  # fmt: skip


def _preview(options: argparse.Namespace) -> Preview:
    """What a training would see."""
    import dataclasses

    from taia.experiment import preview_recipe
    from taia.recipe import load_data
    from taia.training.preview import preview
    from taia.training.settings import Settings

    if options.recipe:
        _refuse_settings(options)
        return preview_recipe(options.recipe)
    _require_sources(options)
    names = {one.name for one in dataclasses.fields(Settings)} - {"base", "data"}
    stated = {name: value for name, value in vars(options).items() if name in names}
    stated["penalty"] = _once(options.penalty)
    return preview(options.base, load_data(options.data), **stated)


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia eval`."""
    add = parser.add_argument
    _add_base(parser)
    add("--tasks", required=True, help="task names, separated by commas")
    add("--out", required=True, type=Path, help="the folder of the results")
    add("--adapter", help="the fine-tune, as a PEFT adapter")
    add("--tuned", help="the fine-tune, as a checkpoint")
    add("--variants", help="presets and selections, separated by commas")
    add("--data", type=Path, help="a folder of JSON Lines; the hub without it")
    add("--limit", type=int, help="the first so many examples a task")
    add("--protocol", default="chat", help="chat (default), plain or paper")
    add("--shots", type=int, default=0, help="few-shot examples before each question (default: 0)")
    add("--batch-size", type=int, help="questions or texts at once (default: 32; texts: up to 128)")
    add("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    add("--backend", default="hf", help="hf (transformers, default) or vllm")
    add("--no-cache", action="store_true", help="compute all scores, and keep none for later runs")
    _add_seed(parser)
    add_overwrite(parser)
    add_json(parser)


def evaluate(options: argparse.Namespace) -> None:
    """Score variants of one model on the same examples, side by side."""
    from taia.evaluation.harness import evaluate as score
    from taia.evaluation.variants import VARIANTS

    fine_tune = options.adapter or options.tuned
    chosen = (
        split_list(options.variants)
        if options.variants
        else VARIANTS if fine_tune else ("base",)
    )  # fmt: skip
    score(
        options.base, options.out, tasks=split_list(options.tasks), adapter=options.adapter,
        tuned=options.tuned, variants=chosen, data=options.data, limit=options.limit,
        protocol=options.protocol, shots=options.shots, batch_size=options.batch_size,
        dtype=options.dtype, seed=options.seed, overwrite=options.overwrite,
        cache=not options.no_cache, backend=options.backend,
        on_note=lambda note: print(note, file=sys.stderr),
    )  # fmt: skip
    print_summary(options.out, options.as_json)


def run_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia run`."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe, in YAML")
    parser.add_argument("--out", type=Path, help="the run's folder; runs/NAME without it")
    parser.add_argument(
        "--ray", metavar="ADDRESS",
        help="carry it out on a Ray cluster: HOST:PORT, auto, or local for one of this machine",
    )  # fmt: skip
    add_overwrite(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Carry out a whole experiment: train, evaluate, report. Resumes at the last finished stage."""
    from taia.experiment import run as carry_out

    folder = carry_out(options.recipe, options.out, overwrite=options.overwrite, ray=options.ray)
    print_summary(folder, options.as_json)


def report_options(parser: argparse.ArgumentParser) -> None:
    """Options of `taia report`."""
    parser.add_argument(
        "folder", metavar="RUN", type=Path, help="the folder of a run or of a training"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print Markdown, with the paired differences"
    )
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help="write the figure of a sweep as SVG, too"
    )
    add_json(parser)


def report(options: argparse.Namespace) -> None:
    """Print the table of a run and write its report.html."""
    from taia.report_training import is_training, report_training

    if options.figure and options.folder.is_dir() and not is_sweep(options.folder):
        raise RecipeError(f"{options.folder}: not a sweep, and only a sweep has a figure of its "
                          "own; without --figure the page of the run is written")  # fmt: skip
    if is_training(options.folder):
        if options.markdown or options.as_json:
            raise RecipeError(f"{options.folder}: a training alone has no table of scores; "
                              "without --markdown and --json its page is written")  # fmt: skip
        print(f"report: {report_training(options.folder)}")
        return
    page = _write_report(options.folder)
    if options.figure:
        from taia.sweep_report import draw_sweep

        draw_sweep(options.folder, options.figure)
    if options.markdown and is_sweep(options.folder):
        from taia.sweep_report import render_sweep_markdown

        sys.stdout.write(render_sweep_markdown(options.folder))
        return
    if options.markdown:
        from taia.report_text import render_markdown

        sys.stdout.write(render_markdown(read_summary(options.folder)))
        return
    print_summary(options.folder, options.as_json)
    if not options.as_json:
        print(f"report: {page}")


def _write_report(folder: Path) -> Path:
    if is_sweep(folder):
        from taia.sweep_report import report_sweep

        return report_sweep(folder)
    from taia.report import report as write_report

    return write_report(folder)


COMMANDS: dict[str, Command] = {
    "train": (train_options, train),
    "eval": (evaluate_options, evaluate),
    "run": (run_options, run),
    "report": (report_options, report),
}
