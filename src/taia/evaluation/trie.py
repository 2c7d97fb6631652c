"""Questions as trees of tokens: what several sequences begin with is read once.

    prompt ... Answer:  --+-- A
                          +-- B                  letters: no further token is read at all
                          +-- the  --+-- moon
                                     +-- sun

A trie holds the sequences of one question (its prompt and each of its choices). Laid out in one
row, with every token at the position that it has in its sequence and seeing only its own
ancestors, one forward pass gives what separate passes over the sequences give.

Above the tries stands what many questions begin with (the header of a chat template, few-shot
examples): `shared_prefixes` parts the questions into groups whose prefix is read once.

Limits: pure Python and numpy; the model is in `engine`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Prefix", "Trie", "shared_prefixes"]

A_PASS = 64
"""Tokens that one more forward pass costs, about: what reading a prefix apart must save."""


@dataclass(slots=True)
class Trie:
    """Token sequences that share their beginnings, after a prefix that is not in it.

    `tokens[i]` follows `tokens[parents[i]]`, or the prefix where the parent is -1; parents stand
    before children. `depths[i]` counts the tokens before it in the trie.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def insert(self, sequence: Sequence[int]) -> list[int]:
        """The node of each token of `sequence`; nodes that are there are used again."""
        nodes: list[int] = []
        parent = -1
        for depth, token in enumerate(sequence):
            node = self._children.get((parent, token))
            if node is None:
                node = self._children[parent, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            nodes.append(node)
            parent = node
        return nodes

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> NDArray[np.bool_]:
        """Which node (column) each node (row) comes after, itself included: (nodes, nodes)."""
        seen = np.zeros((len(self), len(self)), dtype=np.bool_)
        trunk = 0  # nodes that follow one another: the prompt, set at once
        while trunk < len(self) and self.parents[trunk] == trunk - 1:
            trunk += 1
        seen[:trunk, :trunk] = np.tri(trunk, dtype=np.bool_)
        for node in range(trunk, len(self)):
            if self.parents[node] >= 0:
                seen[node] = seen[self.parents[node]]
            seen[node, node] = True
        return seen


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a group of sequences begins with; `members` are their indices. May be empty."""

    tokens: tuple[int, ...]
    members: tuple[int, ...]


def shared_prefixes(sequences: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """The sequences in groups with a common prefix, so that the fewest tokens are read.

    A prefix ends before the last token of its shortest sequence, so that each keeps one of its
    own. Groups are runs of the sorted sequences that agree in at least so many tokens; every
    such number is tried.
    """
    if not sequences:
        return []
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    common = [_common(sequences[one], sequences[other]) for one, other in itertools.pairwise(order)]
    best: list[Prefix] = []
    least = float("inf")
    for length in sorted({0, *common}):
        groups = _groups(sequences, order, common, length)
        cost = sum(A_PASS + len(group.tokens) * (1 - len(group.members)) for group in groups)
        if cost < least:
            best, least = groups, cost
    return best


def _groups(
    sequences: Sequence[tuple[int, ...]], order: Sequence[int], common: Sequence[int], length: int
) -> list[Prefix]:
    """Runs of neighbours that share at least `length` tokens, each with all that it shares."""
    starts = [0, *(place + 1 for place, shared in enumerate(common) if shared < length)]
    groups = []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        members = order[start:end]
        first = sequences[members[0]]
        shared = min([len(first), *common[start : end - 1]]) if len(members) > 1 else 0
        shared = min(shared, min(len(sequences[index]) for index in members) - 1)
        groups.append(Prefix(first[: max(0, shared)], tuple(members)))
    return groups


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
