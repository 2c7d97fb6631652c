"""A fine-tune as a LoRA adapter: the kept deltas of a splice, at a low rank.

    taia splice BASE TUNED OUT --extract 64 --keep attention

Each delta matrix becomes the nearest product of two factors (`factorise.py`), so that base,
fine-tune and TAIA can be served from one base model. What it costs is measured, not guessed:
`extract.json` holds the relative error of every matrix, ||delta - B @ A|| / ||delta||, of the
factors as they are stored, and the error of all together. With the rank `full` nothing is cut.

Vectors (norms, biases) have no factors. Where they change they are kept whole: PEFT loads
them, vLLM does not. One matrix is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taia.adapter import CONFIG, WEIGHTS
from taia.arrays import DTYPES, Array, read_array, widen
from taia.card import card
from taia.checkpoint import BITS, Checkpoint, Tensor, read_header
from taia.companions import TOKENIZER_FILES, copy_companions, files_in
from taia.configs import ADAPTER, config_notes
from taia.downloads import Download
from taia.errors import MismatchError, SelectionError
from taia.factorise import factorise
from taia.files import (
    atomic_write,
    read_json,
    refuse_existing,
    refuse_gguf_name,
    refuse_overlap,
    staged_folder,
)
from taia.hashing import with_digests
from taia.pieces import pieces
from taia.plan import Origin, Plan, plan
from taia.receipt import ALGORITHM, RECEIPT, Entry, Receipt, digest_of
from taia.selection import Selection
from taia.sources import Form, Source, resolve
from taia.targets import (
    Target,
    Targets,
    factor_keys,
    find_targets,
    parameters_of,
    whole_key,
)
from taia.writing import (
    header_digest,
    header_of,
    record_of,
)

__all__ = ["ERRORS", "Extracted", "Extraction", "extract", "extraction_faults"]

ERRORS = "extract.json"
TOLERANCE = 1e-4
"""How far a relative error may be from its statement: sums in another order."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Extracted:
    """One matrix (of stacked experts: all of one parameter): its name and how well it fits.

    norm: the Frobenius norm of the delta. error: that of what is lost, relative to it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """What an extraction wrote: the adapter's rank, each matrix, and what was kept whole."""

    rank: int
    matrices: tuple[Extracted, ...]
    whole: tuple[str, ...]
    receipt: Receipt

    @property
    def error(self) -> float:
        """The relative error of all deltas together."""
        return overall(self.matrices)

    def to_json(self) -> dict[str, Any]:
        """As plain values, without the receipt."""
        return _as_json(self.rank, self.matrices, self.whole)


def overall(matrices: tuple[Extracted, ...]) -> float:
    """The relative error of several deltas together."""
    norm = math.fsum(row.norm**2 for row in matrices)
    lost = math.fsum((row.norm * row.error) ** 2 for row in matrices)
    return math.sqrt(lost / norm) if norm else 0.0


