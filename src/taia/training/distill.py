"""Self-Distill: the base rewrites every answer in its own words, and learns from that.

A fine-tune on texts that the model would not have written moves it further than what it has
to learn asks for. So the base first writes every answer again, given question and answer, and
trains on its own text (Yang et al. 2024, arXiv 2402.13669). What is asked, and which rewrites
are taken: `taia.training.rewrites`.

Every assistant turn after a question is rewritten by itself, after the turns of the data as they
were; plain text, and turns that answer nothing, stay. The base writes greedily, in batches.

Rewrites are stored as JSON Lines in the cache ($TAIA_CACHE, else ~/.cache/taia), a file for one
base (the bytes of its weights, configuration and tokenizer) and dtype: the first line says what it
was made with, then comes a line a rewrite, as soon as it is there. So a stopped run goes on where
it was, and another one with the same records writes nothing again.

Limits: of several processes the first one writes, the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from taia.errors import DataError, OutputError
from taia.generation import end_tokens, generate, longest_input
from taia.load import load_model, require_chat_template
from taia.receipt import digest_of
from taia.sources import Form, Source, resolve
from taia.training.data import Chat, digest_of_chats
from taia.training.ranks import is_first, on_first
from taia.training.rewrites import KEPT, TEMPLATE, judge
from taia.training.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Distilled", "Outlook", "outlook", "self_distill"]

SHORTEST = 128
"""New tokens that a rewrite may always have; a long reference allows twice its own."""

SLOTS = 64
"""Answers that are written side by side."""

IDENTITY = ("*.safetensors", "*config.json", "tokenizer*", "chat_template*")
"""Files of a checkpoint that decide what it writes."""


@dataclass(frozen=True, slots=True)
class Distilled:
    """The chats of every source with rewritten answers; what became of the answers."""

    chats: list[list[Chat]]
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained on."""
        return digest_of_chats(chat for of_source in self.chats for chat in of_source)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run would do: how many answers there are, and how many the cache has."""

    answers: int
    stored: int

    def __str__(self) -> str:
        """One line of a dry run."""
        return (
            f"self-distill: {self.answers:,} answers, of which {self.stored:,} are rewritten "
            f"already and {self.answers - self.stored:,} would be before training"
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """One answer to rewrite: which turn it is, the prompt as token ids, and a key of its own."""

    source: int
    chat: int
    turn: int
    reference: str
    prompt: tuple[int, ...]
    budget: int
    key: str


def self_distill(
    settings: Settings, read: Sequence[Sequence[Chat]], tokenizer: PreTrainedTokenizerBase
) -> Distilled:
    """The chats of `read` with the answers of the base. All processes have to call it.

    Raises RecipeError for a model without a chat template, DataError where there is nothing to
    rewrite, OutputError for a cache that cannot be written.
    """
    source = resolve(settings.base)
    tasks = _tasks(settings, read, tokenizer)
    path = on_first(lambda: _written(settings, source, tasks, tokenizer))
    stored, judged = _stored(path), Counter[str | None]()
    if any(task.key not in stored for task in tasks):
        raise OutputError(
            f"{path}: has not all the rewrites that the first process wrote. All processes have to "
            "see one folder: set TAIA_CACHE to a shared one"
        )
    chats = [[*of_source] for of_source in read]
    for task in tasks:
        line = stored[task.key]
        reason = judge(task.reference, line["text"], finished=line["finished"])
        judged[reason] += 1
        if reason is not None:
            continue
        chat = chats[task.source][task.chat]
        turns = list(chat.messages)
        turns[task.turn] = replace(turns[task.turn], content=line["text"].strip())
        chats[task.source][task.chat] = replace(chat, messages=tuple(turns))
    kept = {reason: judged[reason] for reason in KEPT}
    facts = {"answers": len(tasks), "rewritten": judged[None], "kept": kept, "file": str(path)}
    if is_first():
        _tell(facts)
    return Distilled(chats, {"self_distill": facts})


def outlook(
    settings: Settings, read: Sequence[Sequence[Chat]], tokenizer: PreTrainedTokenizerBase
) -> Outlook:
    """What `self_distill` would do. Nothing is written, no weights are loaded."""
    tasks = _tasks(settings, read, tokenizer)
    stored = _stored(_place(settings, resolve(settings.base)))
    return Outlook(len(tasks), sum(task.key in stored for task in tasks))


def _tasks(
    settings: Settings, read: Sequence[Sequence[Chat]], tokenizer: PreTrainedTokenizerBase
) -> list[_Task]:
    """Every assistant turn that follows a user's."""
    require_chat_template(tokenizer, settings.base)
    tasks = []
    for number, chats in enumerate(read):
        for at, chat in enumerate(chats):
            roles = [one.role for one in chat.messages]
            for turn in range(1, len(roles)):
                if roles[turn - 1 : turn + 1] == ["user", "assistant"]:
                    tasks.append(_task(number, at, turn, chat, tokenizer))
    if not tasks:
        raise DataError(
            f"{settings.data_names}: self_distill rewrites answers, and there are none after a "
            "user's turn; leave it out"
        )
    return tasks


