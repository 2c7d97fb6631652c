"""The same tensors as other tools: PEFT's merge for five families, mergekit where it is installed.

mergekit is installed by `python benchmarks/mergekit_peer.py`, into an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_tools import load
from peft import PeftModel

import taia

ROOT = Path(__file__).parents[1]
MERGEKIT = Path(os.environ.get("TAIA_MERGEKIT", ROOT / ".mergekit"))


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("qwen2", "gemma3_text", "phi3", "gpt2")
        ),
    ],
)
def test_a_merge_is_that_of_peft(adapters, tmp_path, model_type):
    """merge_and_unload of the whole adapter, in float32, up to the order of additions."""
    base, adapter = adapters(model_type, "patterns")
    taia.splice(base, adapter, tmp_path / "out", keep="all", merge=True)
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    ours, before = load(tmp_path / "out").state_dict(), load(base).state_dict()
    assert ours.keys() == expected.keys()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed == {n for n in ours if not torch.equal(expected[n], before[n])} != set()
    for name in ours:
        assert torch.allclose(ours[name], expected[name], rtol=0, atol=2e-7), name
        if name not in changed:
            assert torch.equal(ours[name], expected[name])


@pytest.mark.slow
@pytest.mark.skipif(
    not (MERGEKIT / "bin" / "mergekit-yaml").is_file(),
    reason="mergekit is not installed; benchmarks/mergekit_peer.py installs it beside the project",
)
def test_a_splice_is_that_of_mergekit():
    script = ROOT / "benchmarks" / "mergekit_peer.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len({name.partition(",")[0] for name in rows}) >= 5
