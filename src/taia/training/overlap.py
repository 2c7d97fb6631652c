"""Which training examples overlap with records that are held out for evaluation.

Two tests, on words alone (lower case, no punctuation, so rewrapped text is still found):

    exact      a turn holds a held-out question word for word. A question of fewer than five
               words must be the whole turn, since so few words meet by chance.
    13-gram    thirteen words in a row stand in both, in any turn and in any part of the
               held-out record; the test of GPT-3 (arXiv 2005.14165, appendix C).

Of a held-out record the question is its `question`, or the first turn of a chat, or, in a
record of another form, each of its texts. What labels a record (id, source, subject) is not read.

Limits: paraphrases and translations are not found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taia.errors import DataError
from taia.training.data import Chat
from taia.training.forms import RecordError, messages_of

__all__ = ["HeldOut", "Overlap", "find_overlap", "held_out_files", "read_held_out"]

GRAM = 13
FEW = 5
"""Words below which a question must be a whole turn."""

WORD = re.compile(r"\w+")
LABELS = frozenset({"id", "source", "subject", "answer", "label", "task", "category", "split"})

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What training data should not hold: questions, and runs of 13 words, with their files."""

    questions: dict[Words, str]
    grams: dict[int, str]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """One training example that overlaps: where it is, with which file, and by which test."""

    where: str
    file: str
    exact: bool


def held_out_files(paths: Sequence[str]) -> Iterator[Path]:
    """The files that `paths` name, a folder for its .jsonl files. Raises DataError."""
    for text in paths:
        path = Path(text).expanduser()
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise DataError(f"{text}: no such file, or a folder without .jsonl files, to hold out")
        yield from found


def read_held_out(files: Sequence[str]) -> HeldOut:
    """The records of .jsonl files, or of the .jsonl files of folders.

    Raises DataError for what is not there, is no JSON Lines, or holds no text.
    """
    questions: dict[Words, str] = {}
    grams: dict[int, str] = {}
    for file in held_out_files(files):
        texts = 0
        for record in _records(file):
            asked, all_texts = _texts(record)
            texts += len(all_texts)
            for text in asked:
                if words := _words(text):
                    questions.setdefault(words, file.name)
            for text in all_texts:
                for gram in _grams(_words(text)):
                    grams.setdefault(gram, file.name)
        if not texts:
            raise DataError(f"{file}: held-out records have a question or other text; none has")
    lengths = sorted({len(words) for words in questions if len(words) >= FEW})
    return HeldOut(questions, grams, tuple(lengths))


def find_overlap(chats: Iterable[Chat], held_out: HeldOut) -> dict[int, Overlap]:
    """The chats that overlap, by their place in the list."""
    found = {}
    for number, chat in enumerate(chats):
        turns = [_words(turn.content) for turn in chat.messages]
        exact = next((file for turn in turns if (file := _question_in(turn, held_out))), None)
        file = exact or next(
            (held_out.grams[g] for turn in turns for g in _grams(turn) if g in held_out.grams),
            None,
        )
        if file is not None:
            found[number] = Overlap(chat.where, file, exact is not None)
    return found


def _question_in(turn: Words, held_out: HeldOut) -> str | None:
    """The file of a held-out question that stands in these words."""
    if turn in held_out.questions:
        return held_out.questions[turn]
    for length in held_out.lengths:
        if length > len(turn):
            break
        if length >= GRAM and not any(g in held_out.grams for g in _grams(turn)):
            break  # a long question holds a run of 13 words, so none of them is here
        for start in range(len(turn) - length + 1):
            file = held_out.questions.get(turn[start : start + length])
            if file is not None:
                return file
    return None


def _grams(words: Words) -> Iterator[int]:
    """A hash of every run of 13 words; of one process, so never stored."""
    return (hash(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1))


def _words(text: str) -> Words:
    return tuple(WORD.findall(text.casefold()))


def _texts(record: Any) -> tuple[list[str], list[str]]:
    """The questions of a record, and all of its texts."""
    if not isinstance(record, dict):
        return [], []
    texts = [
        text
        for field, value in record.items()
        if field not in LABELS
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    ]
    if isinstance(record.get("question"), str):
        return [record["question"]], texts
    try:
        turns = messages_of(record)
    except RecordError:
        return texts, texts
    asked = [turn.content for turn in turns if turn.role != "system"][:1]
    return asked, [*texts, *(turn.content for turn in turns)]


def _records(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}:{number}: not JSON ({error})") from error
