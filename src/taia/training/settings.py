"""What decides the outcome of a training run, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from taia.errors import RecipeError, SelectionError, nearest
from taia.selection import Selection
from taia.training.mixture import Mixture

__all__ = ["Settings"]

METHODS = ("lora", "molora", "dora", "full")
PENALTIES = ("l2", "ewc", "kl")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one run; the defaults are the paper's.

    `batch_size` is the number of examples in one step over all devices;
    `per_device_batch_size` how many of them are in memory at once (None: as many
    as fit). `epochs` counts unless `max_steps` is given. `train` is a selection. `data`
    is a file, a folder or a hub data set, or a mixture (`taia.training.mixture.parse_data`).

    Of method molora: `experts` LoRAs of `rank` on each FFN projection, of which a token takes
    `experts_per_token`; `balance`, the strength of the load-balancing loss; `expert_dropout`,
    how likely a token cannot take an expert. `penalty` has strengths of `l2`, `ewc` and `kl`
    (`taia.training.penalties`); EWC is estimated on the first `fisher_examples` chats of
    `fisher_data`.

    Every `validate_steps` the loss on the chats of `validation` is taken, and a checkpoint made;
    the best one is the outcome. `patience`: stop after so many in a row without a better one.

    `self_distill`: the base first rewrites every answer (`taia.training.distill`).

    `packing`: several examples in a row, apart from each other (`taia.training.packing`).
    """

    base: str
    data: str | Mapping[str, Any]
    method: str = "lora"
    train: str = "all"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    experts: int = 4
    experts_per_token: int = 1
    balance: float = 0.0
    expert_dropout: float = 0.0
    penalty: Mapping[str, float] = field(default_factory=dict)
    fisher_data: str | None = None
    fisher_examples: int = 64
    learning_rate: float = 2e-4
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    per_device_batch_size: int | None = None
    max_length: int = 3072
    warmup_ratio: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    seed: int = 0
    max_examples: int | None = None
    validation: str | None = None
    validate_steps: int = 100
    patience: int | None = None
    dtype: str = "bfloat16"
    packing: bool = False
    self_distill: bool = False

    def check(self) -> None:
        """Raise RecipeError with every setting that states nothing runnable."""
        faults = [*self._words(), *self._numbers(), *self._experts(), *self._penalties()]
        faults += self._validation()
        try:
            if not Selection.parse(self.train).terms:
                faults.append(f"train {self.train!r}: selects nothing to train")
        except SelectionError as error:
            faults.append(f"train: {error}")
        if faults:
            raise RecipeError("these training settings cannot be run", faults)

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that a run reads, besides what its penalties do."""
        read = (self.data,) if isinstance(self.data, str) else Mixture.parse(self.data).paths
        return (self.base, *read)

    @property
    def data_names(self) -> str:
        """What a message calls the data."""
        return " or ".join(self.sources[1:])

    def total(self, examples: int) -> int:
        """How many examples go through training, repeats counted."""
        if self.max_steps:
            return self.max_steps * self.batch_size
        return max(1, round(self.epochs * examples))

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """One line for every setting in which `stored` (a JSON object) differs from this."""
        mine = asdict(self)
        return [
            f"{name}: {stored.get(name)!r} before, {value!r} now"
            for name, value in mine.items()
            if stored.get(name) != value
        ]

    def _words(self) -> list[str]:
        choices = (("method", METHODS), ("scheduler", SCHEDULERS), ("dtype", DTYPES))
        return [
            f"{name} {getattr(self, name)!r}: choose one of {', '.join(known)}"
            + nearest(str(getattr(self, name)), known)
            for name, known in choices
            if getattr(self, name) not in known
        ]

    def _numbers(self) -> list[str]:
        positive = ["rank", "alpha", "learning_rate", "epochs", "batch_size", "fisher_examples"]
        positive.append("validate_steps")
        optional = ["max_steps", "max_examples", "per_device_batch_size", "patience"]
        positive += [name for name in optional if getattr(self, name) is not None]
        faults = [
            f"{name} is {getattr(self, name)}: it must be above 0 and finite"
            for name in positive
            if not 0 < getattr(self, name) < math.inf
        ]
        faults += [
            f"{name} is {getattr(self, name)}: it must be at least 0 and below 1"
            for name in ("dropout", "expert_dropout")
            if not 0 <= getattr(self, name) < 1
        ]
        if not 0 <= self.warmup_ratio <= 1:
            faults.append(f"warmup_ratio is {self.warmup_ratio}: it must be between 0 and 1")
        faults += [
            f"{name} is {getattr(self, name)}: it must be at least 0 and finite"
            for name in ("weight_decay", "balance")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if self.max_examples is not None and not isinstance(self.data, str):
            faults.append("max_examples with a mixture: give it to its sources, or give size")
        if self.max_length < 2:
            faults.append(f"max_length is {self.max_length}: it must be at least 2")
        if not 0 <= self.seed < 2**32:
            faults.append(f"seed is {self.seed}: it must be between 0 and 2^32 - 1")
        part = self.per_device_batch_size
        if part and part > 0 and self.batch_size % part:
            faults.append(f"batch_size {self.batch_size} is no multiple of {part} per device")
        return faults

    def _experts(self) -> list[str]:
        if self.method != "molora":
            named = ("experts", "experts_per_token", "balance", "expert_dropout")
            return [
                f"{one.name} is a setting of method molora; the method is {self.method}"
                for one in fields(self)
                if one.name in named and getattr(self, one.name) != one.default
            ]
        if self.experts < 1 or self.experts_per_token < 1:
            return ["experts and experts_per_token must be at least 1"]
        if self.experts_per_token > self.experts:
            return [
                f"experts_per_token is {self.experts_per_token}, more than the {self.experts} "
                "experts there are"
            ]
        return []

    def _validation(self) -> list[str]:
        if self.validation is not None:
            return []
        named = ("validate_steps", "patience")
        return [
            f"{one.name} needs validation: chats on which to take the loss"
            for one in fields(self)
            if one.name in named and getattr(self, one.name) != one.default
        ]

    def _penalties(self) -> list[str]:
        faults = [
            f"penalty {name!r}: choose from {', '.join(PENALTIES)}" + nearest(name, PENALTIES)
            for name in self.penalty
            if name not in PENALTIES
        ]
        faults += [
            f"penalty {name} is {strength}: its strength must be above 0 and finite"
            for name, strength in self.penalty.items()
            if not 0 < strength < math.inf
        ]
        if self.method == "full" and "kl" in self.penalty:
            faults.append(
                "penalty kl with method full: there is no adapter to switch off, so the base would "
                "have to be in memory a second time; use lora, molora or dora, or l2 or ewc"
            )
        if ("ewc" in self.penalty) != (self.fisher_data is not None):
            faults.append(
                "penalty ewc and fisher_data go together: the first needs chats on which to "
                "estimate what matters to the base, the second is of no use without it"
            )
        return faults
