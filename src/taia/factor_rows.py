"""LoRA factors of a fused projection of which a selection keeps some rows.

The delta of a row is that row of B times A. So a row of B is multiplied by the strength of the
projection that it belongs to: exact where that is 0 or 1, and the adapter stays an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from taia.adapter import Adapter
from taia.checkpoint import Checkpoint
from taia.errors import MismatchError
from taia.fused import Parts, cut_of
from taia.kinds import Address
from taia.lora import LoraModule

__all__ = ["by_rows"]


def by_rows(
    adapter: Adapter,
    addresses: Mapping[str, Address],
    parts: Mapping[str, Parts],
    base: Checkpoint | None,
) -> Adapter:
    """The adapter with the rows of B scaled, in the modules that `parts` names.

    addresses, parts: by the name of the changed weight. Raises MismatchError for changes that
    have no rows of their own, and where the rows are not known.
    """
    modules, faults = dict(adapter.modules), []
    for weight, strengths in parts.items():
        change = modules.get(weight)
        told = ", ".join(f"{name} at {strength:g}" for name, strength in strengths)
        if not isinstance(change, LoraModule) or change.magnitude is not None:
            faults.append(f"{weight}: {told}; only plain LoRA factors can be told apart by rows")
            continue
        if base is None:
            faults.append(f"{weight}: {told}; name the base model, whose config tells the rows")
            continue
        cut = cut_of(weight, change.shape, addresses[weight], base.model_type, base.config)
        if cut is None or cut.length != change.b.shape[0]:
            faults.append(f"{weight}: {told}; which of its rows are whose is not known")
            continue
        wanted = dict(strengths)
        rows = tuple(wanted[part] for start, stop, part in cut.spans() for _ in range(start, stop))
        modules[weight] = replace(change, rows=rows)
    if faults:
        raise MismatchError(
            f"{adapter.text}: parts of fused projections at different strengths; keep each as one, "
            "or write a checkpoint with --merge",
            faults,
        )
    return replace(adapter, modules=modules)
