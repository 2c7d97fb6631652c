"""Tasks on several threads: all of them, each once, and the first error stops the rest."""

from __future__ import annotations

import threading
import time

import pytest

from taia.workers import cores, on_all_cores


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_task_is_done_once(threads):
    done, first, after = [], [], []
    on_all_cores(
        range(100), done.append, threads=threads,
        first=lambda: first.append(1), after=lambda: after.append(len(done)),
    )  # fmt: skip
    assert sorted(done) == list(range(100))
    assert first == [1]
    assert after[-1] == 100


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_stops_all_and_is_raised(threads):
    done, before = [], threading.active_count()

    def work(task: int) -> None:
        if task == 5:
            raise ValueError("five")
        time.sleep(0.001)
        done.append(task)

    with pytest.raises(ValueError, match="five"):
        on_all_cores(range(10_000), work, threads=threads)
    assert len(done) < 100
    assert threading.active_count() <= before


@pytest.mark.parametrize("place", ["first", "after"])
def test_an_error_of_the_calling_thread_stops_the_others(place):
    def stop() -> None:
        raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt):
        on_all_cores(range(10_000), lambda t: (time.sleep(0.001), done.append(t)), threads=3,
                     **{place: stop})  # fmt: skip
    assert len(done) < 100


def test_there_is_at_least_one_core():
    assert cores() >= 1
