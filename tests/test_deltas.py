"""Delta norms against the products and differences that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taia.analysis.deltas import DeltaNorm, delta_norms, factored_norm, write_deltas
from taia.errors import MismatchError, SourceError

LINEAR = {"self_attn.q_proj": ("attention", "q"), "mlp.down_proj": ("ffn", "down")}
SHAPES = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 12)}
PREFIX = "base_model.model."


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def names(layers: int = 2) -> list[tuple[str, tuple[int, int]]]:
    return [
        (f"model.layers.{layer}.{module}", SHAPES[module])
        for layer in range(layers)
        for module in LINEAR
    ]


def write_checkpoint(
    folder: Path, values: Callable[[str, tuple[int, int]], np.ndarray], model_type: str = "llama"
) -> Path:
    folder.mkdir()
    tensors = {f"{name}.weight": values(name, shape) for name, shape in names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": model_type, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, random: np.random.Generator, **settings: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for name, (out, into) in names():
        pattern = settings.get("rank_pattern", {})
        rank = next((r for key, r in pattern.items() if name.endswith(key)), 4)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = random.normal(size=(rank, into))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = random.normal(size=(out, rank))
    save_file(
        {name: value.astype(np.float32) for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (8 / 4, 8 / 4)),
        ({"use_rslora": True}, (8 / 2, 8 / 2)),
        ({"alpha_pattern": {"q_proj": 2}}, (2 / 4, 8 / 4)),
        ({"rank_pattern": {"down_proj": 2}}, (8 / 4, 8 / 2)),
    ],
)
def test_adapter_norms_are_those_of_the_products(
    tmp_path: Path, random: np.random.Generator, settings: Any, scales: tuple[float, float]
) -> None:
    base = write_checkpoint(
        tmp_path / "base", lambda _, shape: random.normal(size=shape).astype(np.float32)
    )
    adapter = write_adapter(tmp_path / "adapter", random, **settings)
    found = {(row.layer, row.projection): row for row in delta_norms(base, adapter)}
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    assert len(found) == 4
    for name, shape in names():
        scale = scales[0] if "q_proj" in name else scales[1]
        a, b = (factors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        kind, projection = LINEAR[name.split(".", 3)[3]]
        row = found[int(name.split(".")[2]), projection]
        assert row.kind == kind
        assert row.norm == pytest.approx(scale * np.linalg.norm(b @ a), rel=1e-5)
        assert row.base_norm == pytest.approx(np.linalg.norm(weights[f"{name}.weight"]), rel=1e-5)
        assert row.parameters == math.prod(shape)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_checkpoint_norms_are_those_of_the_differences(
    tmp_path: Path, random: np.random.Generator, dtype: Any
) -> None:
    stored: dict[str, dict[str, np.ndarray]] = {"base": {}, "tuned": {}}

    def values(which: str) -> Callable[[str, tuple[int, int]], np.ndarray]:
        def make(name: str, shape: tuple[int, int]) -> np.ndarray:
            stored[which][name] = random.normal(size=shape).astype(dtype)
            return stored[which][name]

        return make

    base = write_checkpoint(tmp_path / "base", values("base"))
    tuned = write_checkpoint(tmp_path / "tuned", values("tuned"))
    found = {(row.layer, row.projection): row for row in delta_norms(base, tuned)}
    for name, _ in names():
        before, after = (stored[which][name].astype(np.float64) for which in ("base", "tuned"))
        row = found[int(name.split(".")[2]), LINEAR[name.split(".", 3)[3]][1]]
        assert row.norm == pytest.approx(np.linalg.norm(after - before), rel=1e-6)
        assert row.base_norm == pytest.approx(np.linalg.norm(before), rel=1e-6)
    assert all(row.norm == 0 for row in delta_norms(base, base))


def test_the_factored_norm_needs_no_product(random: np.random.Generator) -> None:
    a, b = random.normal(size=(3, 50)), random.normal(size=(70, 3))
    assert factored_norm(a, b, 0.5) == pytest.approx(np.linalg.norm(0.5 * b @ a) ** 2)
    assert factored_norm(a, 0 * b, 0.5) == 0


def write_gguf(path: Path) -> None:
    """A GGUF file with its metadata and no tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_base_leaves_base_norms_open(tmp_path: Path, random: np.random.Generator) -> None:
    write_gguf(tmp_path / "model.gguf")
    adapter = write_adapter(tmp_path / "adapter", random)
    assert {row.base_norm for row in delta_norms(tmp_path / "model.gguf", adapter)} == {None}


def test_whole_tensors_are_measured_against_the_base(
    tmp_path: Path, random: np.random.Generator
) -> None:
    base = write_checkpoint(tmp_path / "base", lambda _, shape: np.ones(shape, np.float32))
    adapter = write_adapter(tmp_path / "adapter", random)
    path = adapter / "adapter_model.safetensors"
    bias = {f"{PREFIX}model.layers.0.self_attn.o_proj.bias": np.full(8, 3, np.float32)}
    save_file(load_file(path) | bias, path)
    found = {(row.layer, row.projection): row for row in delta_norms(base, adapter)}
    assert found[0, "o"].norm == pytest.approx(3 * math.sqrt(8))
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match="whole tensors"):
        delta_norms(tmp_path / "model.gguf", adapter)


def test_unlike_models_are_refused(tmp_path: Path, random: np.random.Generator) -> None:
    base = write_checkpoint(tmp_path / "base", lambda _, shape: np.ones(shape, np.float32))
    wide = write_checkpoint(
        tmp_path / "wide", lambda _, shape: np.ones((shape[0], shape[1] + 1), np.float32)
    )
    other = write_checkpoint(
        tmp_path / "other", lambda _, shape: np.ones(shape, np.float32), "qwen2"
    )
    with pytest.raises(MismatchError) as caught:
        delta_norms(base, wide)
    assert len(caught.value.faults) == 4
    with pytest.raises(MismatchError, match="llama and qwen2"):
        delta_norms(base, other)
    with pytest.raises(MismatchError, match="another model"):
        delta_norms(wide, write_adapter(tmp_path / "adapter", random))


def test_the_file_holds_every_field(tmp_path: Path) -> None:
    path = tmp_path / "deltas.json"
    write_deltas([DeltaNorm("attention", "q", 0, 1.5, None, 64)], path)
    assert json.loads(path.read_text()) == {
        "kinds": [
            {
                "kind": "attention",
                "projection": "q",
                "layer": 0,
                "norm": 1.5,
                "base_norm": None,
                "parameters": 64,
            }
        ]
    }
