"""Chats for fine-tuning: read from files or the hub, and encoded with labels.

A record is one chat, in one of the forms of `taia.training.forms`; it may also be plain text.
The loss falls on the assistant's tokens only: its words and the token that ends
its turn, so that the model learns to stop. Which tokens these are comes from the
model's own chat template: from its `{% generation %}` markers, or from TRL's
marked version of a template that TRL knows, or else from `taia.training.spans`.
Of plain text every token counts, and what is too long for one example becomes several.

Limits: text only (no images, no tool calls); a chat is one example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from taia.errors import DataError
from taia.receipt import digest_of
from taia.training.forms import TEXT, Message, RecordError, messages_of
from taia.training.spans import IGNORED, chat_labels

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "Chat", "Encoded", "Example", "Message", "digest", "digest_of_chats", "encode", "encode_all",
    "read_chats", "refuse_beyond_context",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chat:
    """One training example: its turns, and where it was read (file and line)."""

    messages: tuple[Message, ...]
    where: str = ""

    @property
    def is_text(self) -> bool:
        """Whether this is plain text: one message of role text."""
        return self.messages[0].role == TEXT


class Example(TypedDict):
    """One encoded chat: token ids, and the same ids or -100 where no loss falls."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What is trained on, and what became of the rest. `where` each example was read."""

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    where: tuple[str, ...] = ()


def read_chats(source: str | Path, *, max_examples: int | None = None) -> list[Chat]:
    """The chats of a .jsonl, .json or .txt file, a folder of such files, or a hub data set.

    Of a folder all .jsonl files are read, or all .txt files where there is none. A .txt file is
    plain text, one passage between blank lines each.
    `max_examples` takes the first ones in file order (of a folder: files by name; of a
    hub data set: its train split). Raises DataError with every broken record.
    """
    if max_examples is not None and max_examples < 1:
        raise DataError(f"max_examples is {max_examples}: at least 1 is needed")
    chats: list[Chat] = []
    faults: list[str] = []
    for where, record in _records(source):
        if max_examples is not None and len(chats) == max_examples:
            break
        try:
            if isinstance(record, _Broken):
                raise RecordError(record.reason)
            chats.append(Chat(messages_of(record), where))
        except RecordError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise DataError(f"{source}: {len(faults)} broken training records", faults)
    if not chats:
        raise DataError(f"{source}: no training records in it")
    return chats


def encode(chat: Chat, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """One chat or passage as token ids and labels, cut at the end to `max_length` tokens.

    Raises DataError when the chat template cannot show where the assistant speaks,
    RecipeError when there is no chat template.
    """
    if chat.is_text:
        ids = _text_ids(chat.messages[0].content, tokenizer)[:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    ids, labels = chat_labels(messages, tokenizer, chat.where)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_all(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Every chat encoded; those without a labelled token left are dropped and counted.

    Plain text is cut into as many examples as it needs, so nothing of it is truncated.
    """
    examples: list[Example] = []
    where: list[str] = []
    truncated = dropped = 0
    for chat in chats:
        if chat.is_text:
            ids = _text_ids(chat.messages[0].content, tokenizer)
            cuts = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
            cuts = [cut for cut in cuts if len(cut) > 1]  # one token alone predicts nothing
            examples += [{"input_ids": cut, "labels": list(cut)} for cut in cuts]
            where += [chat.where] * len(cuts)
            continue
        example = encode(chat, tokenizer, max_length + 1)
        ids, labels = example["input_ids"][:max_length], example["labels"][:max_length]
        # The first token is predicted from nothing, so its label never counts.
        if all(label == IGNORED for label in labels[1:]):
            dropped += 1
            continue
        truncated += len(example["input_ids"]) > max_length
        examples.append({"input_ids": ids, "labels": labels})
        where.append(chat.where)
    if not examples:
        raise DataError(
            f"none of the {dropped} examples has an assistant token within {max_length} tokens; "
            "raise max_length or shorten the prompts"
        )
    return Encoded(tuple(examples), truncated, dropped, tuple(where))


def refuse_beyond_context(
    examples: Sequence[Example], where: Sequence[str], config: PretrainedConfig
) -> None:
    """Raise DataError for examples that a model with this config cannot read, by `where`."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    long = [
        f"{place}: {len(example['input_ids']):,} tokens"
        for example, place in zip(examples, where, strict=True)
        if context and len(example["input_ids"]) > context
    ]
    if long:
        raise DataError(
            f"{len(long)} examples are longer than the {context:,} tokens that the model reads. "
            f"Set max_length to {context}, which cuts them, or less",
            long,
        )


def digest(source: str | Path, chats: Iterable[Chat]) -> str:
    """SHA-256 of training data: of the file's bytes, else of the chats that were read."""
    path = Path(source).expanduser()
    if path.is_file():
        return digest_of(path)
    return digest_of_chats(chats)


def digest_of_chats(chats: Iterable[Chat]) -> str:
    """SHA-256 of what is said in chats, and by whom."""
    total = hashlib.sha256()
    for chat in chats:
        turns = [[turn.role, turn.content] for turn in chat.messages]
        total.update(json.dumps(turns).encode() + b"\n")
    return total.hexdigest()


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of plain text, as the tokenizer begins a text, with the end of text after it."""
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


@dataclass(frozen=True, slots=True)
class _Broken:
    reason: str


def _records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Every record with where it stands. Broken lines come as _Broken."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.jsonl")) or sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"{source}: no .jsonl or .txt file in this folder")
        for file in files:
            yield from _passages(file) if file.suffix == ".txt" else _lines(file)
    elif path.suffix == ".json" and path.is_file():
        yield from _list(path)
    elif path.suffix == ".txt" and path.is_file():
        yield from _passages(path)
    elif path.is_file():
        yield from _lines(path)
    elif path.suffix in {".json", ".jsonl", ".txt"} or str(source).startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or folder")
    else:
        yield from _hub(str(source))


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON and UTF-8 faults alike
                yield f"{path}:{number}", _Broken(f"not JSON ({error})")


def _passages(path: Path) -> Iterator[tuple[str, Any]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from error
    start = 0
    for number, line in enumerate([*lines, ""]):
        if line.strip():
            continue
        if number > start:
            yield f"{path}:{start + 1}", {"text": "\n".join(lines[start:number])}
        start = number + 1


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}). For one record a line use .jsonl") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: a .json file of training data is one list of records")
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def _hub(name: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # the hub client raises a dozen kinds
        raise DataError(
            f"{name}: neither a local file or folder nor a data set with a train split that can "
            f"be reached on the hub ({type(error).__name__}). Check the name, or the network"
        ) from error
    for number, record in enumerate(rows, start=1):
        yield f"{name}, record {number}", record
