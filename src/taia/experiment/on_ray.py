"""The cells of an experiment on a Ray cluster: the same files as without it.

A Ray task is one training, the measuring of one fine-tune, or one variant on one task. Each
reads and writes files of its cell alone and does nothing where they are there, so that Ray may
carry a task out again after its worker was lost (`RETRIES` times), and the same command goes on
after anything else. What is left is done here: a shared training given to its cells, parts put
together, reports.

All nodes see the run's folder, the data and the models under the same paths, and have this
version of taia installed. Tasks reserve what the recipe states under `resources`; the number of
CPUs is also the number of threads, which may change the last digits of a result.

Limits: no address ray://HOST; the command runs on a machine of the cluster.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from taia import __version__
from taia.errors import ClusterError, DependencyError, TaiaError
from taia.experiment.cell import Cell
from taia.experiment.lock import LOCK, finish_stage, forget_after
from taia.experiment.parts import gather, parts_of, score_part
from taia.experiment.stages import CellTask, share_training, stages, undone
from taia.recipe import Need, Resources

__all__ = ["carry_out_on_ray", "check_address", "connected"]

RETRIES = 3
"""How often a task whose worker was lost is carried out again."""

CONNECT_SECONDS = 5
HEALTH_SECONDS = 20
"""How long an address may take to accept a connection, and a cluster to say that it is well."""

STARTS = 3
"""How often a cluster of this machine is started: Ray waits 30 seconds, a busy machine longer."""

STORE_BYTES = 100 * 2**20
"""Ray's own store of a cluster of this machine: tasks pass names and seconds, no tensors."""

MEASURED = ("overlap", "deltas")


@dataclass(frozen=True, slots=True)
class Unit:
    """One Ray task: the cell, what is done (a stage, or a variant on a task), and its needs."""

    task: CellTask
    kind: str
    arguments: tuple[str, ...]
    need: Need

    @property
    def label(self) -> str:
        """How progress calls it."""
        what = ": ".join(self.arguments) or self.kind
        return f"{self.task.cell.name}: {what}" if self.task.cell.name else what


@contextlib.contextmanager
def connected(address: str, resources: Resources, tasks: Sequence[CellTask]) -> Iterator[Any]:
    """Ray, connected to an address that was checked; `local` starts a cluster and ends it.

    Raises ClusterError, also where no node has what is needed for the rest of `tasks`.
    """
    import ray

    _connect(ray, address)
    try:
        trains = any(_needs(task, "train") and task.owner is None for task in tasks)
        _check_nodes(ray.nodes(), resources, ["train"] * trains + ["evaluate"])
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **own)
        except Exception as error:  # whatever Ray has for it
            ray.shutdown()
            if address != "local" or attempt == STARTS:
                raise ClusterError(
                    f"{address}: Ray cannot be used there: {_last_line(error)}"
                ) from error
        else:
            return


def carry_out_on_ray(
    ray: Any, tasks: Sequence[CellTask], resources: Resources, console: Console
) -> None:
    """Carry out what is left of all cells on the cluster that `ray` is connected to.

    Raises ClusterError (lost too often, another taia, a folder that is not shared), and what
    the stages raise; what was complete by then stays.
    """
    left = [task for task in tasks if undone(task.cell, task.lock)]
    for task in tasks:
        if task not in left:
            console.print(f"[bold]{task.cell.name or 'run'}[/bold]: done before")
    _Driver(ray, left, resources, console).run()


class _Driver:
    """Which tasks run, and what follows from a finished one."""

    def __init__(
        self, ray: Any, tasks: Sequence[CellTask], resources: Resources, console: Console
    ) -> None:
        self.remote = ray.remote(_carry_out_unit)
        self.ray = ray
        self.tasks = {task.cell.name: task for task in tasks}
        self.resources = resources
        self.console = console
        self.running: dict[Any, Unit] = {}
        self.open: dict[str, int] = {}
        self.done = 0
        self.total = sum(map(self._count, tasks))

    def run(self) -> None:
        """Start what needs nothing else, then follow what finishes, until nothing is left."""
        for task in self.tasks.values():
            if not _needs(task, "train"):
                self._go_on(task)
            elif task.owner is None:
                self._start(Unit(task, "train", (), self.resources.train))
            elif not self._will_train(task.owner):
                self._go_on(task)
        while self.running:
            (ready, *_), _ = self.ray.wait(list(self.running), num_returns=1)
            self._finish(self.running.pop(ready), ready)

    def _will_train(self, owner: Cell) -> bool:
        task = self.tasks.get(owner.name)
        return task is not None and _needs(task, "train")

    def _finish(self, unit: Unit, reference: Any) -> None:
        try:
            seconds = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            raise _told(error, unit) from error
        self.done += 1
        self.console.print(
            f"[bold]{self.done}/{self.total}[/bold] {unit.label}: done in {seconds:.0f} s",
            highlight=False,
        )
        task = unit.task
        if unit.kind == "train":
            finish_stage(task.cell, task.lock, "train", {"seconds": round(seconds, 1)})
            self._go_on(task)
            for other in self.tasks.values():
                if other.owner is task.cell and _needs(other, "train"):
                    self._go_on(other)
            return
        if unit.kind in MEASURED:
            finish_stage(task.cell, task.lock, unit.kind, {"seconds": round(seconds, 1)})
        self.open[task.cell.name] -= 1
        if not self.open[task.cell.name]:
            _close(task, self.console)

    def _go_on(self, task: CellTask) -> None:
        """Start everything of a cell whose training is there, or is that of its owner."""
        if _needs(task, "train"):
            assert task.owner is not None
            forget_after(task.cell, task.lock, "train")
            share_training(task.owner, task.cell)
            finish_stage(task.cell, task.lock, "train", {"from": task.owner.name, "seconds": 0.0})
        units = self._units(task)
        self.open[task.cell.name] = len(units)
        for unit in units:
            self._start(unit)
        if not units:
            _close(task, self.console)

    def _units(self, task: CellTask) -> list[Unit]:
        need = self.resources.evaluate
        units = [Unit(task, name, (), need) for name in MEASURED if _needs(task, name)]
        if _needs(task, "evaluate"):
            units += [Unit(task, "score", part, need) for part in parts_of(task.cell)]
        return units

    def _count(self, task: CellTask) -> int:
        trains = _needs(task, "train") and task.owner is None
        return trains + len(self._units(task))

    def _start(self, unit: Unit) -> None:
        needs = {"num_cpus": unit.need.cpus, "num_gpus": unit.need.gpus, "memory": unit.need.memory}
        if unit.kind == "train" and unit.task.lock["stages"]:
            forget_after(unit.task.cell, unit.task.lock, "train")
        task = self.remote.options(**needs, max_retries=RETRIES, name=f"taia {unit.label}")
        reference = task.remote(
            str(Path.cwd()), __version__, unit.task.cell, unit.kind, *unit.arguments
        )
        self.running[reference] = unit


