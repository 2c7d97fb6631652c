"""Text from a model for many prompts at once, each as if it were alone.

A number of slots is written to side by side. A text that is finished leaves its slot to the
next prompt, so that no step is spent on texts that are done; prompts are read several at once,
and what all of them begin with is read once. The tokens are those of transformers' `generate`,
one prompt at a time, up to the rounding of batched arithmetic. Stop strings cut as lm-eval cuts:
before the first of them in the decoded text.

Limits: greedy, or sampling at a temperature from the whole vocabulary; no beams. Models whose
cache is of another kind than `taia.slots` handles, prompt-tuned ones, and those whose generation
config asks for more than an end (a repetition penalty, suppressed tokens, ...) are left to
transformers' own `generate`, batch by batch: the same texts, without the refilling. So are texts
that may pass the length at which longrope changes its frequencies, one by one.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError, TaiaError
from taia.packed import packed
from taia.slots import (
    Slots,
    decoding,
    fits,
    parameters_of,
    rows_that_fit,
    shortest_window,
    steady_length,
    tokens_at_once,
    unwrapped,
)

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generated", "end_tokens", "generate", "longest_input"]

FEWEST, MOST = 32, 128
"""Texts at once, where nobody states how many: more than the first only if memory allows."""

SHORTEST_SHARED = 8
"""Tokens that all prompts must begin with before it is worth reading them once."""

UNUSUAL = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_length",
    "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "guidance_scale",
    "watermarking_config",
)  # fmt: skip
"""Wishes of a generation config that change the tokens; None, 0, 1 and [] are no wish."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What was written after one prompt.

    tokens: with the end token, if it ended; text: without special tokens, up to the first stop
    string; finished: False where it was cut at `max_new_tokens` or at the model's longest input.
    """

    tokens: tuple[int, ...]
    text: str
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[str] = (),
    slots: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_done: Callable[[int, Sequence[int], str], None] | None = None,
) -> list[Generated]:
    """What `model` writes after each prompt; as many as there are prompts, in their order.

    prompts: token ids; max_new_tokens: for all prompts, or one a prompt; slots: texts written
    side by side, None is 32, and up to 128 where memory allows (`taia.slots.rows_that_fit`) and
    the model can be written to in slots; temperature 0 takes the likeliest token. A sample depends
    on `seed` and on the prompt's place among the prompts, not on the slots.
    `on_done(index, tokens, text)` is called as soon as a text is complete. The model, which may be
    a PEFT model, is left as it was.

    Raises RecipeError for arguments that make no sense or a prompt without room in the model,
    TaiaError when the model's logits are not numbers.
    """
    texts = _texts(model, tokenizer, prompts, max_new_tokens, tuple(stop), seed)
    _check(model, texts, slots, temperature)
    if not texts:
        return []
    inner = unwrapped(model)
    waiting = deque(sorted(texts, key=lambda text: len(text.prompt), reverse=True))
    steady = max(len(text.prompt) + text.budget for text in texts) <= steady_length(inner)
    write = _in_slots if steady and _suits(model, inner) else _by_transformers
    count = slots if steady else 1  # side by side, a long text would change the short ones
    with _undisturbed(model), decoding(inner), packed(inner):
        for text in write(model, inner, waiting, count, temperature):
            text.written = tokenizer.decode(text.tokens, skip_special_tokens=True)
            for one in filter(None, text.stop):
                text.written = text.written.split(one)[0]
            if on_done is not None:
                on_done(text.index, tuple(text.tokens), text.written)
    return [Generated(tuple(text.tokens), text.written, text.finished) for text in texts]


@dataclass(slots=True, eq=False)
class _Text:
    """One prompt, and what has been written after it."""

    index: int
    prompt: Sequence[int]
    budget: int
    ends: frozenset[int]
    stop: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    seed: int
    tokens: list[int] = field(default_factory=list)
    written: str = ""
    finished: bool = False
    dice: torch.Generator | None = None

    def add(self, token: int) -> bool:
        """Append a token; whether the text is complete."""
        self.tokens.append(token)
        self.finished = token in self.ends or self._stopped()
        return self.finished or len(self.tokens) >= self.budget

    def _stopped(self) -> bool:
        """Whether a stop string has just been completed. A token is at least one byte of it."""
        if not self.stop:
            return False
        seen = self.tokens[-max(len(one.encode()) for one in self.stop) - 1 :]
        tail = self.tokenizer.decode(seen, skip_special_tokens=False)
        return any(one in tail for one in self.stop if one)


def _in_slots(
    model: PreTrainedModel,
    inner: PreTrainedModel,
    waiting: deque[_Text],
    count: int | None,
    temperature: float,
) -> Iterator[_Text]:
    """Write all texts; each is yielded once it is complete."""
    shared, active = _Shared(model, inner, list(waiting)), list[_Text]()
    most, longest = len(waiting), max(len(text.prompt) + text.budget for text in waiting)
    group = [waiting.popleft()]
    cache, logits = shared.read(group)
    if count is None:
        count = max(FEWEST, min(MOST, rows_that_fit(cache, longest)))
    slots = Slots(min(count, most))
    while True:
        slots.append(cache, [len(text.prompt) for text in group])
        del cache  # it can be as large as the rows themselves
        active += group
        yield from _advance(slots, active, logits, temperature, len(group))
        while active and not (waiting and len(active) < slots.rows):
            inputs = slots.inputs([text.tokens[-1] for text in active], inner.device)
            logits = model(**inputs).logits[:, -1]
            slots.advance()
            yield from _advance(slots, active, logits, temperature, len(active))
        if not waiting:
            return
        # a quarter at once: what they share is repeated for each
        group = shared.take(waiting, min(slots.rows - len(active), -(-slots.rows // 4)))
        cache, logits = shared.read(group)


def _advance(
    slots: Slots, active: list[_Text], logits: torch.Tensor, temperature: float, count: int
) -> Iterator[_Text]:
    """Give each of the last `count` texts its next token; yield and drop those complete."""
    first = len(active) - count
    tokens = _choose(logits, active[first:], temperature)
    for row in reversed(range(first, len(active))):
        text = active[row]
        if text.add(tokens[row - first]):
            slots.drop(row)
            active[row] = active[-1]
            del active[-1]
            yield text


class _Shared:
    """Reads prompts; what all of them begin with is read once."""

    def __init__(
        self, model: PreTrainedModel, inner: PreTrainedModel, texts: Sequence[_Text]
    ) -> None:
        from transformers import DynamicCache

        self.model, self.inner = model, inner
        self.slices = "logits_to_keep" in parameters_of(inner)
        self.tokens = tokens_at_once(inner.device)
        lowest = min((text.prompt for text in texts), key=list)
        highest = max((text.prompt for text in texts), key=list)
        pairs = zip(lowest[:-1], highest[:-1], strict=False)
        self.length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if len(texts) == 1 or self.length < SHORTEST_SHARED:
            self.length = 0
        self.cache = DynamicCache(config=inner.config)
        split = len(set(getattr(inner, "hf_device_map", {}).values())) > 1
        self.window = 0 if split else shortest_window(self.cache)
        if self.length:
            self._forward([lowest[: self.length]], self.cache, 0)

    def take(self, waiting: deque[_Text], most: int) -> list[_Text]:
        """The next texts, longest first: as many as are worth reading together.

        Those that a window cuts are of one length, because padding would push their tokens out;
        all are in a model on several devices, where places cannot be stated for each.
        """
        group = [waiting.popleft()]
        longest = len(group[0].prompt)
        most = min(most, max(1, self.tokens // (longest - self.length)))
        while waiting and len(group) < most:
            if longest > self.window and len(waiting[0].prompt) != longest:
                break
            group.append(waiting.popleft())
        return group

    def read(self, texts: Sequence[_Text]) -> tuple[Cache, torch.Tensor]:
        """Keys and values of prompts, padded behind; the logits after each: (texts, words)."""
        cache = copy.deepcopy(self.cache)
        if self.length:
            cache.batch_repeat_interleave(len(texts))
        rest = [text.prompt[self.length :] for text in texts]
        return cache, self._forward(rest, cache, self.length)

    def _forward(self, tokens: Sequence[Sequence[int]], cache: Cache, first: int) -> torch.Tensor:
        import torch

        device = self.inner.device
        longest = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=device)
        positions = torch.arange(first, first + longest, device=device).expand_as(ids)
        last = torch.tensor([len(row) - 1 for row in tokens], device=device)
        even = all(len(row) == longest for row in tokens)
        options = {"logits_to_keep": 1 if even else last[:, None]} if self.slices else {}
        done = self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **options
        )
        logits: torch.Tensor = done.logits
        if even or self.slices:
            return logits[:, -1]
        return logits[torch.arange(len(tokens), device=device), last]


def _choose(logits: torch.Tensor, texts: Sequence[_Text], temperature: float) -> list[int]:
    """The next token of each text. logits: (texts, words)."""
    import torch

    best = logits.max(dim=-1)
    if not best.values.isfinite().all():
        raise TaiaError(
            "generation: the model's logits are not numbers. Its weights or activations "
            "overflow: try dtype float32, or look at the fine-tuning"
        )
    if temperature == 0:
        greedy: list[int] = best.indices.tolist()
        return greedy
    chances = torch.softmax(logits.float() / temperature, dim=-1).cpu()
    tokens = []
    for text, row in zip(texts, chances, strict=True):
        if text.dice is None:
            text.dice = torch.Generator().manual_seed(hash((text.seed, text.index)) % 2**63)
        tokens.append(int(torch.multinomial(row, 1, generator=text.dice)))
    return tokens


def _by_transformers(
    model: PreTrainedModel,
    inner: PreTrainedModel,
    waiting: deque[_Text],
    count: int | None,
    temperature: float,
) -> Iterator[_Text]:
    """The same by transformers' own `generate`, in batches padded on the left."""
    import torch

    sampling: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if temperature:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    texts, count = list(waiting), count or FEWEST
    with torch.random.fork_rng():
        torch.manual_seed(texts[0].seed)
        for batch in (texts[at : at + count] for at in range(0, len(texts), count)):
            longest = len(batch[0].prompt)
            ends, stop = sorted(batch[0].ends), list(filter(None, batch[0].stop))
            missing = [longest - len(text.prompt) for text in batch]
            ids = [[0] * less + [*text.prompt] for less, text in zip(missing, batch, strict=True)]
            mask = [[0] * less + [1] * (longest - less) for less in missing]
            if stop:
                sampling |= {"stop_strings": stop, "tokenizer": batch[0].tokenizer}
            rows = model.generate(
                input_ids=torch.tensor(ids, device=inner.device),
                attention_mask=torch.tensor(mask, device=inner.device),
                max_new_tokens=max(text.budget for text in batch),
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                **sampling,
            )
            for text, row in zip(batch, rows[:, longest:].tolist(), strict=True):
                any(text.add(token) for token in row)
                yield text


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; restored after it."""
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _suits(model: PreTrainedModel, inner: PreTrainedModel) -> bool:
    """Whether the texts of this model can be written in slots."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    wishes = (getattr(inner.generation_config, name, None) for name in UNUSUAL)
    return all(wish in (None, 0, 1, []) for wish in wishes) and fits(inner)


