"""Time and memory of `taia plan` on a simulated checkpoint of 671 billion parameters.

    python benchmarks/plan.py [--layers 61] [--experts 256] [--shards 163] [--repeats 3]

Names, shapes and shard count of DeepSeek-V3 in its own float8 format, 671B parameters and 90,000
tensors; the shards hold headers and holes, so that a base and a tuned model take some 50 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import TAIA, run, table

HIDDEN, HEADS, WORDS = 7168, 128, 129280
DENSE, EXPERT = 18432, 2048
BLOCK = 128
"""Side of the squares of float8 weights that share a scale."""

PREDICTION = 61
"""The layer of multi-token prediction, stored after the 61 others."""

Entry = tuple[str, str, tuple[int, ...]]


def tensors(layers: int, experts: int) -> Iterator[Entry]:
    """Name, dtype and shape of every tensor, the multi-token prediction layer included."""
    yield "model.embed_tokens.weight", "BF16", (WORDS, HIDDEN)
    for layer in [*range(layers), PREDICTION]:
        start = f"model.layers.{layer}."
        if layer == PREDICTION:
            yield f"{start}embed_tokens.weight", "BF16", (WORDS, HIDDEN)
            yield f"{start}enorm.weight", "BF16", (HIDDEN,)
            yield f"{start}hnorm.weight", "BF16", (HIDDEN,)
            yield f"{start}eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
            yield f"{start}shared_head.norm.weight", "BF16", (HIDDEN,)
            yield f"{start}shared_head.head.weight", "BF16", (WORDS, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}{norm}.weight", "BF16", (HIDDEN,)
        yield from attention(f"{start}self_attn.")
        if layer < min(3, layers):
            yield from feed_forward(f"{start}mlp.", DENSE)
            continue
        yield f"{start}mlp.gate.weight", "BF16", (experts, HIDDEN)
        yield f"{start}mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from feed_forward(f"{start}mlp.shared_experts.", EXPERT)
        for expert in range(experts):
            yield from feed_forward(f"{start}mlp.experts.{expert}.", EXPERT)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (WORDS, HIDDEN)


def attention(start: str) -> Iterator[Entry]:
    """Multi-head latent attention."""
    yield from scaled(f"{start}q_a_proj", (1536, HIDDEN))
    yield f"{start}q_a_layernorm.weight", "BF16", (1536,)
    yield from scaled(f"{start}q_b_proj", (HEADS * 192, 1536))
    yield from scaled(f"{start}kv_a_proj_with_mqa", (576, HIDDEN))
    yield f"{start}kv_a_layernorm.weight", "BF16", (512,)
    yield from scaled(f"{start}kv_b_proj", (HEADS * 256, 512))
    yield from scaled(f"{start}o_proj", (HIDDEN, HEADS * 128))


def feed_forward(start: str, inner: int) -> Iterator[Entry]:
    """Gate, up and down."""
    yield from scaled(f"{start}gate_proj", (inner, HIDDEN))
    yield from scaled(f"{start}up_proj", (inner, HIDDEN))
    yield from scaled(f"{start}down_proj", (HIDDEN, inner))


def scaled(name: str, shape: tuple[int, int]) -> Iterator[Entry]:
    """A float8 weight and the scales of its blocks."""
    yield f"{name}.weight", "F8_E4M3", shape
    scales = tuple(math.ceil(side / BLOCK) for side in shape)
    yield f"{name}.weight_scale_inv", "F32", scales


def make(folder: Path, layers: int, experts: int, shards: int) -> tuple[int, int]:
    """Write headers and holes. Returns the number of tensors, and of bytes that they stand for."""
    width = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
    folder.mkdir()
    config = {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": HIDDEN, "num_hidden_layers": layers, "n_routed_experts": experts,
        "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    entries = list(tensors(layers, experts))
    each = math.ceil(len(entries) / shards)
    placed, total = {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        head: dict[str, object] = {}
        position = 0
        for name, dtype, shape in entries[number * each : (number + 1) * each]:
            stop = position + math.prod(shape) * width[dtype]
            head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
            placed[name], position = file, stop
        if not head:
            continue
        text = json.dumps(head, separators=(",", ":")).encode()
        with (folder / file).open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            target.truncate(8 + len(text) + position)
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(entries), total


def main() -> None:
    """Make both models, plan, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--shards", type=int, default=163)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base, tuned = Path(name) / "base", Path(name) / "tuned"
        for model in (base, tuned):
            count, size = make(model, options.layers, options.experts, options.shards)
        turns = range(options.repeats + 1)  # the first is not counted
        runs = [run([TAIA, "plan", str(base), str(tuned)])[:2] for _ in turns][1:]
    print(f"{count:,} tensors in {options.shards} shards, {size / 1e9:,.0f} GB, "
          f"median of {options.repeats}\n")  # fmt: skip
    row = {
        "seconds": f"{statistics.median(t for t, _ in runs):.2f}",
        "peak MiB": f"{max(m for _, m in runs):.0f}",
    }
    print(table({"taia plan": row}))


if __name__ == "__main__":
    main()
