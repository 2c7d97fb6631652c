"""How large the deltas are: where in the model a fine-tuning wrote.

A delta is tuned minus base. Its size is the Frobenius norm, given for every (kind, layer,
projection), beside the norm of the base weights where these can be read. For a LoRA module
the product B A is never formed: with s the scale,

    ||s B A||_F^2 = s^2 tr(A^T B^T B A) = s^2 sum((B^T B) * (A A^T)),

two products of rank by rank. DoRA and whole tensors are compared with the base weights
themselves, and full checkpoints tensor by tensor, a bounded piece at a time. A mixture of LoRA
experts has no delta; told is the root of the mean square over what its experts would each add.

Limits: tensors of different towers at the same (kind, layer, projection) are added up.
No torch; memory is one module for an adapter, and a few MiB for a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from taia.adapter import Adapter, addresses_of, architecture_of, read_adapter
from taia.arrays import CHUNK, Array, read_array, widen
from taia.changes import Change
from taia.checkpoint import FLOATS, Checkpoint, Tensor, open_checkpoint
from taia.errors import MismatchError, SourceError
from taia.experts import Experts
from taia.files import atomic_write
from taia.kinds import Address, classify_all
from taia.layouts import align
from taia.lora import LoraModule
from taia.sources import Form, Source, resolve
from taia.stored_names import StoredNames

__all__ = ["DeltaNorm", "delta_norms", "factored_norm", "write_deltas"]


@dataclass(frozen=True, slots=True)
class DeltaNorm:
    """The size of the deltas at one place of a model.

    norm, base_norm: Frobenius norms of the delta and of the base weights; base_norm is None
        where the base cannot be read tensor by tensor (a GGUF file).
    parameters: elements of the weights that the delta changes.
    """

    kind: str
    projection: str | None
    layer: int | None
    norm: float
    base_norm: float | None
    parameters: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor's part in the sums: squared norms of its delta and of its base."""

    address: Address
    delta: float
    base: float | None
    parameters: int


def delta_norms(
    base: str | Path | Source, tuned_or_adapter: str | Path | Source
) -> list[DeltaNorm]:
    """The delta norms of an adapter or a full checkpoint against `base`, in the model's order.

    Raises SourceError, CheckpointError, KindError, and MismatchError when the two do not
    belong together.
    """
    tuned, start = resolve(tuned_or_adapter), resolve(base)
    if tuned.form is Form.ADAPTER:
        return _grouped(_adapter_pieces(read_adapter(tuned), start))
    return _grouped(_checkpoint_pieces(open_checkpoint(start), open_checkpoint(tuned)))


def write_deltas(norms: Iterable[DeltaNorm], path: Path) -> None:
    """Write deltas.json: `{"kinds": [...]}`."""
    rows = [asdict(norm) for norm in norms]
    atomic_write(path, json.dumps({"kinds": rows}, indent=1, allow_nan=False) + "\n")


