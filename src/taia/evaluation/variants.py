"""The variants of one model, one after another in memory.

With an adapter a variant is a switch on the base in memory (`taia.attach`); with a
fine-tuned checkpoint it is one of the two as it stands, or a splice in a temporary folder.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taia.errors import EvaluationError
from taia.evaluation.loracl import LORACL, choosing
from taia.evaluation.result import Variant, variant_folder
from taia.header import read_header
from taia.load import load_model, load_tokenizer, materialise, require_chat_template
from taia.selection import PRESETS, Selection
from taia.sources import Form, Source, resolve

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "VARIANTS",
    "checkpoint_of",
    "find_change",
    "identity",
    "parse_variants",
    "shared_tokenizer",
    "variant_models",
]

RECORDS = {"train.json", "taia.json", "report.html"}
"""What tells how a model was made, with times: no part of the model."""

VARIANTS = ("base", "vanilla", "taia", "taif")
"""What is compared where nothing else is asked for."""


def parse_variants(texts: Sequence[str]) -> tuple[Variant, ...]:
    """Presets, selections, NAME=SELECTION and loracl as variants.

    Raises SelectionError for a selection that does not parse, EvaluationError for a name
    given twice or a preset's name with another selection.
    """
    variants: list[Variant] = []
    faults: list[str] = []
    for text in texts:
        name, equals, selection = (part.strip() for part in text.partition("="))
        stated = selection if equals else name
        parsed = LORACL if stated == LORACL else str(Selection.parse(stated))
        if equals and not name:
            faults.append(f"{text!r}: no name stands before the =")
        if name in PRESETS and parsed != str(Selection.parse(PRESETS[name])):
            faults.append(f"{text!r}: the preset {name} is {PRESETS[name]!r}; choose another name")
        if name == LORACL and parsed != LORACL:
            faults.append(f"{text!r}: {LORACL} is a variant of its own; choose another name")
        if name in {variant.name for variant in variants}:
            faults.append(f"{name!r}: named twice")
        variants.append(Variant(name, parsed, variant_folder(name)))
    if not variants:
        faults.append(f"none is named; the usual ones are {','.join(VARIANTS)}")
    if faults:
        raise EvaluationError("the variants cannot be run:", faults)
    return tuple(variants)


def find_change(
    base: str | Path,
    adapter: str | Path | None,
    tuned: str | Path | None,
    variants: Sequence[Variant],
) -> Source | None:
    """The adapter or tuned checkpoint, found and of the right form; None for the base alone.

    Raises SourceError (not there), EvaluationError (wrong form, or variants without it).
    """
    text = adapter if adapter is not None else tuned
    if text is None:
        deltas = [one.name for one in variants if one.selection != "none"]
        if deltas:
            raise EvaluationError(
                f"{base}: variants {', '.join(deltas)} need something tuned; name it with "
                "--adapter or --tuned, or evaluate --variants base"
            )
        return None
    if adapter is None and any(one.selection == LORACL for one in variants):
        raise EvaluationError(
            f"{text}: {LORACL} switches an adapter on and off, prompt by prompt; a tuned "
            "checkpoint has nothing to switch. `taia splice --extract RANK` makes an adapter of it"
        )
    source = resolve(text)
    if adapter is not None and source.form is not Form.ADAPTER:
        raise EvaluationError(f"{text}: not an adapter but a whole model; give it with --tuned")
    if adapter is None and source.form is Form.ADAPTER:
        raise EvaluationError(f"{text}: an adapter, not a whole model; give it with --adapter")
    return source


def shared_tokenizer(
    base: str | Path, change: Source | None, *, chat: bool
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, so that all variants read the same tokens.

    A base without chat template lends the tuned side's, where there is one.
    """
    tokenizer = load_tokenizer(base)
    if not chat or getattr(tokenizer, "chat_template", None):
        return tokenizer
    if change is not None and (change.path / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(change)
    require_chat_template(tokenizer, base)
    return tokenizer


def variant_models(
    base: str | Path,
    change: Source | None,
    variants: Sequence[Variant],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    batch_size: int | None,
) -> Iterator[tuple[Variant, HFLM]]:
    """Each variant with a model that is that variant until the next is asked for."""
    from taia.evaluation.engine import wrap

    load = functools.partial(load_model, dtype=dtype)
    if change is not None and change.form is Form.ADAPTER:
        from taia.attach import attach

        live = attach(load(base), change.path)
        lm = wrap(live.model, tokenizer, batch_size)
        for variant in variants:
            if variant.selection == LORACL:
                change_class = functools.partial(choosing, live.using)
                yield variant, wrap(live.model, tokenizer, batch_size, change_class)
                continue
            with live.using(variant.selection):
                yield variant, lm
        return
    for variant in variants:
        with checkpoint_of(base, change, variant) as source:
            model = load(source)
        yield variant, wrap(model, tokenizer, batch_size)
        del model
        gc.collect()  # two models at once may not fit


@contextlib.contextmanager
def checkpoint_of(
    base: str | Path, change: Source | None, variant: Variant
) -> Iterator[str | Path]:
    """The checkpoint of a variant: one of the two as it is, or a splice in a temporary folder."""
    if change is None or variant.selection == "none":
        yield base
    elif variant.selection == "all":
        yield change.text
    else:
        from taia.splice import splice

        with tempfile.TemporaryDirectory(prefix="taia-eval-") as folder:
            out = Path(folder) / "spliced"
            splice(materialise(base), materialise(change), out, keep=variant.selection)
            yield out


def identity(source: Source) -> str:
    """A short hash that changes when the model's files do.

    Of weights (anything beyond 64 MB) the size and pieces of the content and of each of its
    tensors are taken, of the rest all of it; no times, so that a copy is the same model, and so is
    what a second training with the same outcome wrote.
    """
    digest = hashlib.sha256()
    files = [source.path] if source.path.is_file() else sorted(source.path.iterdir())
    for file in files:
        told = file.suffix in {".md", ".jsonl"} or file.name in RECORDS
        if not file.is_file() or told or file.name.startswith("."):
            continue
        digest.update(f"{file.name} {_content(file)}\n".encode())
    return digest.hexdigest()[:16]


def _content(file: Path) -> str:
    """The SHA-256 of a file; of a large one, of its size and of pieces of 16 KB."""
    size = file.stat().st_size
    if size <= 64 * 2**20:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for place in _pieces(file, size):
            opened.seek(place)
            digest.update(opened.read(2**14))
    return digest.hexdigest()


def _pieces(file: Path, size: int) -> Iterator[int]:
    """Where pieces begin: 256 over the file, and 4 over each tensor, or small ones were missed."""
    yield from (piece * (size - 2**14) // 255 for piece in range(256))
    if file.suffix == ".safetensors":
        for tensor in read_header(file).values():
            yield from (tensor.start + part * tensor.bytes // 4 for part in range(4))