def _carry_out_unit(folder: str, version: str, cell: Cell, kind: str, *arguments: str) -> float:
    """One task, in a worker's process; returns its seconds."""
    start = time.monotonic()
    if version != __version__:
        raise ClusterError(
            f"the cluster has taia {__version__}, and the command is of taia {version}; install "
            "the same on all nodes"
        )
    shared = Path(folder).is_dir()
    with contextlib.chdir(folder if shared else Path.cwd()):
        if not shared or not (cell.out / LOCK).is_file():
            raise ClusterError(
                f"{Path(folder) / cell.out}: a node of the cluster does not see it; keep the run "
                "in a folder that all nodes share"
            )
        if kind == "score":
            score_part(cell, *arguments)
        else:
            quiet = Console(quiet=True)
            next(stage for stage in stages(cell) if stage.name == kind).do(cell, quiet)
    return time.monotonic() - start


def _close(task: CellTask, console: Console) -> None:
    """What is left of a cell once all its tasks are done: its summary and report."""
    cell, lock = task.cell, task.lock
    by_name: Mapping[str, Callable[[Cell, Console], None]] = {
        stage.name: stage.do for stage in stages(cell)
    }
    quiet = Console(quiet=True)
    for name in ("evaluate", "report"):
        if not _needs(task, name):
            continue
        start = time.monotonic()
        if name == "evaluate":
            gather(cell)
        by_name[name](cell, quiet)
        finish_stage(cell, lock, name, {"seconds": round(time.monotonic() - start, 1)})
    console.print(f"[bold]{cell.name or 'run'}[/bold]: complete", highlight=False)


def _needs(task: CellTask, name: str) -> bool:
    return name in [stage.name for stage in undone(task.cell, task.lock)]


def check_address(address: str) -> None:
    """Raise ClusterError where no healthy Ray cluster answers at `address`, within seconds."""
    if importlib.util.find_spec("ray") is None:
        raise DependencyError("--ray needs ray; install it with `pip install 'taia[ray]'`")
    if address == "local":
        return
    mend = "start one with `ray start --head`, or use --ray local"
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address}: addresses of Ray's client are not taken. Run the command on a machine of "
            "the cluster, with --ray auto (`ray job submit` does both)"
        )
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ClusterError(f"{address}: HOST:PORT, auto or local is needed")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(f"{address}: nothing answers there ({error}); {mend}") from error
    named = [] if address == "auto" else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *named]
    try:
        done = subprocess.run(  # noqa: S603 - our own Python
            command, capture_output=True, timeout=HEALTH_SECONDS, check=False
        )
        well = done.returncode == 0
    except subprocess.TimeoutExpired:
        well = False
    if not well:
        raise ClusterError(f"{address}: no Ray cluster answers there; {mend}")


def _check_nodes(
    nodes: Sequence[Mapping[str, Any]], resources: Resources, kinds: Sequence[str]
) -> None:
    """Raise ClusterError for needs that no node has: such a task would wait for ever."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    faults = []
    for name in kinds:
        need: Need = getattr(resources, name)
        wanted = {"CPU": need.cpus, "GPU": need.gpus, "memory": need.memory}
        if any(all(node.get(key, 0) >= value for key, value in wanted.items()) for node in there):
            continue
        most = {key: max((node.get(key, 0) for node in there), default=0) for key in wanted}
        faults.append(
            f"resources.{name}: {_amount(wanted)} are needed on one node; the most there is: "
            f"{_amount(most)}"
        )
    if faults:
        raise ClusterError("no node of the cluster can carry out every task", faults)


def _amount(wanted: Mapping[str, float]) -> str:
    return f"{wanted['CPU']:g} CPUs, {wanted['GPU']:g} GPUs and {wanted['memory'] / 1e9:.1f} GB"


def _told(error: Any, unit: Unit) -> Exception:
    """The error of a task: the stage's own, or what became of its worker."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TaiaError):
        return type(cause)(f"{unit.label}: {cause}")
    return ClusterError(
        f"{unit.label}: failed on the cluster. The same command goes on from here: "
        f"{_last_line(error)}"
    )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