def _task(source: int, at: int, turn: int, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> _Task:
    reference = chat.messages[turn].content
    asked = TEMPLATE.format(question=chat.messages[turn - 1].content, answer=reference)
    messages = [{"role": one.role, "content": one.content} for one in chat.messages[: turn - 1]]
    messages.append({"role": "user", "content": asked})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    budget = max(SHORTEST, 2 * len(tokenizer(reference, add_special_tokens=False)["input_ids"]))
    key = hashlib.sha256(json.dumps([prompt, budget]).encode()).hexdigest()[:32]
    return _Task(source, at, turn, reference, tuple(prompt), budget, key)


def _place(settings: Settings, source: Source) -> Path:
    """The cache's file for the rewrites of this base in this dtype."""
    total = hashlib.sha256(json.dumps([TEMPLATE, settings.dtype]).encode())
    files = [source.path]
    if source.form is not Form.GGUF:
        files = sorted({file for name in IDENTITY for file in source.path.glob(name)})
    for file in files:
        total.update(f"{file.name} {digest_of(file)}\n".encode())
    cache = Path(os.environ.get("TAIA_CACHE") or "~/.cache/taia").expanduser()
    return cache / "self-distill" / f"{total.hexdigest()[:32]}.jsonl"


def _stored(path: Path) -> dict[str, dict[str, Any]]:
    """The rewrites of a file, by key. A last line that was cut off is no rewrite."""
    lines: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return lines
    for row in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and {"key", "text", "finished"} <= line.keys():
            lines[line["key"]] = line
    return lines


def _written(
    settings: Settings,
    source: Source,
    tasks: Sequence[_Task],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """The file with a rewrite for every task, those missing written first."""
    from filelock import FileLock

    path = _place(settings, source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # a second run waits, and finds it done
            stored = _stored(path)
            missing = {task.key: task for task in tasks if task.key not in stored}
            if missing:
                with path.open("a+b") as file:
                    _begin(file, settings)
                    _write(file, settings, list(missing.values()), tokenizer)
    except OSError as error:
        raise OutputError(f"{path}: rewrites cannot be stored there: {error}") from error
    return path


def _begin(file: IO[bytes], settings: Settings) -> None:
    """The first line of a new file; an end for a line that a kill has cut off."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        made = {"base": settings.base, "dtype": settings.dtype, "template": TEMPLATE}
        file.write(json.dumps(made).encode() + b"\n")
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.write(b"\n")


def _write(
    file: IO[bytes],
    settings: Settings,
    tasks: Sequence[_Task],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Let the base rewrite, and append each rewrite as soon as it is complete."""
    model = load_model(settings.base, dtype=settings.dtype)
    room = longest_input(model)
    fitting = [task for task in tasks if len(task.prompt) < room]

    def store(task: _Task, text: str, count: int, finished: bool) -> None:
        line = {"key": task.key, "finished": finished, "tokens": count, "text": text}
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()

    for task in tasks:
        if len(task.prompt) >= room:
            store(task, "", 0, False)
    if not fitting:
        return
    ends = end_tokens(model, tokenizer)
    with _progress(len(fitting)) as advance:

        def done(index: int, tokens: Sequence[int], text: str) -> None:
            store(fitting[index], text, len(tokens), tokens[-1] in ends)
            advance(len(tokens))

        generate(
            model, tokenizer, [task.prompt for task in fitting],
            max_new_tokens=[task.budget for task in fitting], slots=SLOTS, on_done=done,
        )  # fmt: skip


def _tell(facts: Mapping[str, Any]) -> None:
    """One line on the error stream: what became of the answers."""
    kept = ", ".join(f"{count:,} {reason}" for reason, count in facts["kept"].items() if count)
    told = f"self-distill: {facts['rewritten']:,} of {facts['answers']:,} answers rewritten"
    print(told + (f"; left as they were: {kept}" if kept else ""), file=sys.stderr)


@contextmanager
def _progress(answers: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, two lines elsewhere. What it gives is called with each text's tokens."""
    began, tokens = time.perf_counter(), 0

    def count(more: int) -> None:
        nonlocal tokens
        tokens += more

    if sys.stderr.isatty():
        with _bar(answers) as step:

            def show(more: int) -> None:
                count(more)
                step(tokens / (time.perf_counter() - began))

            yield show
    else:
        print(f"self-distill: rewriting {answers:,} answers", file=sys.stderr)
        yield count
    seconds = time.perf_counter() - began
    rate = tokens / seconds
    print(
        f"self-distill: {tokens:,} tokens in {seconds:.0f} s, {rate:.0f} a second", file=sys.stderr
    )


@contextmanager
def _bar(answers: int) -> Iterator[Callable[[float], None]]:
    """A bar of the answers that are written, with the tokens a second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("rewriting"), BarColumn(), MofNCompleteColumn(), Remaining())
    tail = TextColumn("{task.fields[rate]:.0f} tokens/s")
    with Progress(*columns, tail, console=Console(stderr=True)) as bar:
        task = bar.add_task("rewriting", total=answers, rate=0.0)
        yield lambda rate: bar.update(task, advance=1, rate=rate)
