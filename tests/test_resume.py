"""A mixed run killed at a random step ends with the bits of an undisturbed one: every schedule."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal

import pytest
from chat_tools import tiny_chat_model

from taia.errors import RecipeError
from taia.training.callbacks import read_log
from taia.training.finetune import finetune
from taia.training.mixture import SCHEDULES

FAST = {"batch_size": 4, "learning_rate": 1e-2, "rank": 2, "max_length": 48, "save_steps": 2}
METHODS = {"lora": {}, "molora": {"balance": 0.1, "expert_dropout": 0.2}}
STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for name in "ab":
        rows = [{"instruction": f"{name} {n}?", "output": "yes " * (n % 5 + 1)} for n in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_chat_model(folder / "base")
    return folder


def mixture(place, schedule, size=4 * STEPS):
    shares = (0.6, 0.4)
    if schedule == "piecewise":
        shares = ([[0, 0.2], [0.5, 1], [1, 0.9]], [[0, 0.8], [0.5, 0], [1, 0.1]])
    sources = [
        {"from": f"{place}/{name}.jsonl", "share": share, "ood": name == "b"}
        for name, share in zip("ab", shares, strict=True)
    ]
    stated = {} if schedule == "piecewise" else {"schedule": schedule}
    return {"sources": sources, "size": size, **stated}


def run_until(step, *words, **options):
    """A training that kills its own process, with no time to say goodbye."""

    def die(line):
        if line["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    finetune(*words, on_progress=die, **options)


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported everything before, and share no state with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["taia.training.finetune", "transformers.trainer", "peft"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [*SCHEDULES, "piecewise"])
def test_a_killed_run_ends_with_the_same_bits(schedule, method, place, processes, tmp_path):
    import torch
    from safetensors.torch import load_file

    words = (place / "base", mixture(place, schedule))
    options = FAST | {"method": method} | METHODS[method]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(*words, whole, **options)
    at = random.randint(1, STEPS - 1)
    child = processes.Process(target=run_until, args=(at, *words, cut), kwargs=options)
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert not (cut / "train.json").exists()
    finetune(*words, cut, resume=True, **options)
    one, two = (load_file(out / "adapter_model.safetensors") for out in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one), f"killed at step {at}"
    kept = ("step", "loss", "tokens", "epoch", "share_a", "share_b")
    logs = [
        [[line[k] for k in kept] for line in read_log(out / "log.jsonl")] for out in (whole, cut)
    ]
    assert logs[0] == logs[1], f"killed at step {at}"
    with pytest.raises(RecipeError, match="data"):
        finetune(place / "base", mixture(place, schedule, size=20), cut, resume=True, **options)
