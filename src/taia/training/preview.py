"""What a training would do, told before it: `taia train --dry-run`. Nothing is written.

The data is read, checked, encoded and put in order as for the training itself; of the
model only tokenizer and configuration are loaded, not its weights. How much padding there would
be is told for attention under a mask; FlashAttention packs without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taia.load import load_config, load_tokenizer
from taia.sources import resolve
from taia.training.corpus import Part, make_corpus, read_data
from taia.training.data import refuse_beyond_context
from taia.training.distill import Outlook, outlook
from taia.training.loop import shares_of
from taia.training.mixture import parse_data
from taia.training.packing import packing_for
from taia.training.settings import Settings

__all__ = ["Preview", "preview"]

COLUMNS = ("source", "records", "examples", "tokens", "longest", "cut", "dropped", "used", "times")


@dataclass(frozen=True, slots=True)
class Preview:
    """What a training would see. `tokens`: in the whole training, repeats counted.

    `shares`: of every source in each tenth of the training, where there are several. `padding`:
    the share of what goes through the model that is no token, in plain batches and packed.
    """

    parts: tuple[Part, ...]
    steps: int
    examples: int
    tokens: int
    batch_size: int
    max_length: int
    facts: tuple[Mapping[str, Any], ...]
    shares: tuple[Mapping[str, float], ...]
    padding: Mapping[str, float]
    self_distill: Outlook | None = None

    def as_json(self) -> dict[str, Any]:
        """The same for `--json`."""
        return {
            "steps": self.steps,
            "examples": self.examples,
            "tokens": self.tokens,
            "padding": dict(self.padding),
            "self_distill": asdict(self.self_distill) if self.self_distill else None,
            "sources": [dict(fact) for fact in self.facts],
            "shares": [dict(share) for share in self.shares],
        }

    def __str__(self) -> str:
        """A table of the sources, the schedule in tenths, and what overlaps."""
        rows = [COLUMNS, *(_row(part) for part in self.parts)]
        lines = _table(rows)
        if self.shares:
            names = [part.name for part in self.parts]
            tenths = [f"{10 * at}%" for at in range(len(self.shares))]
            shown = [("share from", *tenths)]
            shown += [(n, *(f"{s[f'share_{n}']:.2f}" for s in self.shares)) for n in names]
            lines += ["", *_table(shown)]
        for part in self.parts:
            if part.exact + part.grams:
                done = "left out" if part.removed else "kept: remove_overlap: true leaves them out"
                lines += [
                    "",
                    f"{part.name}: {part.exact} records hold a held-out question, {part.grams} "
                    f"more share 13 words in a row with one; {done}",
                    *(f"  {one}" for one in part.overlaps),
                ]
        lines += [
            "",
            f"{self.steps} steps of {self.batch_size}: {self.examples:,} examples, "
            f"{self.tokens:,} tokens, at most {self.max_length:,} tokens an example",
            f"padding: {self.padding['plain']:.1%} of a batch, {self.padding['packed']:.1%} of it "
            "packed (--packing)",
        ]
        if self.self_distill:
            lines.append(str(self.self_distill))
        return "\n".join(lines)


def preview(
    base: str | Path, data: str | Path | Sequence[Any] | Mapping[str, Any], **options: Any
) -> Preview:
    """What `taia.finetune` would do with the same arguments. `options`: those of Settings.

    Raises RecipeError, DataError or SourceError, for whatever in settings or data would be
    refused; faults of the model itself are found when it is loaded.
    """
    settings = Settings(base=str(base), data=parse_data(data), **options)
    settings.check()
    source, read = resolve(settings.base), read_data(settings)
    tokenizer = load_tokenizer(source)
    corpus = make_corpus(settings, read, tokenizer)
    tokens = corpus.tokens(settings.batch_size)
    config = load_config(source)
    refuse_beyond_context(corpus.examples, corpus.where, config)
    part, _ = shares_of(config, corpus.longest, settings)
    packings = {"plain": None, "packed": packing_for(config)}
    padding = {
        name: round(1 - tokens[-1] / corpus.padded(settings.batch_size, part, packing)[-1], 4)
        for name, packing in packings.items()
    }
    tenth = max(1, -(-len(corpus.order) // 10))
    return Preview(
        parts=corpus.parts,
        steps=len(tokens),
        examples=len(corpus.order),
        tokens=tokens[-1],
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        facts=tuple(corpus.facts()),
        shares=tuple(corpus.shares(tenth)) if len(corpus.parts) > 1 else (),
        padding=padding,
        self_distill=outlook(settings, read, tokenizer) if settings.self_distill else None,
    )


def _row(part: Part) -> tuple[str, ...]:
    counts = (part.records, part.examples, part.tokens, part.longest, part.truncated, part.dropped)
    return (part.name, *(f"{n:,}" for n in counts), f"{part.used:,}", f"{part.repeats:.2f}")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
