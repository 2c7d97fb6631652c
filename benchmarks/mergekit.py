"""mergekit, the peer, in an environment of its own.

It is installed into .mergekit of this project on first use, so that its requirements never
meet ours. `TAIA_MERGEKIT` names another place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = "0.1.5"
PLACE = Path(os.environ.get("TAIA_MERGEKIT", ROOT / ".mergekit"))


def program() -> Path:
    """The program mergekit-yaml; installed if it is not there."""
    found = PLACE / "bin" / "mergekit-yaml"
    if not found.is_file():
        print(f"installing mergekit {VERSION} into {PLACE}", file=sys.stderr)
        pip = [str(PLACE / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", str(PLACE)], check=True)
        pins = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *pins, "torch==2.13.0", f"mergekit=={VERSION}"], check=True)
    return found


def recipe(base: Path, tuned: Path, kept: str | None, strength: float, dtype: str) -> str:
    """The YAML of base + strength * (tuned - base) for tensors whose name holds `kept`.

    Without `kept` for all of them.
    """

    def weights(inside: float, outside: float) -> str:
        if kept is None:
            return f"{inside}"
        return f"[{{filter: {kept}, value: {inside}}}, {{value: {outside}}}]"

    return (
        "merge_method: linear\n"
        "models:\n"
        f"  - {{model: {base}, parameters: {{weight: {weights(1 - strength, 1.0)}}}}}\n"
        f"  - {{model: {tuned}, parameters: {{weight: {weights(strength, 0.0)}}}}}\n"
        "parameters: {normalize: false}\n"
        f"dtype: {dtype}\n"
    )


def command(text: str, out: Path) -> list[str]:
    """The command that carries out a recipe, which is written beside `out`."""
    path = out.with_suffix(".yaml")
    path.write_text(text, encoding="utf-8")
    return [str(program()), str(path), str(out), "--no-copy-tokenizer", "--no-write-model-card"]