def _texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    stop: tuple[str, ...],
    seed: int,
) -> list[_Text]:
    """The texts to write. No text grows beyond the longest input of the model."""
    many = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(many) != len(prompts):
        raise RecipeError(f"max_new_tokens: {len(many)} numbers for {len(prompts)} prompts")
    longest = longest_input(model)
    ends = end_tokens(model, tokenizer)
    return [
        _Text(index, prompt, min(budget, longest - len(prompt)), ends, stop, tokenizer, seed)
        for index, (prompt, budget) in enumerate(zip(prompts, many, strict=True))
    ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: those of the generation config and the tokenizer's."""
    stated = model.generation_config.eos_token_id
    stated = stated if isinstance(stated, list) else [stated]
    return frozenset(end for end in [*stated, tokenizer.eos_token_id] if end is not None)


def longest_input(model: PreTrainedModel) -> int:
    """Tokens that the model can read, prompt and answer together."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(stated) if stated else 2**63


def _check(
    model: PreTrainedModel, texts: Sequence[_Text], slots: int | None, temperature: float
) -> None:
    faults = [f"slots is {slots}: at least 1 is needed"] * (slots is not None and slots < 1)
    faults += [f"temperature is {temperature}: 0 or more is needed"] * (not temperature >= 0)
    for text in texts:
        if not len(text.prompt):
            faults.append(f"prompt {text.index} is empty: a model needs a token to start from")
        elif text.budget < 1:
            faults.append(
                f"prompt {text.index} has {len(text.prompt):,} tokens and leaves no room for an "
                f"answer: the model reads {longest_input(model):,}, max_new_tokens is at least 1"
            )
    if faults:
        raise RecipeError("generation: nothing can be written", faults)
