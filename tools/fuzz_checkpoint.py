"""Fuzz what reads the headers and indexes of checkpoints, beside the safetensors library.

    python tools/fuzz_checkpoint.py [--count 1000000] [--seed 0] [--workers 2] [--giants]

Each case is a header (two of three) or an index. taia must raise CheckpointError or give what
the peer gives: for a header the safetensors library, for an index the json module. Where the
two disagree on whether a case is sound the reason must be one of those below. `--giants`
measures the memory that texts of 100 MB take, each in a process of its own.
Exit code 1 and the case if anything else happens.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import safetensors
from fuzz_cases import header_case, index_case

from taia.checkpoint import parse_index
from taia.errors import CheckpointError
from taia.header import parse_header

STRICTER = (
    "a name that stands twice", "an object without others inside", "a name of ", "unknown dtype",
    "a second __metadata__", "a value that is too large or too deep", "expected an object at",
    "expected a name and a colon", "__metadata__", "does not end with a byte", "beyond 64 bits",
    "expected a string", "names files outside", "expected a name and the file", "expected a value",
    "has no weight_map", "a second weight_map", "expected the end", "expected ',' or '}'", "utf-8",
)  # fmt: skip
"""Reasons for which taia may refuse what a peer reads; every other refusal is a fault."""


def check_header(raw: bytes) -> str:
    """One case. Returns what came of it; raises AssertionError for what must not be."""
    refusal = ""
    try:
        ours = parse_header(io.BytesIO(raw).read, len(raw), Path("x.safetensors"))
    except CheckpointError as error:
        refusal = str(error)
    try:
        theirs = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError:
        assert refusal, "taia reads what safetensors refuses"
        return "both refuse"
    if refusal:
        assert any(reason in refusal for reason in STRICTER), f"only taia refuses: {refusal}"
        return "only taia refuses"
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name]["dtype"]
        assert list(tensor.shape) == theirs[name]["shape"]
        assert raw[tensor.start : tensor.stop] == bytes(theirs[name]["data"])
    return "both read"


def check_index(raw: bytes) -> str:
    """The same for an index."""
    refusal = ""
    try:
        ours = parse_index(io.BytesIO(raw).read, len(raw), Path("x.json"))
    except CheckpointError as error:
        refusal = str(error)
    try:
        theirs = json.loads(raw.decode())["weight_map"]
        assert isinstance(theirs, dict)
    except (ValueError, RecursionError, KeyError, TypeError, AssertionError):
        assert refusal, "taia reads what json refuses"
        return "both refuse"
    if refusal:
        assert any(reason in refusal for reason in STRICTER), f"only taia refuses: {refusal}"
        return "only taia refuses"
    assert ours == theirs
    return "both read"


def fuzz(seed: int, first: int, last: int) -> tuple[Counter[str], int, list[str]]:
    """Cases `[first, last)`: outcomes, growth of this process's memory in KiB, failures."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    for number in range(first, last):
        chance = random.Random(f"{seed}:{number}")
        kind = "index" if number % 3 == 2 else "header"
        raw = (index_case if kind == "index" else header_case)(chance)
        try:
            outcomes[f"{kind}: {(check_index if kind == 'index' else check_header)(raw)}"] += 1
        except Exception as error:  # whatever it is, it is a finding
            failures.append(f"case {seed}:{number} ({kind}): {error!r:.300}\n  {raw!r:.600}")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return outcomes, after - before, failures


GIANTS = {
    "tensors without end": lambda i: b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' % i,
    "long names": lambda i: b'"%0300d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' % i,
    "wide names": lambda i: (
        b'"\xf0\x9f\x98\x80%0200d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' % i
    ),
    "long shapes": lambda i: (
        b'"%d":{"dtype":"U8","shape":[0%s],"data_offsets":[0,0]},' % (i, b",%d" % (i + 257) * 99)
    ),
    "lists": lambda _: b"[],",
    "metadata": lambda i: (i == 0) * (b'"__metadata__":{"a":"' + b"a\\n" * 33_000_000 + b'"},'),
    "many texts of metadata": lambda i: b'"__metadata__":{' * (i == 0) + b'"%d":"",' % i,
    "entries of nothing": lambda i: b'"%d":{},' % i,
    "brackets": lambda _: b"[",
    "one name": lambda i: b'"' * (i == 0) + b"a",
}  # fmt: skip
"""Texts of about 100 MB, as what is written for each i."""

MEASURE = """
import os, sys, time
from pathlib import Path
from taia.errors import CheckpointError
from taia.header import parse_header
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
path = Path(sys.argv[1])
before, start = peak(), time.perf_counter()
with path.open("rb", buffering=0) as file:
    try:
        told = f"{len(parse_header(file.read, path.stat().st_size, path))} tensors"
    except CheckpointError as error:
        told = str(error).replace(str(path), "").splitlines()[0][:90]
print(f"{(peak() - before) / 1024:.0f} MiB, {time.perf_counter() - start:.1f} s, {told}")
"""


def giants() -> bool:
    """Print the memory that reading each takes; whether all stay below 200 MB."""
    bounded = True
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "giant.safetensors"
        for name, write in GIANTS.items():
            with path.open("wb") as file:
                file.write((99_000_000).to_bytes(8, "little") + b"{")
                number = 0
                while file.tell() < 99_000_000 and not (number and name == "metadata"):
                    file.write(b"".join(write(i) for i in range(number, number + 1000)))
                    number += 1000
                file.write(b" " * max(0, 99_000_008 - file.tell()))
                file.truncate(99_000_008)
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, str(path)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            print(f"{name}: {done.stdout.strip()}", flush=True)
            bounded &= int(done.stdout.split()[0]) < 190
    return bounded


def main() -> None:
    """Fuzz on several processes and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--giants", action="store_true")
    options = parser.parse_args()
    start = time.perf_counter()
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    grown = 0
    step = max(1, min(10_000, options.count // options.workers))
    with ProcessPoolExecutor(options.workers) as pool:
        tasks = [
            pool.submit(fuzz, options.seed, first, min(first + step, options.count))
            for first in range(0, options.count, step)
        ]
        for task in tasks:
            found, growth, failed = task.result()
            outcomes += found
            failures += failed
            grown = max(grown, growth)
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome}: {count:,}")
    print(
        f"seed {options.seed}, {options.count:,} cases, {len(failures)} failures, "
        f"{time.perf_counter() - start:.0f} s, peak memory grew by {grown / 1024:.0f} MiB"
    )
    print("\n".join(failures[:20]))
    bounded = not options.giants or giants()
    sys.exit(bool(failures) or grown > 200_000 or not bounded)


if __name__ == "__main__":
    main()
