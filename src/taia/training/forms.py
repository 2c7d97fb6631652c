"""The forms of a training record, and the chat that each one is.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}
    {"instruction": ..., "input": ..., "output": ...}               (Alpaca; input may be empty)
    {"conversations": [{"from": "human", "value": ...}, ...]}       (ShareGPT)
    {"question": ..., "choices": [...], "answer": ...}              (multiple choice)
    {"text": ...}                                                   (plain text, no chat)

A record with the fields of several forms is the first of these; of its other fields none is
read. A multiple-choice record becomes one question and one answer by one template:

    user        QUESTION
                A. FIRST CHOICE
                B. SECOND CHOICE
    assistant   The answer is B. SECOND CHOICE

Its answer is the number of a choice from 0, a letter, or the words of a choice.

Limits: text only (no images, no tool calls).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

__all__ = ["TEXT", "Message", "RecordError", "messages_of"]

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

TEXT = "text"
"""The role of plain text, which stands alone: every token of it is learnt, without a template."""

FORMS = (
    '"messages", "instruction" and "output", "conversations", '
    '"question" and "choices" and "answer", or "text"'
)


class RecordError(ValueError):
    """What is wrong with one record."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant, or text for a passage that is no chat."""

    role: str
    content: str


def messages_of(record: Any) -> tuple[Message, ...]:
    """The turns of a record of any form. Raises RecordError with what is wrong with it."""
    if not isinstance(record, dict):
        raise RecordError(f"a record is an object with {FORMS}; this is {type(record).__name__}")
    if record.get("messages") is not None:
        turns = _turns(record["messages"], "messages", "role", "content")
    elif record.get("conversations") is not None:
        turns = _turns(record["conversations"], "conversations", "from", "value")
    elif "instruction" in record and "output" in record:
        turns = _alpaca(record)
    elif {"question", "choices", "answer"} <= record.keys():
        turns = _choice(record)
    elif "text" in record:
        return _text(record["text"])
    else:
        raise RecordError(f"needs {FORMS}; has {', '.join(map(str, record)) or 'no fields'}")
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        raise RecordError("no assistant turn with content, so there is nothing to learn from it")
    return turns


def _turns(value: Any, field: str, speaker: str, text: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RecordError(f'"{field}" is a list of turns; this is {_shown(value)}')
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get(text), str):
            raise RecordError(f'turn {number} of "{field}" needs "{speaker}" and a text "{text}"')
        role = ROLES.get(str(turn.get(speaker)))
        if role is None:
            raise RecordError(
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
        raise RecordError(f"{', '.join(wrong)}: a text is needed, not {_shown(record[wrong[0]])}")
    prompt = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
    system = (Message("system", parts["system"]),) if parts["system"] else ()
    return (*system, Message("user", prompt), Message("assistant", parts["output"]))


def _choice(record: dict[str, Any]) -> tuple[Message, ...]:
    question, choices = record["question"], record["choices"]
    if not isinstance(question, str) or not question.strip():
        raise RecordError(f'"question": a text is needed, not {_shown(question)}')
    texts = isinstance(choices, list) and all(isinstance(one, str) for one in choices)
    if not texts or not 2 <= len(choices) <= len(ascii_uppercase):
        raise RecordError(f'"choices" is a list of 2 to 26 texts; this is {_shown(choices)}')
    right = _right(record["answer"], choices)
    listed = [f"{letter}. {one}" for letter, one in zip(ascii_uppercase, choices, strict=False)]
    prompt = "\n".join([question, *listed])
    return (Message("user", prompt), Message("assistant", f"The answer is {listed[right]}"))


def _right(answer: Any, choices: list[str]) -> int:
    """The number of the right choice."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if choices.count(answer) == 1:
            return choices.index(answer)
        if len(answer) == 1 and answer in ascii_uppercase[: len(choices)]:
            return ascii_uppercase.index(answer)
    raise RecordError(
        f'"answer" is {_shown(answer)}; it is the number of a choice from 0 to '
        f"{len(choices) - 1}, a letter from A to {ascii_uppercase[len(choices) - 1]}, "
        "or the words of one choice"
    )


def _text(text: Any) -> tuple[Message, ...]:
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f'"text": a text with words is needed, not {_shown(text)}')
    return (Message(TEXT, text),)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
