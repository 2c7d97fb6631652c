"""The head of a GGUF file: what the library reads, and nothing that contradicts itself."""

from __future__ import annotations

import random
import struct
import tracemalloc

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_tools import llama_fields, llama_tensors, tiny_llama, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from taia.errors import CheckpointError, SourceError, TaiaError
from taia.gguf_header import open_gguf, read_gguf, tensor_infos


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", 0, Type.Q8_0)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def head(*, fields: bytes = b"", field_count: int = 0, infos: bytes = b"", tensors: int = 0,
         version: int = 3) -> bytes:  # fmt: skip
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, field_count) + fields + infos


def info(name: str = "output.weight", shape=(4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def written(tmp_path, data: bytes):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


def test_reads_what_the_library_reads(tmp_path):
    for kind, alignment in ((Type.F32, None), (Type.Q4_0, 64), (Type.BF16, 8)):
        path = tmp_path / f"{kind.name}.gguf"
        tiny_llama(path, 1, kind, alignment=alignment)
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        assert ours.alignment == theirs.alignment
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert mine.dtype == tensor.tensor_type.name
            assert mine.shape == tuple(reversed(tensor.shape.tolist()))
            assert (mine.start, mine.bytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.model_type == "llama"
        assert ours.config["llama.attention.head_count_kv"] == 2
        assert ours.fields.keys() == {k for k in theirs.fields if not k.startswith("GGUF.")}


def test_infos_are_written_as_they_were_read(tiny):
    found = read_gguf(tiny)
    infos = tensor_infos(found.tensors, found.alignment)
    assert tiny.read_bytes()[found.fields_stop :].startswith(infos)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "does not start"),
        (b"GGML" + bytes(40), "does not start"),
        (head(version=1), "version 1"),
        (head(version=0x03000000), "big-endian"),
        (head(tensors=1 << 40), "claims"),
        (head(field_count=1 << 40), "claims"),
        (head(field_count=1), "truncated"),
        (head(field_count=1, fields=struct.pack("<Q", 1 << 62)), "a key of"),
        (head(field_count=1, fields=text("k") + struct.pack("<I", 13)), "unknown type 13"),
        (head(field_count=1, fields=text("k") + struct.pack("<IQ", 8, 1 << 63)), "truncated"),
        (head(field_count=1, fields=text("k") + struct.pack("<IIQ", 9, 0, 1 << 63)), "truncated"),
        (head(field_count=1, fields=text("k") + struct.pack("<IIQ", 9, 8, 1 << 63)), "truncated"),
        (head(field_count=1, fields=text("k") + struct.pack("<IIQ", 9, 9, 0)), "array of type 9"),
        (head(field_count=2, fields=(text("k") + struct.pack("<IB", 0, 1)) * 2), "stands twice"),
        (head(field_count=1, fields=struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
        (head(tensors=1, infos=info(shape=(1,) * 5)), "5 dimensions"),
        (head(tensors=1, infos=info(shape=(0,))), "the shape"),
        (head(tensors=1, infos=info(shape=(1 << 40, 1 << 40))), "the shape"),
        (head(tensors=1, infos=info(kind=4)), "unknown type 4"),
        (head(tensors=1, infos=info(kind=8)), "whole blocks of 32"),
        (head(tensors=1, infos=info(offset=4)), "no multiple of 32"),
        (head(tensors=1, infos=info()), "the file at"),
        (head(tensors=2, infos=info() + info()) + bytes(200), "stands twice"),
        (head(tensors=2, infos=info() + info("a")) + bytes(200), "overlaps"),
    ],
)  # fmt: skip
def test_contradictions_are_told(tmp_path, data, told):
    with pytest.raises(CheckpointError, match=told):
        read_gguf(written(tmp_path, data))


@pytest.mark.parametrize("value", [0, 3, 1 << 31])
def test_alignment_is_a_small_power_of_two(tmp_path, value):
    field = text("general.alignment") + struct.pack("<II", 4, value)
    with pytest.raises(CheckpointError, match=r"general\.alignment"):
        read_gguf(written(tmp_path, head(field_count=1, fields=field)))


def test_parts_of_a_split_model_are_refused(tmp_path, tiny):
    part = tmp_path / "m-00001-of-00002.gguf"
    part.write_bytes(tiny.read_bytes())
    with pytest.raises(SourceError, match="llama-gguf-split --merge"):
        open_gguf(part)
    with pytest.raises(SourceError, match="llama-gguf-split --merge"):
        open_gguf(write_gguf(
            tmp_path / "s.gguf", llama_tensors(0), fields=lambda w: w.add_uint16("split.count", 2)
        ))  # fmt: skip


def test_a_file_without_architecture_says_so(tmp_path):
    found = read_gguf(written(tmp_path, head()))
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        _ = found.model_type


def test_large_claims_take_no_memory(tmp_path):
    many = llama_fields(words=50_000)
    path = write_gguf(tmp_path / "words.gguf", {"output.weight": llama_tensors(0)["output.weight"]},
                      fields=many)  # fmt: skip
    hostile = written(
        tmp_path, head(field_count=1, fields=text("k") + struct.pack("<IQ", 8, 1 << 30))
    )
    with hostile.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that is not there
    tracemalloc.start()
    read_gguf(path)
    with pytest.raises(CheckpointError, match="more than 100 MB"):
        read_gguf(hostile)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


PATTERNS = (b"", b"", b"\xff" * 8, b"\0" * 8, b"\x7f", b"\x08", b"\x09", struct.pack("<Q", 1 << 40))


def outcome(path) -> bool:
    """Whether it parses, and then every tensor lies in the file; else it is a TaiaError."""
    try:
        found = read_gguf(path)
    except TaiaError:
        return False
    size = path.stat().st_size
    for tensor in found.tensors.values():
        assert 0 < tensor.start <= tensor.stop <= size
        assert tensor.start % found.alignment == 0
    return True


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), count=st.integers(0, 3), fields=st.integers(0, 3))
def test_any_bytes_behind_the_magic(tmp_path_factory, data, count, fields):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, count, fields) + data)
    outcome(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_real_head_with_changed_bytes(tmp_path_factory, tiny, data):
    whole = bytearray(tiny.read_bytes())
    stop = min(tensor.start for tensor in read_gguf(tiny).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, stop - 9))
        new = data.draw(st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 40)]),
        ))  # fmt: skip
        whole[at : at + len(new)] = new
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(whole[:cut])
    outcome(path)


@pytest.mark.slow
def test_twenty_thousand_changed_heads(tmp_path, tiny):
    """Bytes changed in place, at random, and put back: seed 0."""
    whole = tiny.read_bytes()
    path = written(tmp_path, whole)
    stop = min(tensor.start for tensor in read_gguf(tiny).tensors.values())
    draw, parsed = random.Random(0), 0
    with path.open("r+b", buffering=0) as file:
        for _ in range(20_000):
            changes = [(draw.randrange(4, stop - 8), draw.choice(PATTERNS) or draw.randbytes(2))
                       for _ in range(draw.randint(1, 3))]  # fmt: skip
            for at, new in changes:
                file.seek(at)
                file.write(new)
            parsed += outcome(path)
            for at, new in changes:
                file.seek(at)
                file.write(whole[at : at + len(new)])
    print(f"20,000 changed heads: {parsed:,} parsed, the rest refused")
    assert path.read_bytes() == whole
