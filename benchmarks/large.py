"""Time and memory of `taia splice` on synthetic Llama checkpoints, beside cp and mergekit.

    python benchmarks/large.py [--layers 8 24] [--repeats 3] [--folder DIR] [--no-mergekit]
                               [--state warm cold] [--limit 600]

Layers of the 7B shape in bfloat16: 8 of them are 3.8 GB, 24 are 10 GB, and a base, a tuned model
and an output stand on the disk at a time. Every tool runs in a process of its own, in turns,
the output removed and nothing waiting to be written. "warm": both models are read beforehand, so
that every tool finds in the page cache what the memory holds of them, as after a download or a
training. "cold": both are put out of it, so that the disk decides. The median counts, and the
spread is printed. `cp` leaves its bytes in the cache, taia waits until they are on the disk:
`cp and sync` does so too. Every measurement is told as it comes; a command is given `--limit`
seconds, and one that needs more is not tried again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mergekit
from measuring import TAIA, cool, files_of, memory, run, table, warm

HIDDEN, INNER, WORDS = 4096, 11008, 32000
SHARD = 5 * 10**9
STATES = ["warm", "cold"]


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of the 7B shape with fewer layers."""
    square, wide, tall = (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        found |= {f"{start}self_attn.{p}_proj.weight": square for p in "qkvo"}
        found |= {f"{start}mlp.{p}_proj.weight": wide for p in ("gate", "up")}
        found[f"{start}mlp.down_proj.weight"] = tall
        found[f"{start}input_layernorm.weight"] = (HIDDEN,)
        found[f"{start}post_attention_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def make(folder: Path, layers: int, seed: int) -> None:
    """Write a checkpoint of random weights, a shard at a time."""
    import ml_dtypes
    import numpy as np

    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_attention_heads": 32, "num_hidden_layers": layers,
        "num_key_value_heads": 32, "vocab_size": WORDS, "tie_word_embeddings": False,
        "dtype": "bfloat16", "rms_norm_eps": 1e-05, "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    draw = np.random.default_rng(seed)
    pool = (0.02 * draw.standard_normal(1 << 25, dtype=np.float32)).astype(ml_dtypes.bfloat16)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers).items():
        if 2 * sum(map(size, [*groups[-1].values(), shape])) > SHARD:
            groups.append({})
        groups[-1][name] = shape
    placed = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        placed |= dict.fromkeys(group, file)
        with (folder / file).open("wb") as target:
            target.write(header(group))
            for shape in group.values():
                left = size(shape)
                while left:
                    first = int(draw.integers(pool.size // 2))
                    part = pool[first : first + min(left, pool.size // 2)]
                    target.write(part.tobytes())
                    left -= part.size
    index = {"metadata": {"total_size": sum(map(size, shapes(layers).values())) * 2}}
    text = json.dumps(index | {"weight_map": placed}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def size(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def header(group: dict[str, tuple[int, ...]]) -> bytes:
    """The head of a safetensors file of bfloat16 tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in group.items():
        stop = position + 2 * size(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tools(folder: Path, with_mergekit: bool) -> dict[str, list[str]]:
    """The commands, by name; each writes folder/out."""
    base, tuned, out = folder / "base", folder / "tuned", folder / "out"
    splice = [TAIA, "splice", str(base), str(tuned), str(out)]
    commands = {
        "cp": ["cp", "-r", str(base), str(out)],
        "cp and sync": ["sh", "-c", f"cp -r '{base}' '{out}' && sync '{out}'/* '{out}'"],
        "taia splice attention": splice,
        "taia splice all*0.5": [*splice, "--keep", "all*0.5"],
    }
    if with_mergekit:
        text = mergekit.recipe(base, tuned, "self_attn.", 1.0, "bfloat16")
        commands["mergekit, attention"] = mergekit.command(text, out)
    return commands


def measure(
    folder: Path, state: str, repeats: int, with_mergekit: bool, limit: float | None
) -> tuple[str, str]:
    """A line about the run, and its table."""
    models = [folder / "base", folder / "tuned"]
    total = sum(file.stat().st_size for file in files_of(models))
    if state == "warm" and total > memory():
        return f"{total / 2e9:.1f} GB: the memory does not hold both models", ""
    prepare = {"warm": warm, "cold": cool}[state]
    seen: dict[str, list[tuple[float, float]]] = {}
    for turn in range(repeats):
        for name, command in tools(folder, with_mergekit).items():
            if name.startswith("mergekit") and turn and repeats <= 3:
                continue  # it takes half a minute, and is far away
            if turn and math.isinf(seen[name][0][0]):
                continue
            shutil.rmtree(folder / "out", ignore_errors=True)
            prepare(models)
            taken, peak, _ = run(command, limit)
            seen.setdefault(name, []).append((taken, peak))
            print(
                f"{state}, turn {turn + 1}: {name}: {taken:.2f} s, {peak:.0f} MiB", file=sys.stderr
            )
    shutil.rmtree(folder / "out", ignore_errors=True)
    seconds = {name: statistics.median(t for t, _ in runs) for name, runs in seen.items()}
    rows = {
        name: {
            "seconds": f"{seconds[name]:.2f}",
            "from": f"{min(t for t, _ in runs):.2f}",
            "to": f"{max(t for t, _ in runs):.2f}",
            "ratio to cp": f"{seconds[name] / seconds['cp']:.2f}",
            "ratio to cp and sync": f"{seconds[name] / seconds['cp and sync']:.2f}",
            "ratio to taia": f"{seconds[name] / seconds['taia splice attention']:.2f}",
            "peak MiB": f"{max(m for _, m in runs):.0f}",
        }
        for name, runs in seen.items()
    }
    there = {"warm": "read beforehand", "cold": "out of the page cache"}[state]
    return f"{total / 2e9:.1f} GB, median of {repeats}, both models {there}", table(rows)


def main() -> None:
    """Make the models, measure, print a table a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--state", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are made; a temporary one")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a command may take")
    parser.add_argument(
        "--make", nargs=3, metavar=("DIR", "LAYERS", "SEED"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.make:
        make(Path(options.make[0]), int(options.make[1]), int(options.make[2]))
        return
    if not options.no_mergekit:
        mergekit.program()
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            for seed, model in enumerate(("base", "tuned")):
                # in a process of its own: a child's peak memory counts from its parent's
                words = ["--make", str(folder / model), str(layers), str(seed)]
                subprocess.run([sys.executable, __file__, *words], check=True)
            for state in options.state:
                line, rows = measure(
                    folder, state, options.repeats, not options.no_mergekit, options.limit
                )
                print(f"{layers} layers of the 7B shape, {line}\n\n{rows}\n", flush=True)


if __name__ == "__main__":
    main()
