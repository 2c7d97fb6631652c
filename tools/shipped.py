"""The end of every tool that derives a shipped file: it is written, or compared with its text."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_or_check"]


def write_or_check(path: Path, text: str, *, check: bool) -> int:
    """Write `text`, or with `check` compare it with what is there; the exit code of the tool."""
    if not check:
        path.write_text(text, encoding="utf-8")
        print(f"written to {path.name}")
        return 0
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    print(f"the shipped {path.name} {'is the derived one' if same else 'differs'}")
    return 0 if same else 1
