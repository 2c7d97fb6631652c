"""The index of a remote model: bounded memory, whatever else stands in it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest

from taia.errors import SourceError
from taia.mirror import _shards
from taia.remote import Stated


class Server:
    """A server that has every file it is asked for."""

    text = "https://example.org/model"

    def find(self, patterns: Sequence[str]) -> dict[str, Stated]:
        return {name: Stated(100, "tag") for name in patterns}


def test_an_index_of_nothing_but_lists_takes_no_memory():
    rest = b"[" + b"[]," * 3_000_000 + b"[]]"
    index = b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}, "x": ' + rest + b"}"
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="a value that is too large or too deep"):
            _shards(Server(), index)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(index)


def test_the_shards_of_an_index_are_asked_for():
    index = b'{"x": 9, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    assert sorted(_shards(Server(), index)) == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize(
    "index", [b"[]", b'{"weight_map": {"a": "../x.safetensors"}}', b'{"weight_map": {}}', b"{"]
)
def test_an_index_that_breaks_a_rule_is_refused_with_the_address(index):
    with pytest.raises(SourceError, match=r"https://example.org/model: .*index\.json"):
        _shards(Server(), index)
