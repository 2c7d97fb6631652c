"""What watches a training run: the log file, the progress bar, Ctrl-C, a broken loss.

They hang on the Trainer's own events. log.jsonl gets one line a step; on resuming,
the lines after the checkpoint are dropped first, so a log never tells a step twice.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from taia.errors import DataError, TaiaError
from taia.files import atomic_write
from taia.training.ranks import any_of
from taia.training.validation import LOSS

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["Interrupt", "LogLine", "Recorder", "progress_bar", "read_log", "recording", "watching"]

LogLine = Mapping[str, float]
"""One line of log.jsonl: step, steps, loss, learning_rate, grad_norm, epoch, tokens, seconds,
tokens_per_second, and with padding counted padded_tokens_per_second; of a mixture share_NAME, the
share of a source in the batch; where one was taken, validation_loss; with penalties or experts also
what `taia.training.objective` tells."""

KNOWN = ("loss", "learning_rate", "grad_norm", "epoch")


class Recorder:
    """Writes log.jsonl and tells `on_progress`."""

    def __init__(
        self,
        path: Path,
        *,
        steps: int,
        examples: int,
        batch_size: int,
        tokens: Sequence[int],
        padded: Sequence[int],
        from_step: int,
        shares: Sequence[LogLine] = (),
        on_progress: Callable[[LogLine], None] | None,
    ) -> None:
        """`tokens`: those trained on up to and with each step, from step 1 on; `padded`: the same
        with padding.

        `shares`: of the sources of a mixture, in the batch of each step.
        """
        self.path, self.steps, self.shares = path, steps, shares
        self.tokens, self.padded = tokens, padded
        self.epochs_a_step = batch_size / examples
        self.on_progress = on_progress
        self.lines: list[LogLine] = [line for line in read_log(path) if line["step"] <= from_step]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.earlier = self.lines[-1]["seconds"] if self.lines else 0.0
        self.start = self.last = time.monotonic()

    def begin(self) -> None:
        """The clock starts with the first step, not with the loading before it."""
        self.start = self.last = time.monotonic()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the line of one step."""
        loss, norm = float(values["loss"]), float(values.get("grad_norm", 0.0))
        now = time.monotonic()
        taken = max(now - self.last, 1e-9)
        line = {
            "step": step,
            "steps": self.steps,
            "loss": loss,
            "learning_rate": float(values["learning_rate"]),
            "grad_norm": norm,
            "epoch": round(step * self.epochs_a_step, 6),
            "tokens": self.tokens[step - 1],
            "seconds": round(self.earlier + now - self.start, 3),
            "tokens_per_second": round(_of_step(self.tokens, step) / taken, 1),
            "padded_tokens_per_second": round(_of_step(self.padded, step) / taken, 1),
        }
        line |= self.shares[step - 1] if self.shares else {}
        line |= {name: value for name, value in values.items() if name not in KNOWN}
        self.last = now
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.on_progress is not None:
            self.on_progress(line)

    def throughput(self) -> dict[str, float]:
        """For train.json: tokens a second of the whole run, and the share that is padding."""
        tokens, padded = self.tokens[len(self.lines) - 1], self.padded[len(self.lines) - 1]
        seconds = max(self.lines[-1]["seconds"], 1e-9)
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "padded_tokens_per_second": round(padded / seconds, 1),
            "padding": round(1 - tokens / padded, 4),
        }

    def validated(self, loss: float) -> None:
        """Add the validation loss to the line of the last step."""
        self.lines[-1] = {**self.lines[-1], "validation_loss": loss}
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def _of_step(sums: Sequence[int], step: int) -> int:
    """What the step adds to running sums; steps count from 1."""
    return sums[step - 1] - (sums[step - 2] if step > 1 else 0)


def refuse_broken(step: int, values: Mapping[str, float], batch: Sequence[str]) -> None:
    """Raise TaiaError for a loss or gradient that is not finite; `batch`: where it was read."""
    loss, norm = float(values["loss"]), float(values.get("grad_norm", 0.0))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TaiaError(
            f"step {step}: the loss is {loss} and the gradient norm {norm}; training cannot go "
            "on from there. Lower the learning rate, or train in float32, and start again; or look "
            "at the examples of this step",
            batch,
        )


class Interrupt:
    """`asked` by the first Ctrl-C or SIGTERM inside `listening`; a second one ends the process.

    `obeyed` once the run stops for it, in all processes alike.
    """

    def __init__(self) -> None:
        self.asked = self.obeyed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM in the main thread for the time of the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def give_back() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def ask(_number: int, _frame: FrameType | None) -> None:
            self.asked = True
            give_back()

        for number in previous:
            signal.signal(number, ask)
        try:
            yield
        finally:
            give_back()


def recording(recorder: Recorder) -> TrainerCallback:
    """A Trainer callback that feeds `recorder`."""
    from transformers import TrainerCallback

    class Record(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            recorder.begin()

        def on_log(
            self, _args: Any, state: Any, _control: Any, logs: Mapping[str, float], **_: Any
        ) -> None:
            if "loss" in logs:
                recorder.log(state.global_step, logs)

        def on_evaluate(
            self, _args: Any, _state: Any, _control: Any, metrics: Mapping[str, float], **_: Any
        ) -> None:
            recorder.validated(metrics[LOSS])

    return Record()


def watching(interrupt: Interrupt, batch_of: Callable[[int], Sequence[str]]) -> TrainerCallback:
    """A Trainer callback that obeys `interrupt` and stops at a broken loss; for every process.

    `batch_of` tells where the examples of a step were read.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.do_eval and state.global_step >= state.max_steps:
                control.should_evaluate = True  # the last step may be the best one
            # One process may be asked and the others not, so they agree, or some would wait for
            # ever. A signal may also come while they do: it stays for the next step.
            if any_of(interrupt.asked):
                interrupt.obeyed = True
                control.should_save = control.should_training_stop = True

        def on_log(
            self, _args: Any, state: Any, _control: Any, logs: Mapping[str, float], **_: Any
        ) -> None:
            if "loss" in logs:
                refuse_broken(state.global_step, logs, batch_of(state.global_step))

    return Watch()


@contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[LogLine], None] | None]:
    """A bar on the terminal's error stream, or None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), Remaining())
    tail = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} tokens/s")
    with Progress(*columns, tail, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps, loss=math.nan, rate=0.0)

        def show(line: LogLine) -> None:
            rate = line["tokens_per_second"]
            bar.update(task, completed=line["step"], loss=line["loss"], rate=rate)

        yield show


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log.jsonl, without a last one that was cut off. Empty without a file."""
    if not path.is_file():
        return []
    rows = path.read_text(encoding="utf-8").splitlines()
    lines: list[dict[str, float]] = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.loads(row))
        except ValueError as error:
            if number < len(rows):
                raise DataError(f"{path}:{number}: not JSON ({error})") from error
    return lines
