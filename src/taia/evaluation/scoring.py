"""One model, one task: lm-eval's requests asked, its metrics taken, example by example.

lm-eval's task builds the requests, filters the responses and scores them, as in its own
`evaluate`; here an example is scored as soon as all its responses are there and handed on, so
that what is computed can be kept. What cannot be scored is an error.

Limits: metrics of single examples, not of a whole data set (perplexity, a corpus BLEU).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError
from taia.evaluation.cache import Cache
from taia.evaluation.examples import example, example_id
from taia.evaluation.protocol import in_stages, request_options
from taia.evaluation.quiet import quiet_lm_eval
from taia.evaluation.result import Example
from taia.stopping import refuse_stopped

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

__all__ = ["quiet_lm_eval", "score"]

STREAMED = ("loglikelihood", "generate_until")
"""Kinds of requests whose answers are told as they come."""

PART = 2048
"""Requests at a time where they are not."""

OUT_OF_MEMORY = "the memory does not suffice; use a smaller --batch-size"


def score(
    lm: HFLM,
    name: str,
    task: Task,
    *,
    limit: int | None = None,
    protocol: str = "chat",
    seed: int = 0,
    done: Mapping[str, Example] | None = None,
    cache: Cache | None = None,
    on_examples: Callable[[Sequence[Example]], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Every example of `task`, or the first `limit`, as `lm` answers it now; in their order.

    `done`: examples that are there already, by their id; those asked with another prompt are
    asked again. `cache`: answers of earlier runs; it gets the new ones. `on_examples` is given
    what is new as it comes, in batches. `on_progress(done, total)` counts requests. `seed` draws
    the few-shot examples. Raises EvaluationError.
    """
    with quiet_lm_eval():
        try:
            asked = _Asked(lm, name, task, limit, protocol, seed, done or {})
            asked.ask(cache, on_examples, on_progress)
        except EvaluationError:
            raise
        except MemoryError as error:
            raise EvaluationError(f"{name}: {OUT_OF_MEMORY}") from error
        except (RuntimeError, ValueError, AssertionError, LookupError, SystemExit) as error:
            refuse_stopped()  # SIGTERM is a SystemExit too, and libraries wrap it
            hint = f". {OUT_OF_MEMORY}" if "memory" in str(error) else ""
            reason = f"lm-eval stopped with {type(error).__name__}: {error}{hint}"
            raise EvaluationError(f"{name}: {reason}") from error
    return [asked.examples[number] for number in sorted(asked.examples)]


