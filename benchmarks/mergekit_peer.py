"""The same tensors as mergekit, from an equivalent YAML, for five families.

    python benchmarks/mergekit_peer.py [--json]

Tiny random models of each family are spliced by taia and merged by mergekit 0.1.5, which is
installed into an environment of its own on first use. "attention from tuned, the rest from
base" must be equal value by value; a blend of everything at strength 0.5 in float32 may differ
by rounding, as mergekit adds 0.5 * base and 0.5 * tuned. The difference is printed in units in
the last place of the larger of the two weights. Exit code 1 if attention differs, or a blend by
more than one such unit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mergekit
from measuring import table

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

FAMILIES = {
    "llama": ("self_attn.", SMALL),
    "qwen2": ("self_attn.", SMALL),
    "mistral": ("self_attn.", {**SMALL, "head_dim": 8}),
    "phi3": ("self_attn.", SMALL),
    "qwen3": ("self_attn.", {**SMALL, "head_dim": 8}),
}
"""Model type -> what the names of its attention tensors hold, and a tiny configuration."""


def make(folder: Path, model_type: str, fields: dict[str, int], dtype: str) -> tuple[Path, Path]:
    """A random base and tuned model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return folder / "base", folder / "tuned"


def compare(folder: Path, model_type: str, keep: str, dtype: str) -> dict[str, float | int | str]:
    """Splice with taia, merge with mergekit, and count what differs."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    import taia

    kept, fields = FAMILIES[model_type]
    base, tuned = make(folder, model_type, fields, dtype)
    taia.splice(base, tuned, folder / "ours", keep=keep)
    whole = keep != "attention"
    text = mergekit.recipe(base, tuned, None if whole else kept, 0.5 if whole else 1.0, dtype)
    done = subprocess.run(
        mergekit.command(text, folder / "theirs"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"mergekit failed on {model_type}:\n{done.stderr[-2000:]}")
    ours, theirs, old, new = (
        load_file(folder / name / "model.safetensors")
        for name in ("ours", "theirs", "base", "tuned")
    )
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{model_type}: other names: {sorted(ours.keys() ^ theirs.keys())}")
    different, units = 0, 0.0
    for name, value in ours.items():
        different += int((value != theirs[name]).sum())
        size = torch.maximum(old[name].abs(), new[name].abs()).float().numpy()
        distance = (value.float() - theirs[name].float()).abs().numpy()
        units = max(units, float((distance / np.spacing(size)).max()))
    return {
        "kept": keep,
        "dtype": dtype,
        "tensors": len(ours),
        "values": sum(value.numel() for value in ours.values()),
        "values that differ": different,
        "largest difference, units in the last place": round(units, 2) if whole else 0.0,
    }


def main() -> None:
    """Compare, print a table or JSON, and fail if the two disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", help=argparse.SUPPRESS)  # as every benchmark has it
    options = parser.parse_args()
    rows = {}
    for model_type in FAMILIES:
        for keep, dtype in (("attention", "bfloat16"), ("all*0.5", "float32")):
            with tempfile.TemporaryDirectory() as folder:
                rows[f"{model_type}, {keep}"] = compare(Path(folder), model_type, keep, dtype)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table({name: {k: f"{v:,}" if isinstance(v, int) else str(v)
                            for k, v in row.items()} for name, row in rows.items()}))  # fmt: skip
    wrong = [
        name
        for name, row in rows.items()
        if (row["values that differ"] and row["kept"] == "attention")
        or float(row["largest difference, units in the last place"]) > 1
    ]
    sys.exit(f"differ: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
