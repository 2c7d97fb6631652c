"""Tries of tokens and shared prefixes: laws over random sequences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from taia.evaluation.engine import plan
from taia.evaluation.trie import Trie, shared_prefixes

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@settings(deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_a_node_comes_after_exactly_its_sequence(sequences):
    trie = Trie()
    paths = [trie.insert(sequence) for sequence in sequences]
    seen = trie.ancestors()
    for sequence, path in zip(sequences, paths, strict=True):
        assert [trie.tokens[node] for node in path] == sequence
        assert [trie.depths[node] for node in path] == list(range(len(path)))
        for at, node in enumerate(path):
            assert list(seen[node].nonzero()[0]) == sorted(path[: at + 1])
    assert len(trie) == len({tuple(s[: at + 1]) for s in sequences for at in range(len(s))})


@settings(deadline=None)
@given(st.lists(TOKENS.map(tuple), max_size=12, unique=True))
def test_groups_hold_every_sequence_once_and_begin_as_told(sequences):
    groups = shared_prefixes(sequences)
    assert sorted(index for group in groups for index in group.members) == list(
        range(len(sequences))
    )
    for group in groups:
        for index in group.members:
            assert sequences[index][: len(group.tokens)] == group.tokens
            assert len(group.tokens) < len(sequences[index])


def test_a_long_common_beginning_is_read_once_for_each_group():
    header = tuple(range(100))
    subjects = [(*header, *([subject] * 200)) for subject in (7, 8)]
    sequences = [(*subject, 900 + n, 5) for subject in subjects for n in range(20)]
    groups = shared_prefixes(sequences)
    assert sorted(len(group.tokens) for group in groups) == [300, 300]
    lone = shared_prefixes([(*header, n, n) for n in range(20)])
    assert [group.tokens for group in lone] == [header]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), max_size=12), st.integers(9, 24), st.integers(1, 4))
def test_every_request_is_planned_once_with_its_own_tokens(pairs, longest, most):
    requests = [(("", ""), prompt, choice) for prompt, choice in pairs]
    batches = plan(requests, longest=longest, questions=most, tokens=20, places=9)
    asked = {}
    for batch in batches:
        assert len(batch.questions) <= most
        for question in batch.questions:
            for index, wanted in question.wanted.items():
                assert index not in asked
                asked[index] = [token for _, token in wanted]
                nodes = [node for node, _ in wanted]
                before = question.trie.ancestors()[nodes[0]].sum() + len(batch.prefix)
                whole = (*pairs[index][0], *pairs[index][1])[-(longest + 1) :]
                assert before == len(whole) - len(wanted)
    assert asked == {index: choice for index, (_, choice) in enumerate(pairs)}
