"""The command line: parse, call one function, print.

Exit codes: 0 done, 1 a check failed, 2 bad input. Whatever is heavy is imported inside the
command that needs it, so that `taia --help` and `taia plan` do not import torch.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from taia.errors import DependencyError, TaiaError

if TYPE_CHECKING:
    from taia.plan import Plan
    from taia.receipt import Receipt

__all__ = ["app", "main", "split_list"]

app = typer.Typer(
    name="taia",
    help="Keep what fine-tuning taught, drop what it broke.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "peft", "trl", "accelerate", "datasets"), "train"),
    "lm_eval": "eval",
    "jinja2": "report",
    "gguf": "gguf",
}
"""The extra that brings each optional package."""

MODEL = "A folder, a hub id ORG/NAME, FILE.gguf, or package:NAME."
Base = Annotated[str, typer.Argument(metavar="BASE", help=f"The base model. {MODEL}")]
Tuned = Annotated[
    str, typer.Argument(metavar="TUNED", help="The fine-tuned model, or a PEFT adapter's folder.")
]
Keep = Annotated[
    str,
    typer.Option(
        metavar="SELECTION",
        help="What to keep: a preset (taia, taia-full, taif, vanilla, base) or a selection such "
        "as 'attention + ffn[0:8]*0.3'.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
BaseOption = Annotated[str, typer.Option("--base", help=f"The base model. {MODEL}")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]


@app.command()
def plan(base: Base, tuned: Tuned, keep: Keep = "attention", as_json: AsJson = False) -> None:
    """Show what a splice would do. Reads headers only; with an adapter, plans its merge."""
    from taia.plan import plan as make_plan

    planned = make_plan(base, tuned, keep)
    if as_json:
        _print_json(planned.to_json())
    else:
        _print_plan(planned)
    if planned.faults:
        planned.refuse_faults()


@app.command()
def splice(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    keep: Keep = "attention",
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapter, write a full checkpoint.")
    ] = False,
    hash: Annotated[  # noqa: A002
        bool, typer.Option("--hash", help="Store digests, to verify without the sources.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the model, or the sliced adapter, that keeps a selection of the delta."""
    from taia.splice import splice as carry_out

    with _bytes_progress() as on_progress:
        receipt = carry_out(
            base, tuned, out, keep, merge=merge, hash=hash, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    _print_receipt(receipt, out, "written", as_json)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that taia wrote.")],
    as_json: AsJson = False,
) -> None:
    """Check an output against its receipt, byte for byte. Exit code 1 if it differs."""
    from taia.verify import verify as check

    _print_receipt(check(out), out, "verified", as_json)


@app.command()
def train(
    base: BaseOption,
    data: Annotated[str, typer.Option(help="JSON Lines file, folder, or hub dataset id.")],
    out: Annotated[Path, typer.Option(help="The folder of the adapter or model.")],
    method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    train: Annotated[
        str, typer.Option(metavar="SELECTION", help="What is trained, as a selection.")
    ] = "all",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 32,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step, over all devices.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens an example, at most.")] = 3072,
    max_examples: Annotated[int | None, typer.Option(help="The first so many examples.")] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where it stopped.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on chats. Defaults are the paper's; loss on the assistant's tokens."""
    import dataclasses

    from taia.training.finetune import finetune

    try:
        result = finetune(
            base, data, out, method=method, train=train, rank=rank, alpha=alpha, dropout=dropout,
            learning_rate=learning_rate, epochs=epochs, max_steps=max_steps,
            batch_size=batch_size, max_length=max_length, max_examples=max_examples,
            save_steps=save_steps, seed=seed, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        print(f"{out}: trained {result.steps} steps, {result.tokens:,} tokens, "
              f"final loss {result.final_loss:.4f}")  # fmt: skip


@app.command(name="eval")
def evaluate(
    base: BaseOption,
    tasks: Annotated[str, typer.Option(help="Task names, separated by commas.")],
    out: Annotated[Path, typer.Option(help="The folder of the results.")],
    adapter: Annotated[str | None, typer.Option(help="The fine-tune, as a PEFT adapter.")] = None,
    tuned: Annotated[str | None, typer.Option(help="The fine-tune, as a checkpoint.")] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Presets and selections, separated by commas."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of JSON Lines; the hub without it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many examples a task.")] = None,
    protocol: Annotated[str, typer.Option(help="chat (the model's template) or plain.")] = "chat",
    batch_size: Annotated[int, typer.Option(help="Prompt and choice pairs a batch.")] = 32,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score variants of one model on the same examples, side by side."""
    from taia.evaluation.harness import evaluate as score
    from taia.evaluation.variants import VARIANTS

    chosen = split_list(variants) if variants else VARIANTS if adapter or tuned else ("base",)
    score(
        base, out, tasks=split_list(tasks), adapter=adapter, tuned=tuned, variants=chosen,
        data=data, limit=limit, protocol=protocol, batch_size=batch_size, dtype=dtype, seed=seed,
        overwrite=overwrite,
    )  # fmt: skip
    _print_summary(out, as_json)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in YAML.")],
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/NAME without it.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Carry out a whole experiment: train, evaluate, report. Resumes at the last finished stage."""
    from taia.experiment import run as carry_out

    folder = carry_out(recipe, out, overwrite=overwrite)
    _print_summary(folder, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, with the paired differences.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the table of a run and write its report.html."""
    from taia.report import report as write_report

    page = write_report(folder)
    if markdown:
        from taia.report_text import render_markdown

        print(render_markdown(_summary(folder)), end="")
        return
    _print_summary(folder, as_json)
    if not as_json:
        print(f"report: {page}")


def split_list(text: str) -> list[str]:
    """Split at commas outside of brackets: selections may hold commas of their own."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def main() -> NoReturn:
    """Run the command line. A TaiaError becomes one message and its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written outputs go
    try:
        app()
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _print_plan(planned: Plan) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(title=f"keep: {planned.selection}", title_justify="left")
    table.add_column("kind")
    for column in ("tensors", "parameters", "from base", "from tuned", "blended"):
        table.add_column(column, justify="right")
    totals = planned.totals
    for kind, row in totals.items():
        if kind == "all":
            table.add_section()
        sizes = [decimal(row[key]) if row[key] else "" for key in ("base", "tuned", "blend")]
        table.add_row(kind, f"{row['tensors']:,}", f"{row['parameters']:,}", *sizes)
    Console().print(table)


def _print_receipt(receipt: Receipt, out: Path, done: str, as_json: bool) -> None:
    if as_json:
        _print_json(receipt.to_json())
        return
    origins = [entry.origin for entry in receipt.tensors]
    counts = ", ".join(
        f"{origins.count(origin)} {label}"
        for origin, label in (("base", "from base"), ("tuned", "from tuned"), ("blend", "blended"))
        if origin in origins
    )
    print(f"{out}: {done}, keeping '{receipt.selection}': {len(origins)} tensors, {counts}")


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def _print_summary(folder: Path, as_json: bool) -> None:
    summary = _summary(folder)
    if as_json:
        _print_json(summary)
        return
    from rich.console import Console

    from taia.report_text import render_terminal

    Console().print(render_terminal(summary))


def _bytes_progress() -> Any:
    """A progress bar for bytes on a terminal; nothing elsewhere."""
    from contextlib import contextmanager, nullcontext

    if not sys.stderr.isatty():
        return nullcontext(None)

    @contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("splice")
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()
