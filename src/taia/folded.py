"""What AWQ folds into other weights, and what a selection may therefore not tear apart.

AWQ (arXiv 2306.00978, section 3.2) multiplies the input channels of a weight by scales of its own
and divides what comes before by them: the norm before q, k and v, the norm before gate and up,
v before o, up before down. Every quantisation finds its own scales, so a layer whose attention
is one model's and whose norms are the other's computes noise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from taia.checkpoint import Checkpoint, Tensor
from taia.compare import Pair, differing
from taia.holes import mirror_of
from taia.kinds import Address, Kind
from taia.quantised import settings_of

__all__ = ["folded_faults"]

FOLDED = {Kind.ATTENTION, Kind.MIXER, Kind.FFN, Kind.ROUTER, Kind.NORM}

CHAINED = ({"v", "kv", "qkv", "o"}, {"up", "gate_up", "down"})
"""Projections of which the first holds scales of the second."""

MEND = "splice the unquantised models and quantise the result, or take the layer whole"

Strengths = Mapping[str, float | None]


def folded_faults(
    base: Checkpoint, tuned: Checkpoint, addresses: Mapping[str, Address], strengths: Strengths
) -> list[str]:
    """The layers of two AWQ checkpoints that a selection takes apart.

    strengths: by stored name; None where rows of one tensor have different ones.
    """
    if settings_of(base).get("quant_method") != "awq":
        return []
    layers: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, address in addresses.items():
        if address.kind in FOLDED and address.layer is not None and name in tuned.tensors:
            layers[address.tower, address.layer].append(name)
    parted = {layer: names for layer, names in layers.items()
              if len({strengths[name] for name in names}) > 1}  # fmt: skip
    norms = [base.tensors[name] for names in parted.values() for name in names
             if addresses[name].kind is Kind.NORM]  # fmt: skip
    changed = _changed(norms, base, tuned)
    torn = [(*layer, told) for layer, names in parted.items()
            for told in _torn(names, addresses, strengths, changed)]  # fmt: skip
    if not torn:
        return []
    tower, number, told = torn[0]
    more = f" (and {len(torn) - 1} more)" if torn[1:] else ""
    return [f"AWQ, layer {number} of the {tower} tower: {told}{more}; {MEND}"]


def _torn(
    names: list[str],
    addresses: Mapping[str, Address],
    strengths: Strengths,
    changed: set[str],
) -> Iterator[str]:
    """What of a layer that comes from two models cannot."""
    if not changed.isdisjoint(names):
        yield "its norms differ between base and tuned, and hold scales of its weights"
        return
    for chain in CHAINED:
        if len({strengths[name] for name in names if addresses[name].projection in chain}) > 1:
            held = {str(addresses[name].projection) for name in names} & chain
            yield f"{' and '.join(sorted(held))} hold scales of each other, and are told apart"


def _changed(norms: list[Tensor], base: Checkpoint, tuned: Checkpoint) -> set[str]:
    """Those that differ; all of them where a model's bytes are not here yet."""
    if mirror_of(base.path) is not None or mirror_of(tuned.path) is not None:
        return {norm.name for norm in norms}
    pairs, found = [], set()
    for norm in norms:
        their = tuned.tensors[norm.name]
        if (their.shape, their.dtype) != (norm.shape, norm.dtype):
            found.add(norm.name)
            continue
        pairs.append(
            Pair(norm.name, base.path / norm.file, norm.start, tuned.path / their.file,
                 their.start, norm.bytes)
        )  # fmt: skip
    return found | differing(pairs)
