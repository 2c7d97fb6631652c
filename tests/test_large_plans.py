"""A plan of many tensors in many shards, from headers alone: its time and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLAN = r"""
import re, sys, time, taia
start = time.process_time()
planned = taia.plan(*sys.argv[1:], keep="attention")
seconds = time.process_time() - start
# the peak of this program alone; that of getrusage begins with its parent's
peak = re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]
print(len(planned.decisions), seconds, peak)
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> tuple[Path, Path]:
    """A base and a tuned model with the names of DeepSeek-V3 and 16 experts, and no weights."""
    folder = tmp_path_factory.mktemp("simulated")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import plan; from pathlib import Path\n"
        f"for name in ('base', 'tuned'): plan.make(Path({str(folder)!r}) / name, 8, 16, 20)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return folder / "base", folder / "tuned"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads its peak from Linux")
def test_a_plan_reads_headers_only_and_stays_small(simulated):
    base, tuned = simulated
    stored = json.loads((base / "model.safetensors.index.json").read_text())
    assert stored["metadata"]["total_size"] > 10e9
    assert sum(file.stat().st_blocks * 512 for file in base.iterdir()) < 10e6
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(base), str(tuned)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, seconds, kilobytes = done.stdout.split()
    assert int(count) == len(stored["weight_map"]) > 500
    assert float(seconds) < 2  # some 0.1 s on an idle core
    assert int(kilobytes) < 100_000
