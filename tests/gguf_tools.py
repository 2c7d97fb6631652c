"""GGUF files for tests: tiny ones from transformers' own models, and a real one, altered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

Choose = Callable[[str], Type]


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    choose: Choose = lambda _: Type.F32,
    architecture: str = "llama",
    fields: Callable[[gguf.GGUFWriter], Any] | None = None,
    alignment: int | None = None,
) -> Path:
    """A GGUF file by the library's own writer; `choose` names the type of a tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    if fields is not None:
        fields(writer)
    for name, values in tensors.items():
        kind = choose(name)
        packed = gguf.quants.quantize(values.astype(np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_fields(
    words: int = 8, name: str = "tiny", layers: int = 2
) -> Callable[[gguf.GGUFWriter], None]:
    """The fields of a tiny Llama of width 64."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_name(name)
        writer.add_block_count(layers)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_context_length(64)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"w{word}" for word in range(words)])

    return add


def llama_tensors(
    seed: int, *, head: bool = True, words: int = 8, layers: int = 2
) -> dict[str, np.ndarray]:
    """Random tensors of a tiny Llama, by llama.cpp's names."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (words, 64)}
    for layer in range(layers):
        at = f"blk.{layer}."
        shapes |= {
            f"{at}attn_norm.weight": (64,), f"{at}attn_q.weight": (64, 64),
            f"{at}attn_k.weight": (32, 64), f"{at}attn_v.weight": (32, 64),
            f"{at}attn_output.weight": (64, 64), f"{at}ffn_norm.weight": (64,),
            f"{at}ffn_gate.weight": (96, 64), f"{at}ffn_up.weight": (96, 64),
            f"{at}ffn_down.weight": (64, 96),
        }  # fmt: skip
    shapes["output_norm.weight"] = (64,)
    if head:
        shapes["output.weight"] = (words, 64)
    return {name: draw.standard_normal(shape) for name, shape in shapes.items()}


def large(kind: Type) -> Choose:
    """Matrices in one type, vectors in float32, as llama.cpp's converter does it."""
    return lambda name: Type.F32 if "norm" in name else kind


def tiny_llama(path: Path, seed: int, kind: Type = Type.F32, **options: Any) -> Path:
    """A tiny Llama in a GGUF file."""
    layers = options.pop("layers", 2)
    tensors = llama_tensors(seed, head=options.pop("head", True), layers=layers)
    fields = options.pop("fields", llama_fields(name=path.stem, layers=layers))
    return write_gguf(path, tensors, large(kind), fields=fields, **options)


def tiny_adapter(path: Path, seed: int, kind: Type = Type.F32, rank: int = 4) -> Path:
    """A LoRA adapter of the tiny Llama, on every matrix of its first two blocks."""
    draw = np.random.default_rng(seed)

    def fields(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)

    tensors = {}
    for name, values in llama_tensors(0).items():
        if name.startswith("blk.") and values.ndim == 2:
            tensors[f"{name}.lora_a"] = draw.standard_normal((rank, values.shape[1]))
            tensors[f"{name}.lora_b"] = draw.standard_normal((values.shape[0], rank))
    return write_gguf(path, tensors, lambda _: kind, fields=fields)


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as float32, through the gguf library."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
