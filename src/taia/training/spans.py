"""Which tokens of a rendered chat are the assistant's.

A chat template with `{% generation %}` markers says so itself, and TRL ships
marked versions of the templates of many model families. For any other template
the text tells: if the rendered beginning of a chat (up to "now the assistant
speaks") and the rendered beginning with the assistant's turn are both prefixes
of the rendered whole, then the turn is what lies between them. The whole text is
tokenised once, and its tokens are marked by their character offsets.

The marked part holds the token that ends the turn, not the white space after it.

Limits: a template without markers that writes earlier turns differently once
more turns follow (dropping their reasoning, for instance) is refused, not guessed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from taia.errors import DataError, RecipeError
from taia.load import require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "assistant_spans", "chat_labels"]

IGNORED = -100
"""The label that the loss passes over."""

Messages = list[dict[str, str]]


def chat_labels(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str = ""
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered chat, and its labels: the id on assistant tokens, else -100."""
    require_chat_template(tokenizer, tokenizer.name_or_path or "the tokenizer")
    try:
        template = _marked_template(tokenizer)
        if template is not None:
            ids, mask = _by_markers(messages, tokenizer, template)
        else:
            ids, mask = _by_offsets(messages, tokenizer, where)
    except (DataError, RecipeError):
        raise
    except Exception as error:  # a template raises whatever its author wrote
        raise DataError(
            f"{where or 'chat'}: the model's chat template refuses it "
            f"({type(error).__name__}: {error}). Turns in an order that the model knows are needed"
        ) from error
    labels = [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]
    return ids, labels


def assistant_spans(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str = ""
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and the [start, end) characters of every assistant turn in it.

    Raises DataError when the template writes the beginning of this chat differently
    than the whole.
    """
    whole = _render(messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, add_generation_prompt=True)
        after = _render(messages[: index + 1], tokenizer)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{where or 'chat'}: turn {index + 1} is written differently by the model's chat "
                "template once other turns stand around it, so the assistant's tokens cannot be "
                "told apart. Put {% generation %} ... {% endgeneration %} around the assistant's "
                "words in the template, or train on chats of one answer each"
            )
        turn = whole[len(before) : len(after)]
        spans.append((len(before), len(before) + len(turn.rstrip())))
    return whole, spans


def _marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with generation markers for this tokenizer, if there is one."""
    own = tokenizer.chat_template
    return _search_marked(tokenizer, own["default"] if isinstance(own, dict) else own)


@lru_cache(maxsize=4)  # TRL renders half a dozen probes, and every chat of a data set asks
def _search_marked(tokenizer: PreTrainedTokenizerBase, own: str) -> str | None:
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(own):
        return str(own)
    try:
        known: str | None = get_training_chat_template(tokenizer)
    except Exception:  # TRL probes the template; what it does not know it does not know
        return None
    return known


def _by_markers(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def _by_offsets(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise RecipeError(
            f"{tokenizer.name_or_path}: its tokenizer gives no character offsets; a fast one "
            "(tokenizer.json), or a chat template with {% generation %} markers, is needed"
        )
    text, spans = assistant_spans(messages, tokenizer, where)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        int(any(first < end and start < last for first, last in spans))
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), mask


def _render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text
