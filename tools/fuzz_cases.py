"""Headers and indexes that lie: made by a grammar, then broken in structure and in bytes.

Every case follows from a seed and a number, so that one case can be made again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

__all__ = ["header_case", "index_case", "mutated_bytes", "mutated_json"]

SIZES = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "I16": 16, "F16": 16, "BF16": 16, "I32": 32,
         "F32": 32, "F64": 64, "I64": 64, "F4": 4, "F6_E2M3": 6, "C64": 64}  # fmt: skip
NUMBERS = (0, 1, -1, 2, 255, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
           1.0, 1e3, 0.5, True, None, "1", [], {}, math.nan, math.inf)  # fmt: skip
NAMES = ("", "a", "model.layers.0.mlp.up_proj.weight", "__metadata__", "é", "\U0001f600", "\0",
         "a\nb", '"', "\\", "\ud800", "x" * 2000, "dtype", "../a",
         "model.layers.99999999999.x")  # fmt: skip
TOKENS = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\u0041", b"\\ud800", b"null", b"true",
          b"NaN", b"Infinity", b"1e999", b"-0", b"007", b"0" * 30, b"9" * 5000, b"[" * 2000,
          b'{"a":' * 500, b" " * 100, b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80",
          b'"__metadata__":{"a":"b"},', b'"__metadata__":{},', b'"dtype":"F32",')  # fmt: skip
SHARDS = ("a.safetensors", "b.safetensors", "../a.safetensors", "/a.safetensors", "a/b.safetensors",
          "a\\b.safetensors", ".safetensors", "..", "", "a.bin", "a\0.safetensors", 7, None, ["a"],
          "x" * 300 + ".safetensors")  # fmt: skip


def header_case(chance: random.Random) -> bytes:
    """The bytes of a small safetensors file, sound or not."""
    entries = _entries(chance)
    size = max((entry["data_offsets"][1] for _, entry in entries), default=0)
    pairs: list[tuple[str, Any]] = list(entries)
    if chance.random() < 0.3:
        pairs.insert(chance.randint(0, len(pairs)), ("__metadata__", {"format": "pt"}))
    if chance.random() < 0.5:
        _break_structure(chance, pairs)
    text = _written(chance, pairs)
    if chance.random() < 0.4:
        text = mutated_bytes(chance, text)
    text += b" " * chance.choice((0, 0, -len(text) % 8))
    length = len(text)
    if chance.random() < 0.05:
        length = chance.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_001))
    raw = max(length, 0).to_bytes(8, "little") + text + bytes(size)
    if chance.random() < 0.05:
        raw = mutated_bytes(chance, raw)
    return raw


def index_case(chance: random.Random) -> bytes:
    """The bytes of a small index, sound or not."""
    shards = SHARDS[:2] if chance.random() < 0.5 else SHARDS
    placed = [(_name(chance), chance.choice(shards)) for _ in range(chance.randint(0, 5))]
    pairs: list[tuple[str, Any]] = [("metadata", {"total_size": 7}), ("weight_map", _Pairs(placed))]
    if chance.random() < 0.3:
        pairs.insert(chance.randint(0, 2), (_name(chance), chance.choice(NUMBERS)))
    if chance.random() < 0.1:
        pairs.append(chance.choice(pairs))
    chance.shuffle(pairs)
    text = _dumped(chance, _Pairs(pairs))
    return mutated_bytes(chance, text) if chance.random() < 0.4 else text


def mutated_bytes(chance: random.Random, raw: bytes) -> bytes:
    """A few bytes flipped, removed, doubled, or replaced by something with a meaning."""
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randint(0, len(changed))
        until = min(len(changed), at + chance.choice((1, 1, 2, 8, 64)))
        action = chance.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif action == 1:
            del changed[at:until]
        elif action == 2:
            changed[at:at] = changed[at:until]
        elif action == 3:
            changed[at:at] = chance.choice(TOKENS)
        else:
            changed[at:until] = chance.choice(TOKENS)
    return bytes(changed)


def mutated_json(chance: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one place holds something else, or nothing."""
    copied = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def visit(part: Any) -> None:
        members = part.items() if isinstance(part, dict) else enumerate(part)
        for key, member in members:
            places.append((part, key))
            if isinstance(member, dict | list):
                visit(member)

    visit(copied)
    for _ in range(chance.choice((1, 1, 2, 3))):
        part, key = chance.choice(places)
        action = chance.randrange(3)
        if action == 0 and isinstance(part, dict):
            part.pop(key, None)
        elif action == 1 and isinstance(part, dict):
            part[_name(chance)] = chance.choice(NUMBERS)
        elif isinstance(part, dict) or key < len(part):
            part[key] = chance.choice((*NUMBERS, *NAMES))
    return copied


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object, in which a name may stand twice."""


def _entries(chance: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """A sound layout: tensors one after the other."""
    entries, position = [], 0
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        dtype = chance.choice(tuple(SIZES))
        shape = [chance.choice((0, 1, 2, 3, 8)) for _ in range(chance.randint(0, 3))]
        bits = math.prod(shape) * SIZES[dtype]
        stop = position + -(-bits // 8)
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        entries.append((_name(chance), entry))
        position = stop
    if chance.random() < 0.2:
        chance.shuffle(entries)
    return entries


def _name(chance: random.Random) -> str:
    if chance.random() < 0.15:
        return chance.choice(NAMES)
    return f"t{chance.randrange(1000)}"


def _break_structure(chance: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if not pairs:
        return
    at = chance.randrange(len(pairs))
    name, entry = pairs[at]
    entry = dict(entry)

    def shape() -> None:
        entry["shape"] = [chance.choice(NUMBERS) for _ in range(chance.choice((1, 2, 3, 40)))]

    def offsets() -> None:
        entry["data_offsets"] = [chance.choice(NUMBERS) for _ in range(chance.choice((1, 2, 2, 3)))]

    def shift() -> None:
        entry["data_offsets"] = [
            offset + chance.choice((-4, -1, 1, 4)) for offset in entry.get("data_offsets", [0, 1])
        ]

    def lose() -> None:
        entry.pop(chance.choice(("dtype", "shape", "data_offsets")), None)

    def extra() -> None:
        entry[_name(chance)] = chance.choice(NUMBERS)

    def dtype() -> None:
        entry["dtype"] = chance.choice(("F128", "f32", "", "F32 ", *NUMBERS))

    def double() -> None:
        pairs.append((name, entry))

    actions: tuple[Callable[[], None], ...] = (shape, offsets, shift, lose, extra, dtype, double)
    chance.choice(actions)()
    pairs[at] = (name, entry if chance.random() < 0.95 else chance.choice(NUMBERS))


def _written(chance: random.Random, pairs: list[tuple[str, Any]]) -> bytes:
    """A JSON object, compact or spaced, members of entries in any order."""
    if chance.random() < 0.2:
        pairs = [
            (name, _Pairs(chance.sample(list(value.items()), len(value))))
            if isinstance(value, dict) else (name, value)
            for name, value in pairs
        ]  # fmt: skip
    return _dumped(chance, _Pairs(pairs))


def _dumped(chance: random.Random, value: Any) -> bytes:
    """JSON that may hold a name twice. Half surrogates become bytes that are not UTF-8."""
    comma, colon = chance.choice(((",", ":"), (", ", ": "), ("\n,\t", " :\r\n ")))
    escaped = chance.random() < 0.3

    def dump(part: Any) -> str:
        if isinstance(part, _Pairs | dict):
            members = part if isinstance(part, _Pairs) else part.items()
            inner = [json.dumps(str(k), ensure_ascii=escaped) + colon + dump(v) for k, v in members]
            return "{" + comma.join(inner) + "}"
        return json.dumps(part, ensure_ascii=escaped)

    return dump(value).encode("utf-8", "surrogatepass")