def extract(
    base: str | Path | Source,
    tuned: str | Path | Source,
    out: str | Path,
    rank: int | None,
    keep: str | Selection = "attention",
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Extraction:
    """Write the adapter of `rank` (None: of full rank) nearest to what `keep` keeps.

    `on_note` is told what is worth knowing before. Raises MismatchError for what cannot be an
    adapter: two models that do not belong together, a delta that is no matrix of a module, a
    selection under which nothing changes.
    """
    destination, selection = Path(out), Selection.parse(keep)
    if rank is not None and rank < 1:
        raise SelectionError(f"a rank of {rank}: the least is 1")
    refuse_gguf_name(destination)
    refuse_existing(destination, overwrite=overwrite)
    if resolve(tuned, headers_only=True).form is Form.ADAPTER:
        raise MismatchError(f"{tuned}: is an adapter already; --extract is for checkpoints")
    planned = plan(base, tuned, selection)
    planned.refuse_faults()
    if on_note is not None:
        for note in _notes(planned):
            on_note(note)
    refuse_overlap(destination, planned.base.path, planned.tuned.path)
    with _downloaded(planned, destination):
        targets = find_targets(planned)
        _refuse(planned, targets)
        full = max(min(target.shape) for target in targets.matrices)
        rank = full if rank is None else min(rank, full)
        with staged_folder(destination, overwrite=overwrite) as folder:
            return _write(folder, planned, targets, rank, destination.name, on_progress)


def _notes(planned: Plan) -> list[str]:
    """The notes of a plan, and of its configs what they mean for an adapter."""
    assert isinstance(planned.base, Checkpoint)
    assert isinstance(planned.tuned, Checkpoint)
    both = planned.base, planned.tuned
    others = set(config_notes(*both))
    return [n for n in planned.notes if n not in others] + config_notes(*both, ADAPTER)


def _downloaded(planned: Plan, out: Path) -> AbstractContextManager[object]:
    """Within it the bytes of remote models that an extraction reads are on this disk."""
    reads = {
        decision.name: [(planned.base.path, planned.base.tensors[decision.name])]
        for decision in planned.decisions
        if decision.source is not Origin.BASE
    }
    parts = pieces(planned, fetched=False)
    reads = {name: [*places, *parts[name].reads] for name, places in reads.items()}
    return Download(planned, reads).fetched(out, 0, lambda _: None, keep=False)


def _write(
    folder: Path, planned: Plan, targets: Targets, rank: int, title: str, told: Progress | None
) -> Extraction:
    rows = _write_weights(folder, targets, rank, told)
    whole = tuple(targets.whole)
    config = _config(planned, targets, rank)
    atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    atomic_write(folder / ERRORS, json.dumps(_as_json(rank, rows, whole), indent=1) + "\n")
    copy_companions(planned.tuned.path, folder, TOKENIZER_FILES)
    atomic_write(folder / "README.md", _card(title, planned, rank, rows, whole))
    receipt = _receipt(planned, folder)
    for source in (planned.base, planned.tuned):
        source.refuse_changed()
    receipt.write(folder)
    return Extraction(rank, rows, whole, receipt)


def extraction_faults(folder: Path, receipt: Receipt) -> list[str]:
    """Whether an adapter has the errors that it states, measured again from its sources."""
    assert receipt.base is not None
    planned = plan(receipt.base.path, receipt.tuned.path, receipt.selection)
    planned.refuse_faults()
    targets, stored = find_targets(planned), read_header(folder / WEIGHTS)
    stated = {row["name"]: row["error"] for row in read_json(folder / ERRORS)["matrices"]}
    if stated.keys() != {target.name for target in targets.matrices}:
        return [f"{ERRORS}: does not list the matrices that its selection changes"]
    parameters = parameters_of(targets)
    faults = []
    for target in targets.matrices:
        keys = factor_keys(target, parameters)
        if not set(keys) <= stored.keys():
            faults.append(f"{target.name}: has no factors")
            continue
        a, b = (read_array(folder, stored[key]) for key in keys)
        row = _fit(target, a.reshape(target.experts, -1, a.shape[1]),
                   b.reshape(b.shape[0], -1, target.experts))  # fmt: skip
        if abs(row.error - stated[target.name]) > TOLERANCE:
            faults.append(
                f"{target.name}: its relative error is {row.error:.6f}, "
                f"{ERRORS} says {stated[target.name]:.6f}"
            )
    return faults


def _refuse(planned: Plan, targets: Targets) -> None:
    faults = list(targets.faults)
    if not faults and not targets.matrices:
        faults.append(f"nothing that '{planned.selection}' keeps is a matrix that changed")
    if faults:
        raise MismatchError(
            f"{planned.tuned.text}: what is kept cannot be a LoRA adapter. Keep less, or write a "
            "checkpoint, without --extract",
            faults,
        )


def _write_weights(
    folder: Path, targets: Targets, rank: int, on_progress: Progress | None
) -> tuple[Extracted, ...]:
    """Write the header, then the factors as they are found."""
    parameters = parameters_of(targets)
    described: list[Tensor] = []
    for target in targets.matrices:
        rows, columns = target.shape
        inner = rank * target.experts
        for key, shape in zip(
            factor_keys(target, parameters), ((inner, columns), (rows, inner)), strict=True
        ):
            described.append(_described(key, _dtype(target, rank), shape))
    for live, part in targets.whole.items():
        tensor = part.base.tensor
        described.append(_described(whole_key(live, targets), tensor.dtype, tensor.shape))
    rows_done = []
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header_of(described))
        for index, target in enumerate(targets.matrices):
            a, b, row = _factors(target, rank)
            file.write(a.tobytes())
            file.write(b.tobytes())
            rows_done.append(row)
            if on_progress is not None:
                on_progress(index + 1, len(targets.matrices))
        for part in targets.whole.values():
            for chunk in part.piece.chunks():
                file.write(chunk)
    return tuple(rows_done)


def _described(key: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape) * BITS[dtype] // 8
    return Tensor(key, dtype, shape, WEIGHTS, 0, size)


def _dtype(target: Target, rank: int) -> str:
    """The base's dtype, or float32 where nothing is cut off and rounding would be all the loss."""
    return "F32" if rank >= min(target.shape) and BITS[target.dtype] < 32 else target.dtype


def _factors(target: Target, rank: int) -> tuple[Array, Array, Extracted]:
    """A and B, as PEFT stacks them, and how well their product fits."""
    dtype = DTYPES[_dtype(target, rank)]
    out, into = target.shape
    a = np.zeros((target.experts, rank, into), dtype)
    b = np.zeros((out, rank, target.experts), dtype)  # the expert changes fastest
    row = _fit(target, a, b, rank)
    return a.reshape(-1, into), b.reshape(out, -1), row


