"""JSON from outside, read piece by piece in bounded memory.

`json.loads` turns 3 bytes of text into 60 bytes of objects, so a header of 100 MB could fill
the memory of a machine. The two large JSON files of a checkpoint have a simple shape: an
object of small entries. A Scanner matches one entry at a time with regular expressions on a
window of the file; only what an entry says is kept.

The expressions are possessive (`*+`): they never go back, so no text makes them slow. They
hold the grammar of RFC 8259: control characters, lone surrogates, numbers with leading zeros
and text that is not UTF-8 are refused.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

__all__ = ["CLOSE", "COMMA", "FLAT", "NATURAL", "OPEN", "PIECE", "SPACE", "STRING", "Scanner"]

WINDOW = 1 << 20
"""Bytes read at a time."""

PIECE = 1 << 16
"""The most bytes that one entry may take; a tensor's takes about 150."""

SKIPPED = 1 << 14
"""The most tokens of a value that is of no interest."""

SPACE = rb"[ \t\n\r]*+"
NATURAL = rb"(?:0|[1-9][0-9]{0,19}+)"
_HEX = rb"[0-9a-fA-F]"
_ESCAPE = (
    rb'\\(?:["\\/bfnrt]|u(?:[dD][89abAB]' + _HEX + rb"{2}\\u[dD][c-fC-F]" + _HEX
    + rb"{2}|(?![dD][89a-fA-F])" + _HEX + rb"{4}))"
)  # fmt: skip
_PLAIN = rb'[^"\\\x00-\x1f]'
STRING = rb'"' + _PLAIN + rb"*+(?:" + _ESCAPE + _PLAIN + rb'*+)*+"'
FLAT = re.compile(rb'\{[^{}"]*+(?:' + STRING + rb'[^{}"]*+)*+\}')
"""An object that holds no other."""

OPEN, CLOSE, COMMA = (re.compile(SPACE + mark + SPACE) for mark in (rb"\{", rb"\}", rb","))
_NAME = re.compile(rb"(" + STRING + rb")" + SPACE + rb":" + SPACE)
_BODY = re.compile(rb"(?:" + _PLAIN + rb"{1,8}+|" + _ESCAPE + rb"){1,4000}+")
_QUOTE = re.compile(rb'"')
_TOKEN = re.compile(
    SPACE + rb"(" + STRING + rb"|[\[\]{},:]|-?(?:0|[1-9][0-9]{0,99}+)(?:\.[0-9]{1,99}+)?"
    rb"(?:[eE][+-]?[0-9]{1,99}+)?(?![0-9.eE])|true|false|null)" + SPACE
)


class Scanner:
    """One pass over `length` bytes that `read` gives. Every failure is a ValueError."""

    def __init__(self, read: Callable[[int], bytes | None], length: int) -> None:
        self._read, self._left = read, length
        self._buffer, self._at, self._before = b"", 0, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """What matches here, consumed; None, and nothing consumed, where nothing does."""
        while True:
            found = pattern.match(self._buffer, self._at)
            unsure = found is None or found.end() == len(self._buffer)
            if unsure and self._left and len(self._buffer) - self._at < PIECE:
                self._fill()
                continue
            if found is not None:
                self._at = found.end()
            return found

    def run(self, pattern: re.Pattern[bytes]) -> Iterator[re.Match[bytes]]:
        """One match after the other, for as long as the next one fits."""
        match = pattern.match
        while True:
            buffer, at = self._buffer, self._at
            while len(buffer) - at >= PIECE or not self._left:
                found = match(buffer, at)
                if found is None:
                    return
                self._at = at = found.end()
                yield found
            self._fill()

    def expect(self, pattern: re.Pattern[bytes], what: str) -> re.Match[bytes]:
        """What matches here. Raises ValueError where nothing does."""
        return self.take(pattern) or self.fail(f"expected {what}")

    def name(self) -> str:
        """The name of a member of an object, and its colon."""
        text: str = json.loads(self.expect(_NAME, "a name and a colon")[1])
        return text

    def flat(self, hook: Callable[[list[tuple[str, Any]]], Any]) -> Any:
        """An object that holds no other, its pairs given to `hook`."""
        text = self.expect(FLAT, "an object without others inside")[0]
        return json.loads(
            text,
            object_pairs_hook=hook,
            parse_int=_natural,
            parse_float=_finite,
            parse_constant=_no_constant,
        )

    def skip_string(self) -> None:
        """Pass over a string of any length."""
        self.expect(_QUOTE, "a string")
        while not self.take(_QUOTE):
            self.expect(_BODY, "the rest of a string")

    def skip_value(self) -> None:
        """Pass over a small value of any kind."""
        text, depth = [], 0
        while True:
            token = self.expect(_TOKEN, "a value")[1]
            text.append(token)
            depth += (token in (b"{", b"[")) - (token in (b"}", b"]"))
            if depth <= 0:
                break
            if len(text) > SKIPPED or depth > 64:
                self.fail("a value that is too large or too deep")
        json.loads(b" ".join(text))  # the tokens are right, now their order

    def end(self) -> None:
        """Nothing is left, and all of it was UTF-8."""
        self.take(re.compile(SPACE))
        if self._left or self._at < len(self._buffer):
            self.fail("expected the end")
        self._utf8.decode(b"", final=True)

    def fail(self, message: str) -> NoReturn:
        """Raise ValueError with the place."""
        raise ValueError(f"{message} at byte {self._before + self._at:,}")

    def _fill(self) -> None:
        chunk = self._read(min(WINDOW, self._left))
        if not chunk:
            raise ValueError("the file became shorter while it was read")
        self._left -= len(chunk)
        self._utf8.decode(chunk)
        self._before += self._at
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0


def _natural(text: str) -> int:
    """A JSON integer that is a size or an offset. Raises ValueError for any other."""
    if text.startswith("-") or len(text) > 20:
        raise ValueError("a number that is negative or beyond 64 bits")
    return int(text)


def _finite(text: str) -> float:
    """A JSON number that a float64 holds. Raises ValueError for any other."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number beyond 64 bits")
    return value


def _no_constant(text: str) -> NoReturn:
    """NaN and Infinity, which Python writes and JSON does not know."""
    raise ValueError(f"{text} is no JSON")
