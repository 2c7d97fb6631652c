"""One model, one task: log-likelihoods and generated answers through lm-eval, without its noise.

The prompts, the metrics and the model wrapper are lm-eval's. What is added: the choices
of a question share one pass over their prompt (1.4 to 4 times fewer tokens on PIQA to
CommonsenseQA, the same numbers up to rounding), log-probabilities are taken in float32,
progress is a callback, and what cannot be scored is an error.

Limits: models whose cache is not a plain one for every layer (sliding windows,
state-space and linear-attention layers), prompts beyond the model's length, and
encoder-decoders take lm-eval's own path, which repeats the prompt for every choice.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError
from taia.evaluation.examples import example
from taia.evaluation.protocol import request_options, staged
from taia.evaluation.result import Example

if TYPE_CHECKING:
    import torch
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["padded", "score", "wrap"]

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: (prompt and choice as texts, prompt's tokens, choice's tokens)."""
Answer = tuple[float, bool]
"""lm-eval's: log-likelihood of the choice, and whether greedy decoding would give it."""

OUT_OF_MEMORY = "the memory does not suffice; use a smaller --batch-size"


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    change: Callable[[type[HFLM]], type[HFLM]] = lambda usual: usual,
) -> HFLM:
    """lm-eval's view of a model in memory; no weight is copied.

    `batch_size` counts (prompt, choice) pairs. The model may change under it (attach). `change`
    makes another class of the usual one.
    """
    with quiet_lm_eval():
        return change(staged(_wrapper_class()))(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
        )


