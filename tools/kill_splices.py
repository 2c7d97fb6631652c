"""Kill splices at random moments and look at what they leave.

    python tools/kill_splices.py [--kills 200] [--seed 0] [--megabytes 120] [--folder DIR]

Each round starts `taia splice` on a checkpoint of several shards, every second time with
--overwrite onto a complete older output, and kills it with SIGKILL after a random part of its
usual duration. Afterwards the destination must be absent, the complete old output or the
complete new one, and `taia verify` must pass on it. Then the same splice runs again: it must
succeed, and leave nothing beside the destination. Exit code 1 if anything else is found.
"""

from __future__ import annotations

import argparse
import json
import random
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


def start(folder: Path, keep: str) -> subprocess.Popen[bytes]:
    """A splice of the pair in `folder` into folder/place/out, in a process of its own."""
    names = [str(folder / name) for name in ("base", "tuned", "place/out")]
    return subprocess.Popen([sys.executable, "-c", SPLICE, *names, keep])


def state(out: Path) -> str:
    """The selection of the output, `absent`, or what is wrong with it."""
    if not out.exists():
        return "absent"
    try:
        return taia.verify(out).selection
    except TaiaError as error:
        return f"BROKEN: {error}"


def kill_splices(folder: Path, kills: int, seed: int, megabytes: int) -> tuple[Counter[str], int]:
    """What was found after each kill, and how many findings were not allowed."""
    make_pair(folder, megabytes)
    place = folder / "place"
    place.mkdir()
    out = place / "out"
    chance = random.Random(seed)
    begun = time.perf_counter()
    assert start(folder, "ffn").wait() == 0
    duration = time.perf_counter() - begun
    found: Counter[str] = Counter()
    wrong = 0
    for number in range(kills):
        old, new = ("ffn", "attention + ffn[1]*0.5") if number % 2 else ("absent", "attention")
        if old == "absent" and out.exists():
            out.rename(folder / f"retired{number}")
            subprocess.run(["rm", "-r", str(folder / f"retired{number}")], check=True)
        elif old != "absent" and state(out) != old:
            assert start(folder, old).wait() == 0
        process = start(folder, new)
        time.sleep(chance.uniform(0, 1.1 * duration))
        process.kill()
        ended = process.wait() == 0
        after = state(out)
        # a kill between the two renames of a replacement leaves the old one beside it
        kept = [p for p in place.iterdir() if p != out]
        told = {old: "old", new: "new"}.get(after, after.split(":")[0])
        found[f"{'ended by itself' if ended else 'killed'}, {told}, litter {bool(kept)}"] += 1
        wrong += after not in (old, new, "absent")
        if start(folder, new).wait() != 0 or state(out) != new:
            found["second run failed"] += 1
            wrong += 1
        left = [p.name for p in place.iterdir() if p != out]
        if left:
            found["litter after the second run"] += 1
            wrong += 1
    return found, wrong


def main() -> None:
    """Kill and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found, wrong = kill_splices(Path(folder), options.kills, options.seed, options.megabytes)
    for what, count in sorted(found.items()):
        print(f"{what}: {count}")
    print(f"seed {options.seed}, {options.kills} kills, {wrong} findings that must not be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
