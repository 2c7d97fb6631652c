"""lm-eval's model class, reading what questions share once: `wrap`.

Log-likelihoods: the choices of a question are a trie that one forward pass reads (`trie`,
`tree_pass`), after a prefix that many questions share and that is read once; batches are sorted
by length and hold at most so many tokens; words are computed where they are scored and nowhere
else, in float32. Prompts, metrics and truncation are lm-eval's, and so are the numbers, up to
rounding. Texts are written by `texts`.

Answers are told as they come (`on_answers`), so that they can be kept. Which questions stand in
a batch together depends on all that are asked, never on which are answered already, so a run
that goes on rounds as one that was not interrupted.

Limits: models that cannot read tries, and longrope beyond its original length, take lm-eval's own
path, which repeats the prompt for every choice.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from taia.evaluation.quiet import quiet_lm_eval
from taia.evaluation.texts import Told, answer_texts, write_texts
from taia.evaluation.tree_pass import Encoded, TreePass, tree_pass
from taia.evaluation.trie import Trie, shared_prefixes
from taia.slots import steady_length, tokens_at_once

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "Request", "padded", "wrap"]

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: (prompt and choice as texts, prompt's tokens, choice's tokens)."""
Answer = tuple[float, bool]
"""lm-eval's: log-likelihood of the choice, and whether greedy decoding would give it."""

QUESTIONS = 32
"""Questions in a batch, where nobody states how many."""
FILLED = 256
"""Tokens from which on a batch is worth its pass: a much shorter question then begins another."""
FULL = 0.8
"""Much shorter: below this share of the longest one, the rest of its row being padding."""
LOGITS = 2**27
"""Scores at once, places x vocabulary: 0.25 GiB in bfloat16."""
SOFTMAX = 2**22
"""Of which so many at a time in float32."""


@dataclass(slots=True)
class Question:
    """The requests of one prompt as a trie.

    `wanted`: request -> the (node, token) pairs that add up to its log-likelihood.
    """

    trie: Trie = field(default_factory=Trie)
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def places(self) -> list[int]:
        """The nodes after which words are scored."""
        return sorted({node for pairs in self.wanted.values() for node, _ in pairs})


@dataclass(frozen=True, slots=True)
class Batch:
    """Questions that are read together, after a prefix that they share."""

    prefix: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def requests(self) -> set[int]:
        """The indices of the requests that it answers."""
        return {index for question in self.questions for index in question.wanted}


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None = None,
    change: Callable[[type[HFLM]], type[HFLM]] = lambda usual: usual,
) -> HFLM:
    """lm-eval's view of a model in memory; no weight is copied.

    `batch_size`: questions in a batch and texts at once, at most; None is 32 questions, and as
    many texts as `taia.generation` chooses. The model may change under it (attach).
    `change` makes another class of the usual one.
    """
    with quiet_lm_eval():
        lm = change(one_pass())(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size or QUESTIONS,
            softmax_dtype="float32",
        )  # fmt: skip
    lm.slots = batch_size
    return lm


def plan(
    requests: Sequence[Request], *, longest: int, questions: int, tokens: int, places: int
) -> list[Batch]:
    """The requests in batches, those of a prefix together and longest first.

    `longest`: tokens that the model reads, at most; what is longer loses its beginning, as in
    lm-eval. `questions`, `tokens` (with padding) and `places` limit a batch; a question that is
    larger alone stands alone.
    """
    faults = [index for index, (_, _, choice) in enumerate(requests) if len(choice) > longest]
    if faults:
        raise ValueError(f"{len(faults)} choices are longer than the {longest} tokens of the model")
    groups: dict[tuple[int, ...], list[int]] = {}
    kept: list[tuple[int, ...]] = []
    for index, (_, prompt, choice) in enumerate(requests):
        whole = (*prompt, *choice)[-(longest + 1) :]
        if len(prompt) + len(choice) > longest + 1:
            _warn_of_cut(len(prompt), len(choice), longest)
        kept.append(whole)
        groups.setdefault(whole[: len(whole) - len(choice)], []).append(index)
    prompts = list(groups)
    batches = []
    for prefix in shared_prefixes(prompts):
        made = []
        for member in prefix.members:
            question = Question()
            for index in groups[prompts[member]]:
                sequence = kept[index][len(prefix.tokens) :]
                wanted = sequence[-len(requests[index][2]) :]
                nodes = question.trie.insert(sequence[:-1])[-len(wanted) :]
                question.wanted[index] = list(zip(nodes, wanted, strict=True))
            made.append(question)
        made.sort(key=lambda question: -len(question.trie))
        for part in _parts(made, questions, tokens, places):
            batches.append(Batch(prefix.tokens, tuple(part)))
    return batches


