"""The data of a run: what its sources hold, what became of it, and in which order it comes.

One source is read, encoded and shuffled as ever; a mixture is read source by source, freed of
what overlaps with held-out records where that is asked for, and put in order by its schedule.
Nothing here needs the weights of a model: `taia train --dry-run` tells it before training.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from taia.errors import DataError, RecipeError
from taia.receipt import digest_of
from taia.training.batches import longest_row, training_order
from taia.training.data import Chat, Encoded, Example, digest, encode_all, read_chats
from taia.training.mixture import Mixture
from taia.training.overlap import Overlap, find_overlap, held_out_files, read_held_out
from taia.training.packing import Packing
from taia.training.schedule import curves_of, due, mixed_order
from taia.training.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Corpus", "Part", "digest_of_data", "make_corpus", "read_data"]

SHOWN = 3
"""Overlapping records that a part names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source, in numbers.

    records: those read, after `max_examples`; exact, grams: how many overlap with held-out
    records (`overlaps` shows a few); removed: how many were left out for that; examples: what
    can be trained on; longest: in tokens; used: examples in the whole training, repeats counted.
    """

    name: str
    path: str
    records: int
    examples: int
    truncated: int
    dropped: int
    tokens: int
    longest: int
    exact: int = 0
    grams: int = 0
    removed: int = 0
    overlaps: tuple[str, ...] = ()
    used: int = 0

    @property
    def repeats(self) -> float:
        """How often an example of it is used, on average."""
        return self.used / self.examples if self.examples else 0.0


@dataclass(frozen=True, slots=True)
class Corpus:
    """The examples of all sources, one source after another, and the order of training.

    `where`: the file and line of each example. `size`: how many examples make an epoch.
    """

    parts: tuple[Part, ...]
    examples: tuple[Example, ...]
    where: tuple[str, ...]
    order: tuple[int, ...]
    size: int
    digest: str

    @property
    def truncated(self) -> int:
        """Examples that were cut to max_length."""
        return sum(part.truncated for part in self.parts)

    @property
    def dropped(self) -> int:
        """Records without an assistant token within max_length."""
        return sum(part.dropped for part in self.parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest example that is trained on."""
        return longest_row([self.examples[number] for number in self.order])

    def tokens(self, batch_size: int) -> list[int]:
        """Tokens trained on up to and with every step."""
        total, sums = 0, []
        lengths = [len(example["input_ids"]) for example in self.examples]
        for start in range(0, len(self.order), batch_size):
            total += sum(lengths[number] for number in self.order[start : start + batch_size])
            sums.append(total)
        return sums

    def padded(self, batch_size: int, part: int, packing: Packing | None) -> list[int]:
        """Tokens that go through the model up to and with every step, padding counted.

        Each step's batch goes in parts of `part` examples, each padded to its longest row.
        """
        total, sums = 0, []
        lengths = [len(self.examples[number]["input_ids"]) for number in self.order]
        for start in range(0, len(lengths), batch_size):
            batch = lengths[start : start + batch_size]
            for at in range(0, len(batch), part):
                here = batch[at : at + part]
                total += packing.tokens(here) if packing else len(here) * max(here)
            sums.append(total)
        return sums

    def shares(self, batch_size: int) -> list[dict[str, float]]:
        """`share_NAME` of every step's batch; empty mappings where there is one source."""
        steps = range(0, len(self.order), batch_size)
        if len(self.parts) == 1:
            return [{} for _ in steps]
        owner = [at for at, part in enumerate(self.parts) for _ in range(part.examples)]
        shares = []
        for start in steps:
            owners = [owner[number] for number in self.order[start : start + batch_size]]
            shares.append({
                f"share_{part.name}": round(owners.count(at) / len(owners), 6)
                for at, part in enumerate(self.parts)
            })  # fmt: skip
        return shares

    def facts(self) -> list[dict[str, Any]]:
        """The parts as train.json and a dry run tell them."""
        return [asdict(part) | {"repeats": round(part.repeats, 4)} for part in self.parts]


def read_data(settings: Settings) -> list[list[Chat]]:
    """The chats of every source, in the order of the sources. Raises DataError."""
    if isinstance(settings.data, str):
        return [read_chats(settings.data, max_examples=settings.max_examples)]
    return _read(Mixture.parse(settings.data))


