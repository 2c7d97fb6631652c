"""Cells on a Ray cluster: the same files as without it, lost workers, addresses that are none."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from taia.errors import ClusterError
from taia.evaluation.harness import evaluate
from taia.experiment import run
from taia.experiment.cell import make_cell
from taia.experiment.lock import remove
from taia.experiment.on_ray import _check_nodes, check_address
from taia.experiment.parts import PARTS, gather, parts_of, score_part
from taia.experiment.stages import evaluation
from taia.recipe import Need, Resources, load_recipe

pytest.importorskip("ray")

PATIENCE = 900
"""Seconds for a run that takes half a minute on two free cores."""

STATED: dict[str, Any] = {
    "name": "spread",
    "base": "base",
    "train": {
        "data": "chats.jsonl", "batch_size": 4, "max_length": 64, "rank": 2, "learning_rate": 0.1,
        "save_steps": 1,
    },
    "evaluate": {"tasks": ["facts"], "data": ".", "variants": ["base", "vanilla", "taia"]},
    "sweep": {"evaluate.protocol": ["chat", "plain"]},
    "resources": {"train": {"memory": "400 MB"}, "evaluate": {"memory": "200 MB"}},
}  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chat_tools import tiny_bench

    return tiny_bench(tmp_path_factory.mktemp("ray"))


def outcome(out: Path) -> dict[str, bytes]:
    """Every file whose bytes a run decides: weights, results, scores; not times and places."""
    names = ("adapter_model.safetensors", "overlap.json", "deltas.json", "sweep.json")
    found = [path for path in out.rglob("*") if path.name in names or "results" in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in found if path.is_file()}


def kill_workers(command: subprocess.Popen[bytes], wanted: set[str], seconds: float) -> set[str]:
    """SIGKILL the first worker seen at each wanted task; the tasks whose worker was killed."""
    killed: set[str] = set()
    end = time.monotonic() + seconds
    while command.poll() is None and killed != wanted and time.monotonic() < end:
        try:
            workers = psutil.Process(command.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            break
        for worker in workers:
            try:
                title = " ".join(worker.cmdline())
                task = next((name for name in wanted - killed if f": {name}" in title), None)
                if title.startswith("ray::taia") and task:
                    worker.kill()
                    killed.add(task)
            except psutil.Error:
                continue
        time.sleep(0.01)
    return killed


@pytest.mark.slow
def test_lost_workers_run_again_and_the_files_are_those_without_ray(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(bench, STATED)
    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "cache"))  # answers of one run are kept apart
    words = [sys.executable, "-m", "taia", "run", str(recipe), "--out", str(tmp_path / "ray")]
    with (tmp_path / "told").open("wb") as told:
        command = subprocess.Popen([*words, "--ray", "local"], stdout=told, stderr=told)
        try:
            killed = kill_workers(command, {"train", "vanilla: facts"}, PATIENCE)
            assert command.wait(PATIENCE) == 0, (tmp_path / "told").read_text()
        finally:
            for process in [*psutil.Process().children(recursive=True)]:
                if command.poll() is None:
                    process.kill()
    assert killed == {"train", "vanilla: facts"}
    lines = (tmp_path / "told").read_text().splitlines()
    done = [line.split(": done in")[0] for line in lines if ": done in" in line]
    total = 1 + 2 * (2 + 3)
    assert [line.split()[0] for line in done] == [f"{n}/{total}" for n in range(1, total + 1)]
    assert len({line.split(maxsplit=1)[1] for line in done}) == total

    monkeypatch.setenv("TAIA_CACHE", str(tmp_path / "other-cache"))  # from those of the other
    alone = run(recipe, tmp_path / "alone")
    spread = tmp_path / "ray"
    assert outcome(spread) == outcome(alone)
    assert len([name for name in outcome(alone) if "results" in name]) == 6
    for cell in (alone / "cells").iterdir():
        mine, other = (
            json.loads((folder / "cells" / cell.name / "summary.json").read_text())
            for folder in (spread, alone)
        )
        assert mine.pop("tuned") != other.pop("tuned")
        assert mine == other
        assert not (spread / "cells" / cell.name / "parts").exists()

    times = {path: path.stat().st_mtime_ns for path in spread.rglob("*") if path.is_file()}
    run(recipe, spread, ray="local")
    run(recipe, spread)
    assert times == {path: path.stat().st_mtime_ns for path in spread.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_parts_put_together_are_one_evaluation(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapter_tools import save_adapter

    save_adapter(bench / "base", bench / "adapter", r=2, lora_alpha=40)
    stated = {name: STATED[name] for name in ("name", "base", "evaluate")} | {"adapter": "adapter"}
    recipe = load_recipe(write(bench, stated))
    found = {}
    for name in ("parts", "whole"):
        monkeypatch.setenv("TAIA_CACHE", str(tmp_path / f"cache-{name}"))
        cell = make_cell(recipe, "", bench, tmp_path / name)
        if name == "parts":
            for part in reversed(parts_of(cell)):
                score_part(cell, *part)
            gather(cell)
            remove(cell.out / PARTS)
        evaluate(cell.base, cell.out, **evaluation(cell))
        found[name] = {
            str(path.relative_to(cell.out)): path.read_bytes()
            for path in cell.out.rglob("*") if path.is_file()
        }  # fmt: skip
    assert found["parts"] == found["whole"]
    assert len(found["whole"]) == 3 + 2


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nothing answers there"),
        ("127.0.0.1:99999", "nothing answers there"),
        ("nowhere", "HOST:PORT, auto or local"),
        ("ray://127.0.0.1:10001", "addresses of Ray's client"),
    ],
)
def test_an_address_that_does_not_answer_is_told_at_once(
    bench: Path, tmp_path: Path, address: str, words: str
) -> None:
    start = time.monotonic()
    with pytest.raises(ClusterError, match=words) as caught:
        run(write(bench, copy.deepcopy(STATED)), tmp_path / "out", ray=address)
    assert time.monotonic() - start < 10
    assert address in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_port_that_is_not_rays_is_told_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(ClusterError, match="no Ray cluster answers"):
            check_address(address)
        assert time.monotonic() - start < 60


def test_what_no_node_has_is_told_before_a_task_waits_for_it() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8e9}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 8e9}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 8e12}},
    ]
    small = Need(memory=10**9)
    both = ["train", "evaluate"]
    _check_nodes(nodes, Resources(train=small, evaluate=Need(gpus=1, memory=10**9)), both)
    large = Resources(train=Need(cpus=4, gpus=1), evaluate=Need(memory=10**10))
    with pytest.raises(ClusterError) as caught:
        _check_nodes(nodes, large, both)
    assert len(caught.value.faults) == 2
    _check_nodes(nodes, Resources(train=large.train, evaluate=small), ["evaluate"])
    assert "4 CPUs, 1 GPUs and 2.0 GB are needed on one node" in str(caught.value)