def _parts(
    sorted_questions: Sequence[Question], questions: int, tokens: int, places: int
) -> Iterator[list[Question]]:
    part: list[Question] = []
    scored = 0
    for question in sorted_questions:
        more = len(question.places)
        read = len(part) * len(part[0].trie) if part else 0
        if part and (
            len(part) == questions
            or (read >= FILLED and len(question.trie) < FULL * len(part[0].trie))
            or (len(part) + 1) * len(part[0].trie) > tokens
            or scored + more > places
        ):
            yield part
            part, scored = [], 0
        part.append(question)
        scored += more
    if part:
        yield part


def score_batch(reader: TreePass, batch: Batch, prefix: Encoded) -> dict[int, Answer]:
    """The answers to the requests of a batch. Float32 over logits in the model's dtype."""
    places = [
        (row, node) for row, question in enumerate(batch.questions) for node in question.places
    ]
    row_of = {place: row for row, place in enumerate(places)}
    asked = [
        (index, row_of[row, node], token)
        for row, question in enumerate(batch.questions)
        for index, pairs in question.wanted.items()
        for node, token in pairs
    ]
    logits = reader.logits([question.trie for question in batch.questions], places, prefix)
    values, best = _log_probabilities(logits, [row for _, row, _ in asked], [t for *_, t in asked])
    answers: dict[int, Answer] = {}
    for (index, _, _), value, hit in zip(asked, values, best, strict=True):
        total, greedy = answers.get(index, (0.0, True))
        answers[index] = (total + value, greedy and hit)
    return answers


