"""Chats for fine-tuning: read from files or the hub, and encoded with labels.

Three forms of record are read, one chat each:
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}
    {"instruction": ..., "input": ..., "output": ...}               (Alpaca; input may be empty)
    {"conversations": [{"from": "human", "value": ...}, ...]}       (ShareGPT)

The loss falls on the assistant's tokens only: its words and the token that ends
its turn, so that the model learns to stop. Which tokens these are comes from the
model's own chat template: from its `{% generation %}` markers, or from TRL's
marked version of a template that TRL knows, or else from `taia.training.spans`.

Limits: text only (no images, no tool calls); a chat is one example, never packed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from taia.errors import DataError
from taia.receipt import digest_of
from taia.training.spans import IGNORED, chat_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "Encoded", "Example", "Message", "digest", "encode", "encode_all", "read_chats"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Names of speakers in the wild, and the role each one is."""

FORMS = '"messages", "instruction" and "output", or "conversations"'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """One training example: its turns, and where it was read (file and line)."""

    messages: tuple[Message, ...]
    where: str = ""


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
    """The chats of a .jsonl or .json file, a folder of .jsonl files, or a hub data set.

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
                raise _RecordError(record.reason)
            chats.append(Chat(_messages(record), where))
        except _RecordError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise DataError(f"{source}: {len(faults)} broken training records", faults)
    if not chats:
        raise DataError(f"{source}: no training records in it")
    return chats


def encode(chat: Chat, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """One chat as token ids and labels, cut at the end to `max_length` tokens.

    Raises DataError when the chat template cannot show where the assistant speaks,
    RecipeError when there is no chat template.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    ids, labels = chat_labels(messages, tokenizer, chat.where)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_all(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Every chat encoded; those without a labelled token left are dropped and counted."""
    examples: list[Example] = []
    where: list[str] = []
    truncated = dropped = 0
    for chat in chats:
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


def digest(source: str | Path, chats: Iterable[Chat]) -> str:
    """SHA-256 of training data: of the file's bytes, else of the chats that were read."""
    path = Path(source).expanduser()
    if path.is_file():
        return digest_of(path)
    total = hashlib.sha256()
    for chat in chats:
        turns = [[turn.role, turn.content] for turn in chat.messages]
        total.update(json.dumps(turns).encode() + b"\n")
    return total.hexdigest()


class _RecordError(ValueError):
    """What is wrong with one record."""


@dataclass(frozen=True, slots=True)
class _Broken:
    reason: str


def _records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Every record with where it stands. Broken lines come as _Broken."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{source}: no .jsonl file in this folder")
        for file in files:
            yield from _lines(file)
    elif path.suffix == ".json" and path.is_file():
        yield from _list(path)
    elif path.is_file():
        yield from _lines(path)
    elif path.suffix in {".json", ".jsonl"} or str(source).startswith((".", "/", "~")):
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


def _messages(record: Any) -> tuple[Message, ...]:
    """The turns of a record of any of the three forms."""
    if not isinstance(record, dict):
        raise _RecordError(f"a record is an object with {FORMS}; this is {type(record).__name__}")
    if record.get("messages") is not None:
        turns = _turns(record["messages"], "messages", "role", "content")
    elif record.get("conversations") is not None:
        turns = _turns(record["conversations"], "conversations", "from", "value")
    elif "instruction" in record and "output" in record:
        turns = _alpaca(record)
    else:
        raise _RecordError(f"needs {FORMS}; has {', '.join(map(str, record)) or 'no fields'}")
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        raise _RecordError("no assistant turn with content, so there is nothing to learn from it")
    return turns


def _turns(value: Any, field: str, speaker: str, text: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _RecordError(f'"{field}" is a list of turns; this is {_shown(value)}')
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get(text), str):
            raise _RecordError(f'turn {number} of "{field}" needs "{speaker}" and a text "{text}"')
        role = ROLES.get(str(turn.get(speaker)))
        if role is None:
            raise _RecordError(
                f'turn {number} of "{field}": "{speaker}" is {_shown(turn.get(speaker))}; '
                f"known are {', '.join(ROLES)}"
            )
        turns.append(Message(role, turn[text]))
    return tuple(turns)


def _alpaca(record: dict[str, Any]) -> tuple[Message, ...]:
    fields = ("system", "instruction", "input", "output")
    parts = {key: "" if record.get(key) is None else record[key] for key in fields}
    wrong = [key for key, value in parts.items() if not isinstance(value, str)]
    if wrong:
        raise _RecordError(f"{', '.join(wrong)}: a text is needed, not {_shown(record[wrong[0]])}")
    prompt = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    system = (Message("system", parts["system"]),) if parts["system"] else ()
    return (*system, Message("user", prompt), Message("assistant", parts["output"]))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
