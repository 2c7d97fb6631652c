"""How a question is put to a model and its answer read; every table states it.

    chat    lm-eval's prompt as a user turn of the model's chat template
    plain   lm-eval's prompt as it is
    paper   the paper's: a user turn of the chat template; of multiple choice the letter that is
            likeliest as the first token of the answer; free-form answers in two stages: the
            model reasons, is then given its own text and "The answer is", and what follows is
            the answer

Few-shot examples come from a file or split of their own, never from the examples that are
scored; under `paper` they are earlier turns of the chat, otherwise text before the question.

Limits: the second stage reads text, so a tokenizer may split the end of the reasoning otherwise
than the model wrote it.

Jiang et al., TAIA, arXiv 2405.20192, section 4 and the authors' evaluation code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = [
    "LEAD_IN",
    "MOST_SHOTS",
    "PROTOCOLS",
    "check_protocol",
    "in_stages",
    "request_options",
]

PROTOCOLS = ("chat", "plain", "paper")
"""The names that `--protocol` takes."""

MOST_SHOTS = 4
"""The most few-shot examples, as in the paper."""

LEAD_IN, ANSWER_TOKENS = "lead_in", "answer_toks"
"""Keys of a request's generation arguments that ask for a second stage; lm-eval knows neither."""


def check_protocol(protocol: str, shots: int) -> list[str]:
    """What is wrong with a protocol and a number of few-shot examples; empty when nothing is."""
    faults = []
    if protocol not in PROTOCOLS:
        faults.append(f"protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if not 0 <= shots <= MOST_SHOTS:
        faults.append(f"shots {shots}: from 0 to {MOST_SHOTS}")
    return faults


def request_options(protocol: str) -> dict[str, bool]:
    """The keywords of lm-eval's `evaluate` and `build_all_requests` that a protocol decides."""
    return {
        "apply_chat_template": protocol != "plain",
        "fewshot_as_multiturn": protocol == "paper",
    }


def in_stages(
    generate: Callable[[list[Instance]], list[str]], requests: Sequence[Instance]
) -> list[str]:
    """The texts of lm-eval's generate_until requests, with a second stage where one asks for it.

    `generate` answers requests as lm-eval's models do. A request of two stages gives reasoning,
    lead-in and answer as one text.
    """
    texts = generate([_stage(one, one.args[0], _first(one.args[1])) for one in requests])
    begun = {
        index: _led_in(text, one.args[1][LEAD_IN])
        for index, (one, text) in enumerate(zip(requests, texts, strict=True))
        if LEAD_IN in one.args[1]
    }
    second = [
        _stage(requests[index], requests[index].args[0] + text, _second(requests[index].args[1]))
        for index, text in begun.items()
    ]
    answers = generate(second) if second else []
    led = {key: text + answer for (key, text), answer in zip(begun.items(), answers, strict=True)}
    return [led.get(index, text) for index, text in enumerate(texts)]


def _led_in(text: str, lead_in: str) -> str:
    text = text.rstrip()
    if not text:
        return lead_in
    return f"{text} {lead_in}" if text.endswith((".", "!", "?")) else f"{text}. {lead_in}"


def _first(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in arguments if key not in (LEAD_IN, ANSWER_TOKENS)}


def _second(arguments: dict[str, Any]) -> dict[str, Any]:
    answer = {"until": [*arguments["until"], "\n"], "max_gen_toks": arguments[ANSWER_TOKENS]}
    return {**_first(arguments), **answer}


def _stage(request: Instance, prompt: str, arguments: dict[str, Any]) -> Instance:
    from lm_eval.api.instance import Instance

    return Instance(
        request_type=request.request_type,
        doc=request.doc,
        arguments=(prompt, arguments),
        idx=request.idx,
        metadata=request.metadata,
    )
