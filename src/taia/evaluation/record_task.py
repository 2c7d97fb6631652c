"""lm-eval's task for our records: its few-shot examples are of the question's own subject.

Everything else is lm-eval's: YAML states prompts, choices and metrics. Made on first use,
because lm-eval takes seconds to import.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

__all__ = ["record_task"]


@functools.cache
def record_task() -> type[ConfigurableTask]:
    """The class that our YAML files name."""
    from lm_eval.api.task import ConfigurableTask as Parent

    class RecordTask(Parent):  # type: ignore[misc]
        """A YAML task whose few-shot examples share the subject of the question."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: config[key] for key in config if key != "class"})
            self.worked: list[dict[str, Any]] = list(self.dataset["worked"])

        def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> Any:
            if num_fewshot > 0:
                self.sampler.replace_df(self.shots(doc, num_fewshot))
            return super().fewshot_context(doc, num_fewshot, **options)

        def shots(self, doc: dict[str, Any], count: int) -> list[dict[str, Any]]:
            """The worked examples before a question, the first ones of its subject where it counts.

            A worked example that is the question itself is passed over.
            """
            mine = doc["subject"] if self.config.metadata.get("shots_by_subject") else None
            pool = [
                one
                for one in self.worked
                if mine in (None, one["subject"]) and _asked(one) != _asked(doc)
            ]
            if len(pool) < count:
                what = f" of the subject {doc['subject']}" if mine else ""
                raise EvaluationError(
                    f"{self.config.task}: {count} few-shot examples are asked for; there are "
                    f"{len(pool)}{what} beside the questions that are scored"
                )
            return pool[:count]

    return RecordTask


def _asked(record: dict[str, Any]) -> Any:
    return record.get("question") or record["document"]
