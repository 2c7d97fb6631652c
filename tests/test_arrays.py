"""The arithmetic of blends: every bfloat16 value, against torch; the same bytes on any thread."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taia.arrays import CHUNK, DTYPES, all_finite, blend, blended_chunks, encode
from taia.checkpoint import Tensor
from taia.errors import MismatchError

EVERY = np.arange(1 << 16, dtype=np.uint16)
"""The bits of every 16-bit number."""


def finite(values: np.ndarray) -> np.ndarray:
    return torch.isfinite(as_torch(values)).numpy()


def as_torch(values: np.ndarray) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def by_torch(base: np.ndarray, tuned: np.ndarray, strength: float) -> torch.Tensor:
    old, new = as_torch(base), as_torch(tuned)
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    step = (new.to(wide) - old.to(wide)) * torch.tensor(strength, dtype=wide)
    return (old.to(wide) + step).to(old.dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("strength", [0.5, 0.3, -1.0, 1.4])
def test_a_blend_of_every_16_bit_value_is_that_of_torch(dtype, strength):
    base = EVERY.view(DTYPES[dtype])
    base = base[finite(base)]
    base = base[abs(base.astype(np.float64)) < 1e4]
    tuned = np.random.default_rng(0).permutation(base)
    expected = by_torch(base, tuned, strength)
    assert torch.equal(as_torch(blend(base, tuned, strength)), expected)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_blend_of_wide_values_is_that_of_torch(dtype):
    generator = np.random.default_rng(0)
    base, tuned = (generator.standard_normal(1000).astype(DTYPES[dtype]) for _ in "ab")
    assert torch.equal(as_torch(blend(base, tuned, 0.7)), by_torch(base, tuned, 0.7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strength_one_is_the_tuned_model_and_zero_the_base(dtype):
    base, tuned = (np.linspace(-3, n, 777).astype(DTYPES[dtype]) for n in (5, 90))
    assert (blend(base, tuned, 1.0) == tuned).all()
    assert (blend(base, tuned, 0.0) == base).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_to_16_bits_is_that_of_torch_for_every_tie(dtype):
    """Every value, half-way to the next, and one float32 to either side of that."""
    values = EVERY.view(DTYPES[dtype])
    wide = values[finite(values)].astype(np.float32)
    inner = np.nextafter(values[finite(values)], DTYPES[dtype].type(0)).astype(np.float64)
    half = ((wide + inner) / 2).astype(np.float32)
    for numbers in (wide, half, np.nextafter(half, 9e9), np.nextafter(half, -9e9)):
        expected = torch.from_numpy(numbers).to(
            getattr(torch, {"BF16": "bfloat16", "F16": "float16"}[dtype])
        )
        assert encode(numbers, dtype) == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_finite_says_so_of_every_16_bit_value(dtype):
    values = EVERY.view(DTYPES[dtype])
    assert [all_finite(values[i : i + 1]) for i in range(len(values))] == finite(values).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_longer_fits_is_refused_and_what_was_broken_stays(dtype):
    kind = DTYPES[dtype]
    top = ml_dtypes.finfo(kind).max if dtype == "BF16" else np.finfo(kind).max
    base, tuned = np.array([0, top], kind), np.array([0, -top], kind)
    with pytest.raises(MismatchError, match="no longer a finite"):
        blend(base, tuned, -3.0)
    broken = np.array([np.nan, np.inf], kind)
    assert not finite(blend(broken, broken, 0.5)).any()


@given(st.integers(1, 3000), st.sampled_from(sorted(DTYPES)), st.floats(-2, 2), st.data())
def test_any_part_of_a_blend_is_that_part_of_the_whole(
    tmp_path_factory, count, dtype, strength, data
):
    folder = tmp_path_factory.mktemp("blend")
    generator = np.random.default_rng(count)
    width = DTYPES[dtype].itemsize
    tensors = []
    for name in ("base", "tuned"):
        values = generator.standard_normal(count).astype(DTYPES[dtype])
        (folder / name).write_bytes(b"head" + values.tobytes())
        tensors.append((values, Tensor(name, dtype, (count,), name, 4, 4 + count * width)))
    (base, old), (tuned, new) = tensors
    first = data.draw(st.integers(0, count - 1))
    part = data.draw(st.integers(0, count - first))
    written = b"".join(
        blended_chunks(folder / "base", old, folder / "tuned", new, strength, first, part)
    )
    assert written == blend(base, tuned, strength)[first : first + part].tobytes()


def test_a_chunk_is_kept_when_the_next_is_made(tmp_path):
    count = 2 * CHUNK + 5
    values = np.arange(count, dtype=np.float32)
    (tmp_path / "file").write_bytes(values.tobytes())
    tensor = Tensor("x", "F32", (count,), "file", 0, 4 * count)
    place = tmp_path / "file"
    chunks = list(blended_chunks(place, tensor, place, tensor, 0.5, 0, count))
    assert len(chunks) == 3
    assert b"".join(chunks) == values.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0, 1.4])
def test_an_infinite_weight_that_both_have_stays(dtype, strength):
    kind = DTYPES[dtype]
    base = np.array([np.inf, -np.inf, -np.inf, -0.0, 1], kind)
    tuned = np.array([np.inf, -np.inf, np.inf, 0.0, 3], kind)
    mixed = blend(base, tuned, strength)
    assert mixed[:2].tolist() == [np.inf, -np.inf]
    assert not np.isfinite(mixed[2])
    assert mixed[3:].tobytes() == blend(base[3:], tuned[3:], strength).tobytes()