def _fit(target: Target, a: Array, b: Array, rank: int | None = None) -> Extracted:
    """How well the product of factors fits; with a rank the factors are found first."""
    norm = lost = 0.0
    for expert, delta in enumerate(target.deltas()):
        norm += _square(delta)
        if not math.isfinite(norm):
            raise MismatchError(
                f"{target.name}: its delta is not finite, or too large for float32; look at the "
                "fine-tune for NaN, or leave this part out"
            )
        if rank is not None:
            a[expert], b[:, :, expert] = factorise(delta, rank)
        lost += _square(delta - widen(b[:, :, expert]) @ widen(a[expert]))
    error = math.sqrt(lost / norm) if norm else 0.0
    shape = (target.experts, *target.shape) if target.experts > 1 else target.shape
    return Extracted(target.name, target.kind.value, shape, a.shape[1], math.sqrt(norm), error)


def _square(values: Array) -> float:
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat))


def _config(planned: Plan, targets: Targets, rank: int) -> dict[str, Any]:
    """adapter_config.json: alpha is the rank, so that the scale is 1 everywhere."""
    path = planned.base.path
    named = planned.base.text if not Path(planned.base.text).exists() else str(path.absolute())
    modules = {target.module for target in targets.matrices if target.form != "experts"}
    wholly = {live.rpartition(".")[0] for live in targets.whole
              if not whole_key(live, targets).endswith(".base_layer.bias")}  # fmt: skip
    biases = len(wholly) < len(targets.whole)
    architectures = planned.base.config.get("architectures")
    named_class = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if named_class.endswith("ForCausalLM") else None,
        "base_model_name_or_path": named,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": any(target.form == "conv1d" for target in targets.matrices),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": sorted(wholly) or None,
        "target_modules": _short(planned, modules),
        "target_parameters": sorted(t.name for t in targets.matrices if t.form == "experts")
        or None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _short(planned: Plan, modules: set[str]) -> list[str]:
    """The last parts of names where they name no other module of the base, else whole names."""
    shorts = {module.rpartition(".")[2] for module in modules}
    matching = {
        name.rpartition(".")[0]
        for name in planned.base.tensors
        if name.endswith(".weight") and name.split(".")[-2] in shorts
    }
    return sorted(shorts if len(matching) == len(modules) else modules)


def _as_json(rank: int, matrices: tuple[Extracted, ...], whole: tuple[str, ...]) -> dict[str, Any]:
    return {
        "rank": rank,
        "error": overall(matrices),
        "matrices": [asdict(row) for row in matrices],
        "whole": list(whole),
    }


def _card(
    title: str, planned: Plan, rank: int, rows: tuple[Extracted, ...], whole: tuple[str, ...]
) -> str:
    kinds = dict.fromkeys(row.kind for row in rows)
    lines = ["| kind | matrices | relative error |", "|---|---:|---:|"]
    for kind in kinds:
        of_kind = tuple(row for row in rows if row.kind == kind)
        lines.append(f"| {kind} | {len(of_kind)} | {overall(of_kind):.4f} |")
    lines += ["", f"A LoRA adapter of rank {rank}, by truncated singular value decomposition; its "
              f"deltas miss those of the fine-tune by {overall(rows):.2%} in all."]  # fmt: skip
    if whole:
        lines.append(f"{len(whole)} vectors (norms, biases) are held whole, which PEFT loads and "
                     "vLLM does not.")  # fmt: skip
    return card(title, base=planned.base.text, tuned=planned.tuned.text,
                selection=str(planned.selection), body="\n".join(lines))  # fmt: skip


def _receipt(planned: Plan, folder: Path) -> Receipt:
    """Every tensor with its digest: another machine's decomposition may differ in a last bit."""
    entries = [
        Entry(tensor.name, WEIGHTS, tensor.start, tensor.stop, "blend", 1.0)
        for tensor in read_header(folder / WEIGHTS).values()
    ]
    entries = with_digests(folder, entries)
    tuned_files = getattr(planned.tuned, "files", ())
    others = files_in(folder, (WEIGHTS, RECEIPT))
    return Receipt(
        form="extracted",
        selection=str(planned.selection),
        base=record_of(planned.base.text, planned.base.path, planned.base.files),
        tuned=record_of(planned.tuned.text, planned.tuned.path, tuned_files),
        tensors=entries,
        headers={WEIGHTS: header_digest(folder / WEIGHTS)},
        files={name: digest_of(folder / name) for name in others},
        algorithm=ALGORITHM,
    )
