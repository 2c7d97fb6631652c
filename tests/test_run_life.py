"""The life of a training run: validation, early stop, trackers, a broken loss, kills."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest
from chat_tools import tiny_chat_model

from taia.errors import RecipeError, TaiaError
from taia.training.callbacks import read_log
from taia.training.finetune import finetune
from taia.training.folder import CHECKPOINTS, RECORD, publish

FAST = {"batch_size": 4, "learning_rate": 1e-2, "rank": 2, "max_length": 64}
KILLED = """
import json, os, signal, sys, threading
from taia.training.finetune import finetune

base, data, out, delay, options = sys.argv[1:]

def first(line, started=[]):
    if not started and line["step"] >= 2:
        started.append(True)
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()

finetune(base, data, out, resume=True, on_progress=first, **json.loads(options))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model, chats, and other chats to validate on."""
    folder = tmp_path_factory.mktemp("life")
    for name, word in (("chats", "yes "), ("other", "no ")):
        rows = [{"instruction": f"{n}?", "output": word * (n % 5 + 1)} for n in range(22)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tiny_chat_model(folder / "base"), folder / "chats.jsonl", folder / "other.jsonl"


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def loss_of(base, adapter, data):
    """The mean loss of an assistant's token, one example at a time."""
    import torch
    from peft import PeftModel

    from taia.load import load_model, load_tokenizer
    from taia.training.data import encode_all, read_chats

    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), adapter).eval()
    total = tokens = 0.0
    for example in encode_all(read_chats(data), load_tokenizer(base), 64).examples:
        ids = torch.tensor([example["input_ids"]])
        labels = torch.tensor([example["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    return total / tokens


@pytest.mark.slow
def test_the_best_checkpoint_on_the_validation_set_is_the_outcome(places, tmp_path):
    base, data, other = places
    options = FAST | {"dtype": "float32", "learning_rate": 5e-2, "max_steps": 12}
    asked = {"validation": other, "validate_steps": 2, "patience": 2}
    result = finetune(base, data, tmp_path / "o", **options, **asked)
    lines = read_log(tmp_path / "o" / "log.jsonl")
    checked = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = json.loads((tmp_path / "o" / "train.json").read_text())["best"]
    assert best["step"] == min(checked, key=checked.__getitem__)
    assert list(checked) == list(range(2, result.steps + 1, 2))
    assert result.steps == min(12, best["step"] + 4)  # two more, neither of them better
    assert best["validation_loss"] == pytest.approx(loss_of(base, tmp_path / "o", other), rel=1e-4)
    plain = finetune(base, data, tmp_path / "plain", **options)
    before = [line["loss"] for line in read_log(plain.out / "log.jsonl")]
    assert [line["loss"] for line in lines] == before[: result.steps]  # it changes no step


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_patience(places, tmp_path):
    base, data, other = places
    options = FAST | {"learning_rate": 5e-2, "max_steps": 10, "validation": other}
    options |= {"validate_steps": 2, "patience": 2}

    def press(line):
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    straight = finetune(base, data, tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt, match="resumed"):
        finetune(base, data, tmp_path / "b", on_progress=press, **options)
    resumed = finetune(base, data, tmp_path / "b", resume=True, **options)
    assert resumed.steps == straight.steps
    assert all((tensors(resumed.out)[n] == t).all() for n, t in tensors(straight.out).items())


def test_a_signal_while_the_processes_agree_is_obeyed_at_the_next_step(monkeypatch):
    from types import SimpleNamespace

    from taia.training import callbacks

    interrupt = callbacks.Interrupt()
    watch = callbacks.watching(interrupt, lambda _: ())

    def signalled(flag):
        interrupt.asked = True
        return flag

    monkeypatch.setattr(callbacks, "any_of", signalled)
    told = []
    for _ in range(2):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        watch.on_step_end(SimpleNamespace(do_eval=False), None, control)
        told.append((control.should_save, control.should_training_stop, interrupt.obeyed))
    assert told == [(False, False, False), (True, True, True)]


def test_what_needs_a_validation_set_says_so(places, tmp_path):
    with pytest.raises(RecipeError, match="patience needs validation"):
        finetune(*places[:2], tmp_path / "o", patience=2, **FAST)


def test_trackers_are_checked_before_anything_is_written(places, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        finetune(*places[:2], tmp_path / "o", report_to=["tensorbord"], **FAST)
    assert not (tmp_path / "o").exists()


def test_a_broken_loss_names_the_examples_of_its_step(places, tmp_path):
    bad = FAST | {"method": "full", "learning_rate": 1e30}
    with pytest.raises(TaiaError, match="Lower the learning rate") as caught:
        finetune(*places[:2], tmp_path / "o", **bad)
    assert len(caught.value.faults) == 4
    assert all(fault.startswith(f"{places[1]}:") for fault in caught.value.faults)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "molora"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(method, places, tmp_path):
    base, data, _ = places
    options = FAST | {"method": method, "max_steps": 40, "save_steps": 3}
    straight = finetune(base, data, tmp_path / "straight", **options)
    (tmp_path / "worker.py").write_text(KILLED)
    out = tmp_path / "killed"
    pace = random.Random()
    for _ in range(2):
        delay = pace.uniform(0, straight.seconds / 2)
        words = [tmp_path / "worker.py", base, data, out, delay, json.dumps(options)]
        done = subprocess.run([sys.executable, *map(str, words)], check=False, timeout=300)
        assert done.returncode in (-signal.SIGKILL, 0), delay
    finetune(base, data, out, resume=True, **options)
    whole, mended = tensors(straight.out), tensors(out)
    assert whole.keys() == mended.keys()
    assert all((mended[name] == tensor).all() for name, tensor in whole.items())
    losses = [[line["loss"] for line in read_log(at / "log.jsonl")] for at in (straight.out, out)]
    assert losses[0] == losses[1]
    assert all(map(math.isfinite, losses[0]))


def test_what_a_run_that_died_while_it_published_left_is_replaced(tmp_path):
    name = "additional_chat_templates"
    for place, text in (("out", "old"), ("finished", "new")):
        (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place / name / "rag.jinja").write_text(text)
    (tmp_path / "out" / CHECKPOINTS).mkdir()
    publish(tmp_path / "out", tmp_path / "finished", {"steps": 1})
    assert (tmp_path / "out" / name / "rag.jinja").read_text() == "new"
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == {"steps": 1}
    assert not (tmp_path / "out" / CHECKPOINTS).exists()
