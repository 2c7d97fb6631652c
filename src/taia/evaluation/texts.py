"""lm-eval's generate_until through `taia.generation`: finished texts leave their slot to others.

Prompts are encoded and cut, arguments read and stop strings applied as in lm-eval's own model
class. Each text is told as soon as it is complete; requests of two stages (the paper's
protocol) are asked in batches, whose texts are told together.

Limits: greedy; requests that sample or state further arguments of transformers take lm-eval's
own path. In bfloat16 the texts that stand side by side change the rounding, so a run that
goes on after a kill may write another word where two are nearly equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from taia.evaluation.protocol import LEAD_IN, in_stages

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["Told", "answer_texts", "write_texts"]

PLAIN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature"}
"""The arguments of a request that is written here."""

STAGED = 4
"""Requests with two stages that are asked together, as a multiple of the batch size."""

Told = Callable[[int, str], None]
"""Given the place of a request and its text."""


def answer_texts(lm: Any, requests: Sequence[Instance]) -> list[str | None]:
    """The texts of lm-eval's requests, told as they come; None for those that `lm` knows."""
    texts: dict[int, str] = {}

    def take(index: int, text: str) -> None:
        if index in lm.known:
            return
        texts[index] = text
        if lm.on_answers:
            lm.on_answers({index: text})

    single = [i for i, one in enumerate(requests) if LEAD_IN not in one.args[1]]
    asked = [index for index in single if index not in lm.known]
    lm.write([requests[index] for index in asked], lambda place, text: take(asked[place], text))
    staged = [i for i, one in enumerate(requests) if LEAD_IN in one.args[1]]
    staged.sort(key=lambda index: -len(requests[index].args[0]))
    size = STAGED * int(lm.batch_size)
    for batch in (staged[at : at + size] for at in range(0, len(staged), size)):
        if set(batch) <= lm.known:
            continue
        told = in_stages(lm.write, [requests[index] for index in batch])
        for index, text in zip(batch, told, strict=True):
            take(index, text)
    return [texts.get(index) for index in range(len(requests))]


def write_texts(
    lm: Any,
    requests: Sequence[Instance],
    usual: Callable[[list[Instance]], list[str]],
    told: Told | None = None,
) -> list[str]:
    """What the model writes to each request; `usual` answers those that are not plain."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    texts: dict[int, str] = {}

    def take(index: int, text: str) -> None:
        texts[index] = text
        if told:
            told(index, text)

    groups: dict[str, list[int]] = {}
    for index, one in enumerate(requests):
        groups.setdefault(repr(sorted(one.args[1].items())), []).append(index)
    for group in groups.values():
        stated = requests[group[0]].args[1]
        arguments = normalize_gen_kwargs(stated, lm.max_gen_toks)
        if not set(stated) <= PLAIN or arguments["do_sample"] or lm.backend != "causal":
            answers = usual([requests[index] for index in group])
            for index, text in zip(group, answers, strict=True):
                take(index, text)
            continue
        end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(arguments["until"], eos=end)
        _write(lm, requests, group, until, arguments["max_gen_toks"], take)
    return [texts[index] for index in range(len(requests))]


def _write(
    lm: Any,
    requests: Sequence[Instance],
    group: Sequence[int],
    until: Sequence[str],
    longest: int,
    take: Told,
) -> None:
    """Write greedily to the requests of `group`, which share their arguments."""
    from taia.generation import generate

    room = lm.max_length - longest
    if room < 1:
        raise ValueError(f"max_gen_toks {longest}: the model reads {lm.max_length} tokens in all")
    prompts = []
    for index in group:
        ids, _ = lm.tok_batch_encode([requests[index].args[0]], left_truncate_len=room)
        prompts.append(ids[0].tolist())
    generate(
        lm.model, lm.tokenizer, prompts, max_new_tokens=longest, stop=until,
        slots=lm.slots, on_done=lambda place, _, text: take(group[place], text),
    )  # fmt: skip
