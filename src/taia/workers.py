"""One task after another on several threads, the calling one among them.

Threads are enough: copying happens in the kernel and arithmetic in numpy, both of which
let the interpreter go. The calling thread works too, so that Ctrl-C is met at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import islice
from threading import Lock, Thread
from typing import TypeVar

from taia.stopping import refuse_stopped

__all__ = ["MOST", "cores", "nothing", "on_all_cores", "results"]

Task = TypeVar("Task")
Result = TypeVar("Result")

MOST = 16
"""Threads at most; a disk is busy long before."""


def nothing() -> None:
    """Do nothing."""


def on_all_cores(
    tasks: Iterable[Task],
    work: Callable[[Task], None],
    *,
    first: Callable[[], object] = nothing,
    after: Callable[[], object] = nothing,
    threads: int | None = None,
) -> None:
    """Call `work` with every task, in their order as far as several at a time have one.

    The calling thread calls `first` while the others already work, and `after` whenever it
    has finished a task, and at the end. The first error, or a signal, stops all threads
    after their current task, and is raised.
    """
    todo, lock = iter(tasks), Lock()
    failures: list[BaseException] = []

    def take() -> list[Task]:
        with lock:
            return list(islice(todo, 1))

    def labour(then: Callable[[], object] = nothing) -> None:
        try:
            while not failures and (taken := take()):
                refuse_stopped()
                work(taken[0])
                then()
        except BaseException as error:  # raised in the calling thread
            failures.append(error)

    helpers = [Thread(target=labour, daemon=True) for _ in range((threads or cores()) - 1)]
    try:
        for helper in helpers:
            helper.start()
        first()
        labour(after)
        _join(helpers)
        if not failures:
            after()
    except BaseException as error:
        failures.append(error)
    _join(helpers)
    if failures:
        raise failures[0]


def results(tasks: Iterable[Task], work: Callable[[Task], Result]) -> list[Result]:
    """What `work` gives for every task, in the order of the tasks."""
    found: dict[int, Result] = {}

    def keep(numbered: tuple[int, Task]) -> None:
        number, task = numbered
        found[number] = work(task)

    on_all_cores(enumerate(tasks), keep)
    return [found[number] for number in range(len(found))]


def cores() -> int:
    """Threads that this process may run at a time, MOST at most."""
    if hasattr(os, "sched_getaffinity"):
        return min(MOST, len(os.sched_getaffinity(0)))
    return min(MOST, os.cpu_count() or 1)


def _join(helpers: list[Thread]) -> None:
    for helper in helpers:
        if helper.ident is not None:
            helper.join()