def make_corpus(
    settings: Settings, read: Sequence[Sequence[Chat]], tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """Encode and order what `read_data` has read.

    Raises DataError where a source has nothing to train on, RecipeError for a mixture that
    needs more of a source than there is.
    """
    if isinstance(settings.data, str):
        return _plain(settings.data, read[0], settings, tokenizer)
    mixture = Mixture.parse(settings.data)
    held_out = read_held_out(mixture.held_out) if mixture.held_out else None
    parts, groups = [], []
    for source, chats in zip(mixture.sources, read, strict=True):
        overlaps = find_overlap(chats, held_out) if held_out else {}
        left_out = set(overlaps) if mixture.remove_overlap else set()
        kept = [chat for at, chat in enumerate(chats) if at not in left_out]
        part, done = _encoded(source.name, source.path, kept, tokenizer, settings)
        parts.append(_with_overlaps(part, len(chats), overlaps))
        groups.append(done)
    counts = [part.examples for part in parts]
    size = mixture.size or _size(mixture, counts)
    order = mixed_order(
        [[len(example["input_ids"]) for example in group.examples] for group in groups],
        [part.name for part in parts],
        curves_of(mixture, counts),
        settings.batch_size,
        settings.total(size),
        settings.seed,
    )
    used = [0] * len(parts)
    starts = list(itertools.accumulate(counts))
    for number in order:
        used[bisect.bisect_right(starts, number)] += 1
    told = tuple(replace(part, used=n) for part, n in zip(parts, used, strict=True))
    _refuse_repeats(mixture, settings, told)
    return Corpus(
        told,
        tuple(example for group in groups for example in group.examples),
        tuple(where for group in groups for where in group.where),
        tuple(order),
        size,
        _digest(mixture, read),
    )


def digest_of_data(data: str | Mapping[str, Any], max_examples: int | None) -> str:
    """SHA-256 of what `data` names, read from there. Raises DataError."""
    if isinstance(data, str):
        return digest(data, read_chats(data, max_examples=max_examples))
    mixture = Mixture.parse(data)
    if mixture.held_out:
        read_held_out(mixture.held_out)
    return _digest(mixture, _read(mixture))


def _read(mixture: Mixture) -> list[list[Chat]]:
    """The chats of every source; the faults of all of them together."""
    read, faults = [], []
    for source in mixture.sources:
        try:
            read.append(read_chats(source.path, max_examples=source.max_examples))
        except DataError as error:
            faults += [f"{source.name}: {fault}" for fault in error.faults or [str(error)]]
    if faults:
        raise DataError("the sources of the mixture cannot be read", faults)
    return read


def _digest(mixture: Mixture, read: Sequence[Sequence[Chat]]) -> str:
    total = hashlib.sha256()
    for source, chats in zip(mixture.sources, read, strict=True):
        total.update(f"{source.name} {digest(source.path, chats)}\n".encode())
    for file in held_out_files(mixture.held_out):
        total.update(f"{digest_of(file)}\n".encode())
    return total.hexdigest()


def _plain(
    source: str, chats: Sequence[Chat], settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """The corpus of one source, without shares."""
    part, done = _encoded("data", source, chats, tokenizer, settings)
    lengths = [len(example["input_ids"]) for example in done.examples]
    total = settings.total(len(lengths))
    order = training_order(lengths, settings.batch_size, total, settings.seed)
    return Corpus(
        (replace(part, used=len(order)),),
        done.examples,
        done.where,
        tuple(order),
        len(lengths),
        digest(source, chats),
    )


def _encoded(
    name: str,
    path: str,
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> tuple[Part, Encoded]:
    """Chats as examples, and what became of them. Raises DataError where none is left."""
    if not chats:
        raise DataError(f"{path}: every record overlaps with the held-out ones; nothing is left")
    try:
        done = encode_all(chats, tokenizer, settings.max_length)
    except DataError as error:
        raise error if error.faults else DataError(f"{path}: {error}") from error
    lengths = [len(example["input_ids"]) for example in done.examples]
    part = Part(
        name=name,
        path=path,
        records=len(chats),
        examples=len(lengths),
        truncated=done.truncated,
        dropped=done.dropped,
        tokens=sum(lengths),
        longest=max(lengths),
    )
    return part, done


def _with_overlaps(part: Part, records: int, overlaps: Mapping[int, Overlap]) -> Part:
    exact = sum(one.exact for one in overlaps.values())
    shown = [f"{one.where} with {one.file}" for one in itertools.islice(overlaps.values(), SHOWN)]
    return replace(
        part,
        records=records,
        removed=records - part.records,
        exact=exact,
        grams=len(overlaps) - exact,
        overlaps=tuple(shown),
    )


def _size(mixture: Mixture, counts: Sequence[int]) -> int:
    """Examples of an epoch where none are stated: the most without using one twice."""
    if mixture.sources[0].share is None:
        return sum(counts)
    whole = np.ones(1)
    dues = [due(curve, whole).item() for curve in curves_of(mixture, counts)]
    return max(1, min(int(n / part + 1e-9) for n, part in zip(counts, dues, strict=True) if part))


def _refuse_repeats(mixture: Mixture, settings: Settings, parts: Sequence[Part]) -> None:
    """Raise RecipeError where examples come again more often than the epochs say."""
    times = 1 if settings.max_steps else math.ceil(settings.epochs)
    faults = [
        f"{part.name}: {part.used} examples are needed and {part.examples} are there, so each "
        f"would be used {part.repeats:.2f} times on average, not {times}"
        for part in parts
        if part.used > times * part.examples
    ]
    if faults and not mixture.repeat:
        raise RecipeError(
            "the mixture needs more data than there is. Say repeat: true, a smaller size or share, "
            "or fewer steps",
            faults,
        )
