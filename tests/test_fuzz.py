"""Lies without end: nothing but a TaiaError or a right reading comes of them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

import taia
from taia.adapter import read_adapter
from taia.errors import TaiaError, VerificationError

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))


@pytest.mark.slow
def test_twenty_thousand_headers_and_indexes():
    from fuzz_checkpoint import fuzz

    outcomes, grown, failures = fuzz(1, 0, 20_000)
    assert not failures, failures[0]
    assert grown < 200_000
    assert sum(outcomes.values()) == 20_000
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize("number", range(40))
def test_a_receipt_that_was_changed(pair, tmp_path_factory, number):
    from fuzz_cases import mutated_bytes, mutated_json

    chance = random.Random(number)
    out = tmp_path_factory.getbasetemp() / "fuzzed"
    if not out.exists():
        taia.splice(*pair("llama"), out, hash=True)
    path = out / "taia.json"
    before = path.read_bytes()
    if number % 2:
        after = mutated_bytes(chance, before)
    else:
        after = json.dumps(mutated_json(chance, json.loads(before))).encode()
    path.write_bytes(after)
    try:
        if after != before:
            with pytest.raises(VerificationError):
                taia.verify(out)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("number", range(40))
def test_an_adapter_configuration_that_was_changed(adapters, tmp_path, number):
    from fuzz_cases import mutated_bytes, mutated_json

    chance = random.Random(number)
    source = adapters("llama", "patterns")[1]
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (source / "adapter_model.safetensors").read_bytes()
    )
    raw = (source / "adapter_config.json").read_bytes()
    if number % 2:
        raw = mutated_bytes(chance, raw)
    else:
        raw = json.dumps(mutated_json(chance, json.loads(raw))).encode()
    (tmp_path / "adapter_config.json").write_bytes(raw)
    try:
        read_adapter(tmp_path)
    except TaiaError:
        return
