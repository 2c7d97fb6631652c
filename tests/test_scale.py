"""Several processes for one training run: the same curve, each other's checkpoints, configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_tools import tiny_chat_model

from taia.training.callbacks import read_log
from taia.training.finetune import finetune

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
SAME = {"batch_size": 4, "learning_rate": 1e-2, "rank": 2, "max_length": 64, "dropout": 0.0}
SAME |= {"dtype": "float32", "save_steps": 2}
STOP_AT = 3

WORKER = """
import json, os, signal, sys
from taia.training.finetune import finetune

base, data, out, stop, options = sys.argv[1:]

def press(line):
    if line["step"] == int(stop):
        os.kill(os.getpid(), signal.SIGTERM)

try:
    finetune(base, data, out, resume=True, on_progress=press, **json.loads(options))
except KeyboardInterrupt as stopped:
    assert "resumed" in str(stopped)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model, and chats whose last batch is a short one."""
    folder = tmp_path_factory.mktemp("scale")
    rows = [{"instruction": f"{n}?", "output": "yes " * (n % 5 + 1)} for n in range(22)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "worker.py").write_text(WORKER)
    return tiny_chat_model(folder / "base"), folder / "chats.jsonl", folder / "worker.py"


def two_processes(places, out, stop=0, **options):
    """A run of two processes on the CPU; SIGTERM reaches the first after step `stop`."""
    base, data, worker = places
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    words = [worker, base, data, out, str(stop), json.dumps(SAME | options)]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def one_process(places, out, stop=0, **options):
    base, data, worker = places
    words = [worker, base, data, out, str(stop), json.dumps(SAME | options)]
    subprocess.run([sys.executable, *map(str, words)], check=True, timeout=300)


def curve(out):
    return [line["loss"] for line in read_log(out / "log.jsonl")]


@pytest.mark.slow
def test_two_processes_train_as_one_does(places, tmp_path):
    """Six steps of four examples; the same examples in every step, or the losses would differ."""
    from safetensors.torch import load_file

    options = {"method": "molora", "packing": True}  # of plain LoRA the next test shows it
    options |= {"validation": str(places[1]), "validate_steps": 2}
    finetune(*places[:2], tmp_path / "one", **SAME | options)
    two_processes(places, tmp_path / "two", **options)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert one == pytest.approx(two, rel=1e-5)
    facts = [json.loads((tmp_path / n / "train.json").read_text()) for n in ("one", "two")]
    assert [fact["device"]["processes"] for fact in facts] == [1, 2]
    assert facts[0]["tokens"] == facts[1]["tokens"]
    assert facts[0]["best"] == pytest.approx(facts[1]["best"], rel=1e-5)
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one", "two"])
def test_checkpoints_of_one_process_and_of_two_continue_each_other(first, places, tmp_path):
    start, go_on = (one_process, two_processes)[:: 1 if first == "one" else -1]
    finetune(*places[:2], tmp_path / "straight", **SAME)
    start(places, tmp_path / "mixed", stop=STOP_AT)
    assert not (tmp_path / "mixed" / "train.json").exists()
    assert len(curve(tmp_path / "mixed")) == STOP_AT + 1  # told of step 3, it stops after 4
    go_on(places, tmp_path / "mixed")
    assert curve(tmp_path / "mixed") == pytest.approx(curve(tmp_path / "straight"), rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_knows_every_field_of_the_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # unknown fields raise
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert config.distributed_type == kind
    assert config.num_processes == 8


def test_a_batch_that_two_processes_cannot_share_is_told(places, tmp_path, monkeypatch):
    from taia.errors import RecipeError
    from taia.load import load_model
    from taia.training.loop import make_trainer
    from taia.training.objective import Additions
    from taia.training.settings import Settings

    monkeypatch.setenv("WORLD_SIZE", "3")
    example = {"input_ids": [1, 2], "labels": [1, 2]}
    settings = Settings(base="b", data="d", batch_size=4, dtype="float32")
    with pytest.raises(RecipeError, match="no multiple of 3 processes"):
        make_trainer(
            load_model(places[0]), [example], settings, tmp_path, padding=0, save_steps=1,
            additions=Additions(),
        )  # fmt: skip


RECIPE = """
name: one
base: BASE
train: {data: DATA, max_steps: 2, rank: 2, batch_size: 4, max_length: 64}
evaluate: {tasks: [piqa]}
"""


def test_the_training_of_a_recipe_alone(places, tmp_path):
    from taia.errors import RecipeError
    from taia.experiment import train_recipe

    recipe = tmp_path / "one.yaml"
    recipe.write_text(RECIPE.replace("BASE", str(places[0])).replace("DATA", str(places[1])))
    assert train_recipe(recipe, tmp_path / "out").steps == 2
    recipe.write_text(f"name: one\nbase: {places[0]}\nadapter: x\nevaluate: {{tasks: [piqa]}}\n")
    with pytest.raises(RecipeError, match="no field train"):
        train_recipe(recipe, tmp_path / "other")


def test_a_recipe_and_its_settings_are_stated_in_one_place(tmp_path):
    command = [sys.executable, "-m", "taia", "train"]
    out = ["--out", str(tmp_path / "o")]
    for words, told in (
        (["r.yaml", "--rank", "3", *out], "--rank"),
        (out, "--base and --data"),
        ([], "--out: needed"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert told in done.stderr