def factored_norm(a: Array, b: Array, scale: float) -> float:
    """The squared Frobenius norm of `scale * b @ a`; a is (rank, in), b is (out, rank)."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    return scale * scale * max(square, 0.0)  # rounding may leave a tiny negative


def _adapter_pieces(adapter: Adapter, base: Source) -> Iterator[_Piece]:
    checkpoint = open_checkpoint(base) if base.form is Form.CHECKPOINT else None
    model_type, _, config = architecture_of(adapter, base)
    named = None if checkpoint is None else StoredNames(checkpoint)
    adapter = adapter.of(model_type, None if named is None else named.shapes)
    addresses = addresses_of(adapter, model_type, config)
    _check_belongs(adapter, addresses, named, base)
    for module in adapter.modules.values():
        weight = None if named is None else named.tensor(module.weight)
        size = None if checkpoint is None or weight is None else _square(checkpoint.path, weight)
        delta = _module_square(adapter, module, checkpoint, weight)
        yield _Piece(addresses[module.weight], delta, size, math.prod(module.shape))
    for name, tensor in adapter.whole.items():
        if checkpoint is None or named is None:  # _check_belongs has refused this
            continue
        weight = named.tensor(name)
        value = widen(read_array(adapter.path, tensor)).ravel()
        before = np.zeros_like(value) if weight is None else _values(checkpoint, weight).ravel()
        yield _Piece(addresses[name], _sum(value - before), _sum(before), tensor.parameters)


def _module_square(
    adapter: Adapter, module: Change, checkpoint: Checkpoint | None, weight: Tensor | None
) -> float:
    if isinstance(module, Experts):
        pairs = module.factors(adapter.path)
        return sum(factored_norm(*pair, module.scale) for pair in pairs) / len(pairs)
    if isinstance(module, LoraModule) and module.magnitude is None:
        return factored_norm(*adapter.factors(module), module.scale)
    assert checkpoint is not None
    assert weight is not None
    before = _values(checkpoint, weight)
    return _sum(adapter.tuned_weight(module, before, 1.0) - before)


def _check_belongs(
    adapter: Adapter,
    addresses: Mapping[str, Address],
    named: StoredNames | None,
    base: Source,
) -> None:
    """Refuse an adapter of another model, and what needs base weights where there are none."""
    needy = [
        name for name, change in adapter.modules.items()
        if not isinstance(change, LoraModule) or change.magnitude is not None
    ] + list(adapter.whole)  # fmt: skip
    if named is None:
        if needy:
            raise SourceError(
                f"{base.text}: only LoRA is measured by itself; DoRA, whole tensors and other "
                "methods against the base weights; give the base as a folder of safetensors",
                needy,
            )
        return
    faults = []
    for name in addresses:
        stored = named.tensor(name)
        module = adapter.modules.get(name)
        shape = module.shape if module else adapter.whole[name].shape
        if stored is None and module is not None:
            faults.append(f"{name}: not in the base")
        elif stored is not None and stored.shape != shape:
            faults.append(f"{name}: {list(shape)} in the adapter, {list(stored.shape)} in the base")
    if faults:
        raise MismatchError(f"{adapter.text}: made for another model than {base.text}", faults)


def _checkpoint_pieces(base: Checkpoint, tuned: Checkpoint) -> Iterator[_Piece]:
    base, tuned, faults = align(base, tuned)
    faults += [f"{name}: only in {tuned.text}" for name in tuned.tensors.keys() - base.tensors]
    faults += [f"{name}: only in {base.text}" for name in base.tensors.keys() - tuned.tensors]
    faults += [
        f"{name}: {list(tensor.shape)} in {base.text}, {list(tuned.tensors[name].shape)} in "
        f"{tuned.text}"
        for name, tensor in base.tensors.items()
        if name in tuned.tensors and tuned.tensors[name].shape != tensor.shape
    ]
    types = [checkpoint.config.get("model_type") for checkpoint in (base, tuned)]
    if types[0] != types[1]:
        faults.append(f"model types {types[0]} and {types[1]}")
    if faults:
        raise MismatchError(f"{tuned.text}: not a fine-tuning of {base.text}", sorted(faults))
    addresses = classify_all(base.tensors, str(types[0]), base.config)
    for name, before in base.tensors.items():
        after = tuned.tensors[name]
        if before.dtype in FLOATS and after.dtype in FLOATS:
            delta, size = _difference(base.path, before, tuned.path, after)
            yield _Piece(addresses[name], delta, size, before.parameters)


def _difference(base: Path, before: Tensor, tuned: Path, after: Tensor) -> tuple[float, float]:
    """Squared norms of `after - before` and of `before`, CHUNK elements at a time."""
    delta = size = 0.0
    for first in range(0, before.parameters, CHUNK):
        count = min(CHUNK, before.parameters - first)
        old = widen(read_array(base, before, first, count)).ravel()
        new = widen(read_array(tuned, after, first, count)).ravel()
        delta += _sum(new - old)
        size += _sum(old)
    return delta, size


def _square(folder: Path, tensor: Tensor) -> float | None:
    """The squared norm of a stored tensor; None for one that holds packed integers."""
    if tensor.dtype not in FLOATS:
        return None
    return sum(
        _sum(widen(read_array(folder, tensor, first, min(CHUNK, tensor.parameters - first))))
        for first in range(0, tensor.parameters, CHUNK)
    )


def _values(checkpoint: Checkpoint, tensor: Tensor) -> Array:
    return widen(read_array(checkpoint.path, tensor))


def _sum(values: Array) -> float:
    """The sum of squares, accumulated in float64."""
    wide = values.ravel().astype(np.float64)
    return float(np.dot(wide, wide))


def _grouped(pieces: Iterable[_Piece]) -> list[DeltaNorm]:
    groups: dict[tuple[int, str, str], list[_Piece]] = {}
    for piece in pieces:
        address = piece.address
        layer = -1 if address.layer is None else address.layer
        key = (layer, address.kind.value, address.projection or "")
        groups.setdefault(key, []).append(piece)
    return [_norm(key, groups[key]) for key in sorted(groups)]


def _norm(key: tuple[int, str, str], pieces: Sequence[_Piece]) -> DeltaNorm:
    layer, kind, projection = key
    bases = [piece.base for piece in pieces if piece.base is not None]
    return DeltaNorm(
        kind=kind,
        projection=projection or None,
        layer=None if layer < 0 else layer,
        norm=math.sqrt(sum(piece.delta for piece in pieces)),
        base_norm=math.sqrt(sum(bases)) if len(bases) == len(pieces) else None,
        parameters=sum(piece.parameters for piece in pieces),
    )