def score(
    lm: HFLM,
    name: str,
    task: Task,
    *,
    limit: int | None = None,
    protocol: str = "chat",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Every example of `task`, or the first `limit`, as `lm` answers it now.

    `on_progress(done, total)` counts (prompt, choice) pairs. Raises EvaluationError.
    """
    import lm_eval

    lm.on_progress = on_progress
    with quiet_lm_eval():
        try:
            results = lm_eval.evaluate(
                lm,
                {"tasks": {name: task}},
                limit=limit,
                bootstrap_iters=0,
                **request_options(protocol),
            )
        except EvaluationError:
            raise
        except MemoryError as error:
            raise EvaluationError(f"{name}: {OUT_OF_MEMORY}") from error
        except (RuntimeError, ValueError, AssertionError, LookupError, SystemExit) as error:
            hint = f". {OUT_OF_MEMORY}" if "memory" in str(error) else ""
            reason = f"lm-eval stopped with {type(error).__name__}: {error}{hint}"
            raise EvaluationError(f"{name}: {reason}") from error
    samples = results["samples"][name]
    first = samples[0]["filter"]  # a task of lm-eval may read its answers in several ways
    return [example(name, task, sample) for sample in samples if sample["filter"] == first]


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Neither lm-eval's log nor its progress bars inside the block; restored after it.

    What it says of prompts that it cuts to the model's length still comes through.
    """
    import lm_eval.api.task as lm_eval_task

    logger = logging.getLogger("lm_eval")
    cut = logging.getLogger("lm_eval.models.huggingface")
    levels, bar = (logger.level, cut.level), lm_eval_task.tqdm

    def only_cuts(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or "maximum length" in record.getMessage()

    logger.setLevel(logging.ERROR)
    cut.setLevel(logging.WARNING)
    cut.addFilter(only_cuts)
    lm_eval_task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = bar
        cut.removeFilter(only_cuts)
        logger.setLevel(levels[0])
        cut.setLevel(levels[1])


@functools.cache
def _wrapper_class() -> type[HFLM]:
    """HFLM with shared prompts; made on first use, because lm-eval takes seconds to import."""
    from lm_eval.models.huggingface import HFLM as Parent  # noqa: N811 (the name of the parent)

    class SharedPrompts(Parent):  # type: ignore[misc]
        """lm-eval's model wrapper; the choices of one prompt share one pass over it."""

        on_progress: Callable[[int, int], None] | None = None

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self,
            requests: Sequence[Request],
            disable_tqdm: bool = True,  # noqa: ARG002
            override_bs: int | None = None,
        ) -> list[Answer]:
            answers: dict[int, Answer] = {}
            shareable = self._shareable(requests)
            for batch in _batches(requests, shareable, int(self.batch_size)):
                answers.update(zip(batch, self._shared(requests, batch), strict=True))
                if self.on_progress:
                    self.on_progress(len(answers), len(requests))
            rest = [index for index in range(len(requests)) if index not in answers]
            if rest:
                chosen = [requests[index] for index in rest]
                repeated = super()._loglikelihood_tokens(chosen, True, override_bs)
                answers.update(zip(rest, repeated, strict=True))
                if self.on_progress:
                    self.on_progress(len(answers), len(requests))
            return [answers[index] for index in range(len(requests))]

        def _shareable(self, requests: Sequence[Request]) -> list[int]:
            if self.backend != "causal" or not _plain_cache(self.model):
                return []
            return [
                index
                for index, (_, context, choice) in enumerate(requests)
                if len(context) > 1 and len(context) + len(choice) <= self.max_length
            ]

        def _shared(self, requests: Sequence[Request], batch: Sequence[int]) -> list[Answer]:
            pairs = [(requests[index][1], requests[index][2]) for index in batch]
            return shared_prompt_scores(self.model, pairs, self.device)

    return SharedPrompts


def shared_prompt_scores(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> list[Answer]:
    """Log-likelihood of every choice after its prompt; equal prompts are read once.

    `pairs`: token ids of (prompt, at least two; choice, at least one). The first pass
    reads each prompt but its last token; the second reads that token and the choice
    on the first one's cache, so all scores come from the second.
    """
    import torch

    prompts = list(dict.fromkeys(tuple(prompt) for prompt, _ in pairs))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    heads, head_mask = padded([prompt[:-1] for prompt in prompts], device)
    tails, tail_mask = padded([(prompt[-1], *choice[:-1]) for prompt, choice in pairs], device)
    rows = torch.tensor([row_of[tuple(prompt)] for prompt, _ in pairs], device=device)
    first = torch.tensor([len(prompt) - 1 for prompt, _ in pairs], device=device)
    keep_one = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}
    with torch.inference_mode():
        cache = model(
            input_ids=heads, attention_mask=head_mask, use_cache=True, **keep_one
        ).past_key_values
        cache.batch_select_indices(rows)
        logits = model(
            input_ids=tails,
            attention_mask=torch.cat([head_mask[rows], tail_mask], dim=1),
            position_ids=first[:, None] + torch.arange(tails.shape[1], device=device)[None, :],
            past_key_values=cache,
            use_cache=True,
        ).logits
    answers = []
    for row, (_, choice) in enumerate(pairs):  # one by one: all words in float32 are large
        wanted = torch.tensor(choice, device=device)
        scores = torch.log_softmax(logits[row, : len(choice)], dim=-1, dtype=torch.float32)
        picked = scores.gather(1, wanted[:, None]).sum()
        answers.append((float(picked), bool((scores.argmax(dim=-1) == wanted).all())))
    return answers


def _batches(requests: Sequence[Request], indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Requests with equal prompts together, longest first, at most `size` in a batch.

    More than `size` choices of one prompt still make one batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        groups.setdefault(tuple(requests[index][1]), []).append(index)

    def tokens(group: list[int]) -> int:
        return len(requests[group[0]][1]) + sum(len(requests[index][2]) for index in group)

    batch: list[int] = []
    for group in sorted(groups.values(), key=tokens, reverse=True):
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        batch += group
    if batch:
        yield batch


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right with 0, and the mask: both (sequences, longest), int64."""
    import torch

    longest = max(len(sequence) for sequence in sequences)
    ids = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _plain_cache(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values, so that a prompt's cache can be shared."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not {"position_ids", "past_key_values"} <= _arguments(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _arguments(model: PreTrainedModel) -> set[str]:
    """What the model's forward takes by name, below a PEFT wrapper if there is one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
