"""Under which name a base stores the weight that an adapter names.

PEFT names modules as the model has them in memory; transformers writes many families under
other names: `model.language_model.layers.0` of a Qwen2-VL in memory is `model.layers.0` in its
file, and a LLaVA's `language_model.model.layers.0`. So both names are followed to the live tensor
by the rules of `layouts.py`. An adapter of an older release, named as files are, takes the
same way. Where a model type has several classes, an adapter may have been trained on another
one than the base was saved from, so the layouts of all of them are tried.

Limits: a weight that loading makes of several stored ones, or cuts out of one, has no stored
name; experts that are stored one by one are the matter of `unstack.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from taia.changes import Shapes
from taia.checkpoint import Checkpoint, Tensor
from taia.layouts import Family, Place, families_of, family_of, place_of

__all__ = ["StoredNames"]

OUTERMOST = ("model", "transformer", "gpt_neox")
"""What a live name may begin with where the file leaves it out, for types without a table."""


@dataclass(frozen=True, slots=True)
class StoredNames:
    """The names of one base. What the rules say is looked up when the first name needs it."""

    base: Checkpoint
    _tables: list[tuple[Family, Mapping[str, tuple[str, Place]]]] = field(default_factory=list)

    def __call__(self, name: str) -> str:
        """The name under which the base stores a weight; `name` itself where it stores none."""
        return self._found(name) or name

    def has(self, name: str) -> bool:
        """Whether the base stores this weight, whole or otherwise, or may do so."""
        if self._own.is_unsure(name):
            return True
        return self._found(name) is not None or self.otherwise(name) is not None

    def refusal(self, name: str) -> str:
        """Why no delta can be added to a weight that has no stored name."""
        if self._own.is_unsure(name):
            return "transformers renames it by a rule that is not followed here; slice or attach it"
        other = self.otherwise(name)
        if other is not None:
            return f"the base stores it in parts, as {other}; slice or attach it"
        return "not stored in the base: it was made for another model"

    def otherwise(self, name: str) -> str | None:
        """The stored tensor that loading turns into this weight by more than another name."""
        for family, stored in self._placed():
            for live in (family.key(name), place_of(name, family).lives[0]):
                if live in stored and stored[live][1].operations:
                    return stored[live][0]
        return None

    def tensor(self, name: str) -> Tensor | None:
        """The stored tensor of a weight; None where the base stores none."""
        found = self._found(name)
        return None if found is None else self.base.tensors[found]

    @property
    def shapes(self) -> Shapes:
        """The shape under which the base stores a weight, by the name that an adapter gives it."""

        def shape(name: str) -> tuple[int, ...] | None:
            found = self.tensor(name)
            return None if found is None else found.shape

        return shape

    def _found(self, name: str) -> str | None:
        tensors = self.base.tensors
        if self._own.is_unsure(name):
            return None
        if name in tensors:
            return name
        for family, stored in self._placed():
            for live in (family.key(name), place_of(name, family).lives[0]):
                if live in stored and not stored[live][1].operations:
                    return stored[live][0]
        _, _, rest = name.partition(".")
        return next((n for n in (rest, *(f"{o}.{name}" for o in OUTERMOST)) if n in tensors), None)

    @property
    def _own(self) -> Family:
        return family_of(self.base.model_type, self.base.config)

    def _placed(self) -> list[tuple[Family, Mapping[str, tuple[str, Place]]]]:
        """For each layout of the model type: the key of a live tensor -> what is stored of it."""
        if not self._tables:
            for family in families_of(self.base.model_type, self.base.config):
                stored: dict[str, tuple[str, Place]] = {}
                for name in self.base.tensors:
                    place = place_of(name, family)
                    stored |= dict.fromkeys(place.lives, (name, place))
                self._tables.append((family, stored))
        return self._tables
