"""Kill splices at random moments and look at what they leave.

    python tools/kill_splices.py [--kills 200] [--seed 0] [--megabytes 120] [--folder DIR] [--gguf]

Each round starts a splice of a checkpoint of several shards, or with `--gguf` of a GGUF file whose
receipt stands beside it, every second time onto a complete
older output, and kills it with SIGKILL after a random part of its usual duration. Rounds that
ended before they were killed do not count. Afterwards the destination must be absent, the
complete old output or the complete new one, and `taia verify` must pass on it. Then the same
splice runs again: it must succeed, and leave nothing beside the destination. Exit code 1 if
anything else is found.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import taia
from taia.errors import TaiaError
from taia.receipt import receipt_path

SPLICE = "import sys, taia; taia.splice(*sys.argv[1:4], keep=sys.argv[4], overwrite=True)"
LAYERS = 8


def make_pair(folder: Path, megabytes: int) -> None:
    """Two checkpoints of a Llama shape in float32, one layer a shard, with random weights."""
    width = max(8, int((megabytes * 1e6 / 4 / LAYERS / 7) ** 0.5) // 8 * 8)
    shapes = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (width, width) for name in ("gate", "up", "down")},
    }
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": True,
        "vocab_size": 16,
    }
    for seed, model in enumerate(("base", "tuned")):
        (folder / model).mkdir(parents=True)
        chance = np.random.default_rng(seed)
        placed = {}
        for layer in range(LAYERS):
            file = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
            tensors = {
                f"model.layers.{layer}.{name}.weight": chance.random(shape, np.float32)
                for name, shape in shapes.items()
            }
            if layer == 0:
                tensors["model.embed_tokens.weight"] = chance.random((16, width), np.float32)
            save_file(tensors, folder / model / file, {"format": "pt"})
            placed |= dict.fromkeys(tensors, file)
        index = json.dumps({"metadata": {}, "weight_map": placed})
        (folder / model / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        (folder / model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_gguf_pair(folder: Path, megabytes: int) -> None:
    """Two GGUF files of a Llama shape in float32 with random weights."""
    from gguf import GGUFWriter

    width = max(32, int((megabytes * 1e6 / 4 / LAYERS / 7) ** 0.5) // 32 * 32)
    for seed, model in enumerate(("base", "tuned")):
        chance = np.random.default_rng(seed)
        writer = GGUFWriter(folder / f"{model}.gguf", "llama")
        writer.add_block_count(LAYERS)
        writer.add_tensor("token_embd.weight", chance.random((16, width), np.float32))
        for layer in range(LAYERS):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                         "ffn_down"):  # fmt: skip
                values = chance.random((width, width), np.float32)
                writer.add_tensor(f"blk.{layer}.{name}.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def start(folder: Path, keep: str, suffix: str) -> subprocess.Popen[bytes]:
    """A splice of the pair in `folder` into folder/place/out, in a process of its own."""
    names = [str(folder / f"{name}{suffix}") for name in ("base", "tuned", "place/out")]
    return subprocess.Popen([sys.executable, "-c", SPLICE, *names, keep])


def timed(folder: Path, keep: str, suffix: str) -> float:
    """Seconds of a whole splice. Raises RuntimeError if it fails."""
    begun = time.perf_counter()
    if start(folder, keep, suffix).wait() != 0:
        raise RuntimeError(f"a splice of '{keep}' failed")
    return time.perf_counter() - begun


def state(out: Path) -> str:
    """The selection of the output, `absent`, or what is wrong with it."""
    if not out.exists():
        return "absent"
    try:
        return taia.verify(out).selection
    except TaiaError as error:
        return f"BROKEN: {error}"


def kill_splices(
    folder: Path, kills: int, seed: int, megabytes: int, *, gguf: bool = False
) -> tuple[Counter[str], int]:
    """What was found after each kill, and how many findings were not allowed."""
    (make_gguf_pair if gguf else make_pair)(folder, megabytes)
    suffix = ".gguf" if gguf else ""
    place = folder / "place"
    place.mkdir()
    out = place / f"out{suffix}"
    belongs = {out, receipt_path(out)}
    chance = random.Random(seed)
    durations = [timed(folder, "ffn", suffix), timed(folder, "ffn", suffix)]
    found: Counter[str] = Counter()
    wrong = killed = number = 0
    while killed < kills and number < 4 * kills:
        number += 1
        old, new = ("ffn", "attention + ffn[1]*0.5") if number % 2 else ("absent", "attention")
        if old == "absent" and out.exists():
            shutil.rmtree(place)
            place.mkdir()
        elif old != "absent" and state(out) != old:
            durations.append(timed(folder, old, suffix))
        process = start(folder, new, suffix)
        # the machine may be busy or not: what it lately took counts
        time.sleep(chance.uniform(0, statistics.median(durations[-5:])))
        process.kill()
        ended = process.wait() == 0
        killed += not ended
        after = state(out)
        litter = any(path not in belongs for path in place.iterdir())
        told = {old: "old", new: "new"}.get(after, after.split(":")[0])
        found[f"{'not killed' if ended else 'killed'}, {told}, litter {litter}"] += 1
        wrong += after not in (old, new, "absent")
        durations.append(timed(folder, new, suffix))
        if state(out) != new or any(path not in belongs for path in place.iterdir()):
            found["second run failed, or left litter"] += 1
            wrong += 1
    return found, wrong


def main() -> None:
    """Kill and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder without it")
    parser.add_argument("--gguf", action="store_true", help="kill splices of GGUF files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, asked = Path(name), (options.kills, options.seed, options.megabytes)
        found, wrong = kill_splices(folder, *asked, gguf=options.gguf)
    for what, count in sorted(found.items()):
        print(f"{what}: {count}")
    print(f"seed {options.seed}, {options.kills} kills, {wrong} findings that must not be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