class _Asked:
    """The requests of a task, and the examples of which all responses are there."""

    def __init__(
        self,
        lm: HFLM,
        name: str,
        task: Task,
        limit: int | None,
        protocol: str,
        seed: int,
        done: Mapping[str, Example],
    ) -> None:
        self.lm, self.name, self.task = lm, name, task
        task.set_fewshot_seed(seed=seed)
        options = request_options(protocol)
        task.build_all_requests(
            limit=limit,
            chat_template=lm.apply_chat_template if options["apply_chat_template"] else None,
            tokenizer_name=lm.tokenizer_name,
            **options,
        )
        self.instances: dict[int, list[Instance]] = {}
        for instance in task.instances:
            self.instances.setdefault(instance.doc_id, []).append(instance)
        for instances in self.instances.values():
            instances.sort(key=lambda instance: instance.idx)
        self.docs = dict(task.doc_iterator(rank=0, limit=limit, world_size=1))
        self.examples: dict[int, Example] = {}
        for number, doc in self.docs.items():
            kept = done.get(example_id(doc, number))
            if kept is not None and kept.prompt_hash == self._prompt_hash(number)[:16]:
                self.examples[number] = kept

    def ask(
        self,
        cache: Cache | None,
        on_examples: Callable[[Sequence[Example]], None] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Have every request answered, kind by kind of request."""
        kinds: dict[str, list[Instance]] = {}
        for instance in self.task.instances:
            repeated = [instance] * (instance.repeats or 1)
            kinds.setdefault(instance.request_type, []).extend(repeated)
        total = sum(map(len, kinds.values()))
        finished = 0

        def take(
            instances: Sequence[Instance], answers: Mapping[int, Any], keep: Cache | None
        ) -> None:
            nonlocal finished
            finished += len(answers)
            ready = self._take(instances, answers)
            if keep:
                keep.keep({_key(keep, instances[place]): one for place, one in answers.items()})
            if ready and on_examples:
                on_examples(ready)
            if on_progress:
                on_progress(finished, total)

        for kind, instances in kinds.items():
            if kind not in STREAMED:
                take(instances, dict(enumerate(getattr(self.lm, kind)(instances))), None)
                continue
            finished += len(self._known(instances))
            stored = None if any(map(_is_sample, instances)) else cache
            if stored:
                take(instances, self._found(stored, instances), None)
            self._answer(kind, instances, functools.partial(take, instances, keep=stored))

    def _answer(
        self,
        kind: str,
        instances: Sequence[Instance],
        take: Callable[[Mapping[int, Any]], None],
    ) -> None:
        """Have the model answer what is not known, telling `take` as it comes."""
        if not hasattr(self.lm, "on_answers"):
            for part in self._by_others(kind, instances):
                take(part)
            return
        self.lm.known, self.lm.on_answers = self._known(instances), take
        try:
            getattr(self.lm, kind)(instances)
        finally:
            self.lm.known, self.lm.on_answers = frozenset(), None

    def _by_others(self, kind: str, instances: Sequence[Instance]) -> Iterator[dict[int, Any]]:
        """The answers of a model class that tells nothing before its end, part by part."""
        known = self._known(instances)
        needed = [place for place in range(len(instances)) if place not in known]
        ask = getattr(self.lm, kind)
        for at in range(0, len(needed), PART):
            part = needed[at : at + PART]
            asked = [instances[place] for place in part]
            told = in_stages(ask, asked) if kind == "generate_until" else ask(asked)
            yield dict(zip(part, told, strict=True))

    def _take(self, instances: Sequence[Instance], answers: Mapping[int, Any]) -> list[Example]:
        """Set down answers; the examples that are complete with them."""
        for place, answer in answers.items():
            instances[place].resps.append(answer)
        touched = {instances[place].doc_id for place in answers}
        ready = [number for number in sorted(touched) if self._is_ready(number)]
        for number in ready:
            self.examples[number] = self._example(number)
        return [self.examples[number] for number in ready]

    def _found(self, cache: Cache, instances: Sequence[Instance]) -> dict[int, Any]:
        """Answers from the cache, of documents that it answers whole."""
        known = self._known(instances)
        open_places = [place for place in range(len(instances)) if place not in known]
        keys = {place: _key(cache, instances[place]) for place in open_places}
        found = cache.find(list(dict.fromkeys(keys.values())))
        lacking = {instances[place].doc_id for place in open_places if keys[place] not in found}
        return {
            place: _answer(found[keys[place]])
            for place in open_places
            if instances[place].doc_id not in lacking
        }

    def _known(self, instances: Sequence[Instance]) -> AbstractSet[int]:
        """The requests whose example is there."""
        return frozenset(
            index for index, one in enumerate(instances) if one.doc_id in self.examples
        )

    def _has_all(self, number: int) -> bool:
        return all(len(one.resps) >= (one.repeats or 1) for one in self.instances[number])

    def _is_ready(self, number: int) -> bool:
        return number not in self.examples and self._has_all(number)

    def _prompt_hash(self, number: int) -> str:
        first = self.instances[number][0].arguments[0]
        return hashlib.sha256(first.encode("utf-8")).hexdigest()

    def _example(self, number: int) -> Example:
        """The example of a document: filters, metrics, one line of a result file."""
        instances = self.instances[number]
        for ensemble in self.task._filters:
            ensemble.apply(instances)
        name = next(iter(instances[0].filtered_resps))
        responses = [one.filtered_resps[name] for one in instances]
        doc = self.docs[number]
        metrics = self.task.process_results(doc, responses)
        return example(
            self.name,
            self.task,
            {
                "doc_id": number,
                "doc": doc,
                "target": self.task.doc_to_target(doc),
                "filtered_resps": responses,
                "prompt_hash": self._prompt_hash(number),
                "metrics": list(metrics),
                **metrics,
            },
        )


def _key(cache: Cache, instance: Instance) -> bytes:
    return cache.key(instance.request_type, instance.args)


def _is_sample(instance: Instance) -> bool:
    """Whether its answer is drawn by chance: several of one request are not one answer."""
    if instance.request_type != "generate_until":
        return False
    arguments = instance.args[1]
    chance = float(arguments.get("temperature") or 0) > 0
    return bool(arguments.get("do_sample", chance))


def _answer(stored: Any) -> Any:
    """An answer as lm-eval's models give it: JSON has no pairs."""
    return tuple(stored) if isinstance(stored, list) else stored
