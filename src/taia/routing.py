"""Which experts a token goes to, how much of each it takes, and how evenly tokens spread.

Pure functions from router logits to gates and statistics. The router is top-k with a
softmax over the chosen logits. With one expert a token that softmax is 1 whatever the logit,
so the router learns from the balance loss alone (Shazeer et al. 2017, arXiv 1701.06538).

The balance loss is that of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equations
4 to 6) in Mixtral's form for several experts a token: experts * sum over experts of (share of
tokens that choose it) * (mean probability). It is `experts_per_token` where all is even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Routing", "balance_loss", "gates", "routing"]


class Routing(NamedTuple):
    """How one router spread the tokens of one batch. The tensors carry gradients."""

    load: Tensor
    """(experts,): the share of tokens that chose each; sums to the experts per token."""
    probability: Tensor
    """(experts,): the mean of the softmax over all logits."""
    entropy: Tensor
    """(): the mean entropy of that softmax, in nats; log(experts) where nothing is preferred."""


def gates(logits: Tensor, chosen: int, dropout: float = 0.0) -> Tensor:
    """The weight of each expert for each token, (..., experts): 0 where it is not chosen.

    With `dropout`, every token loses each expert with that probability before it chooses,
    but never so many that fewer than `chosen` are left.
    """
    if dropout > 0:
        draw = logits.new_empty(logits.shape).uniform_()
        spared = draw.topk(chosen, dim=-1).values[..., -1:]
        logits = logits.masked_fill(draw < spared.clamp(max=dropout), float("-inf"))
    top = logits.topk(chosen, dim=-1)
    weights = top.values.softmax(dim=-1)
    return logits.new_zeros(logits.shape).scatter(-1, top.indices, weights)


def routing(logits: Tensor, weights: Tensor, mask: Tensor | None = None) -> Routing:
    """Statistics of gates `weights` that came from `logits`, both (..., experts).

    `mask` (...,) is 1 for the tokens that count and 0 for padding; all count without it.
    """
    logs = logits.log_softmax(dim=-1)
    probabilities = logs.exp()
    entropy = -(probabilities * logs).sum(dim=-1)
    if mask is None:
        mask = entropy.new_ones(entropy.shape)
    share = mask.to(entropy.dtype) / mask.sum()
    every = tuple(range(share.ndim))
    return Routing(
        load=((weights > 0) * share.unsqueeze(-1)).sum(dim=every),
        probability=(probabilities * share.unsqueeze(-1)).sum(dim=every),
        entropy=(entropy * share).sum(),
    )


def balance_loss(seen: Routing) -> Tensor:
    """The load-balancing loss of one router, a scalar."""
    return (seen.load * seen.probability).sum() * seen.load.numel()