def _log_probabilities(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int]
) -> tuple[list[float], list[bool]]:
    """Of token `tokens[i]` in row `rows[i]`; and whether it is the likeliest of its row.

    By the function that lm-eval takes: it is off by some 1e-5 a word, and so both are equally.
    """
    import torch

    row = torch.tensor(rows, device=logits.device)
    token = torch.tensor(tokens, device=logits.device)
    values = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    best = torch.empty(len(rows), dtype=torch.bool, device=logits.device)
    size, first = max(1, SOFTMAX // logits.shape[1]), 0
    for part in logits.split(size):  # all in float32 are large
        wide = torch.log_softmax(part.float(), dim=-1)
        (here,) = torch.where((row >= first) & (row < first + size))
        values[here] = wide[row[here] - first, token[here]]
        best[here] = wide.argmax(dim=-1)[row[here] - first] == token[here]
        first += size
    return values.tolist(), best.tolist()


@functools.cache
def one_pass() -> type[HFLM]:  # noqa: C901 (a class with short methods)
    """The class; made on first use, because lm-eval takes seconds to import."""
    from lm_eval.models.huggingface import HFLM as Parent  # noqa: N811 (the name of the parent)

    class OnePass(Parent):  # type: ignore[misc]
        """What is added to lm-eval's model class: what requests share is read once.

        `known`: requests, by their index, whose answers are not needed; theirs are None.
        `on_answers` is given those of the others as they come.
        """

        on_answers: Callable[[Mapping[int, Any]], None] | None = None
        known: AbstractSet[int] = frozenset()
        slots: int | None = None

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.tok_encode: Any = functools.lru_cache(maxsize=2**17)(super().tok_encode)

        @functools.cached_property
        def reader(self) -> TreePass | None:
            """The model as a reader of tries, if it can be one."""
            return tree_pass(self.model) if self.backend == "causal" else None

        @functools.cached_property
        def steady(self) -> int:
            """Tokens up to which what was read before may be lent to what follows."""
            return steady_length(self.model)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self,
            requests: Sequence[Request],
            disable_tqdm: bool = True,  # noqa: ARG002
            override_bs: int | None = None,  # noqa: ARG002
        ) -> list[Answer | None]:
            return _told(self, requests)

        def answer(
            self, requests: Sequence[Request], known: AbstractSet[int]
        ) -> Generator[dict[int, Answer]]:
            """The answers by index, batch by batch; batches of which all are known are left out."""
            longest = max((len(prompt) + len(choice) for _, prompt, choice in requests), default=0)
            if self.reader is not None and min(longest, self.max_length) <= self.steady:
                yield from _read(self.reader, self._plan(requests), known)
                return
            for batch in _repeated(requests, int(self.batch_size), known):
                asked = [requests[index] for index in batch]
                answers = super()._loglikelihood_tokens(asked, disable_tqdm=True)
                yield dict(zip(batch, answers, strict=True))

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002
            return answer_texts(self, requests)

        def write(self, requests: Sequence[Instance], told: Told | None = None) -> list[str]:
            """What the model writes to each request of one stage."""
            usual = functools.partial(super().generate_until, disable_tqdm=True)
            return write_texts(self, requests, usual, told)

        def _plan(self, requests: Sequence[Request]) -> list[Batch]:
            words = self.model.get_output_embeddings().weight.shape[0]
            return plan(
                requests,
                longest=self.max_length,
                questions=int(self.batch_size),
                tokens=tokens_at_once(self.device),
                places=max(1, LOGITS // words),
            )

    return OnePass


def _told(lm: Any, requests: Sequence[Request]) -> list[Answer | None]:
    """The answers of an OnePass, told as they come; None for those that are known."""
    answers: dict[int, Answer] = {}
    with contextlib.closing(lm.answer(requests, lm.known)) as parts:
        for part in parts:
            fresh = {index: part[index] for index in part.keys() - lm.known}
            answers.update(fresh)
            if lm.on_answers:
                lm.on_answers(fresh)
    return [answers.get(index) for index in range(len(requests))]


def _read(
    reader: TreePass, batches: Sequence[Batch], known: AbstractSet[int]
) -> Iterator[dict[int, Answer]]:
    """The answers of each batch that is not known whole."""
    prefix: tuple[int, ...] = ()
    encoded = Encoded(0)
    for batch in batches:
        if batch.requests <= known:
            continue
        if batch.prefix != prefix:
            encoded, prefix = reader.encode(batch.prefix), batch.prefix
        yield score_batch(reader, batch, encoded)


def _repeated(
    requests: Sequence[Request], size: int, known: AbstractSet[int]
) -> Iterator[list[int]]:
    """Batches for lm-eval's own path: the choices of a prompt together, longest first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (_, prompt, _) in enumerate(requests):
        groups.setdefault(tuple(prompt), []).append(index)
    batch: list[int] = []
    for group in sorted(groups, key=len, reverse=True):
        if batch and len(batch) + len(groups[group]) > size:
            if not set(batch) <= known:
                yield batch
            batch = []
        batch = batch + groups[group]
    if not set(batch) <= known:
        yield batch


def _warn_of_cut(prompt: int, choice: int, longest: int) -> None:
    """Told as lm-eval tells it, through its logger."""
    logging.getLogger("lm_eval.models.huggingface").warning(
        "Combined length of context (%d) and continuation (%d) exceeds model's maximum length "
        "(%d). Truncating %d tokens from the left.",
        prompt, choice, longest, prompt + choice - longest,
    )  # fmt: skip


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right with 0, and the mask: both (sequences, longest), int64."""
    import torch

    longest = max(len(sequence) for sequence in sequences)
    ids = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
