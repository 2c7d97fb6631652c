"""A signal that asks the process to stop: an exception, and remembered in case that is lost.

Python runs a signal handler between any two steps of the main thread. Where that is a callback
whose errors nobody receives (a destructor, the clean-up after an import), the exception is
printed, dropped, and the work goes on. So whoever works asks here before every task, and
before an output appears.
"""

from __future__ import annotations

import signal
import time

__all__ = ["listen", "refuse_stopped"]

GRACE = 1.0
"""Seconds in which a signal that comes again is the same request: what cleans up is not stopped."""

_asked: tuple[int, float] | None = None
"""The last signal that was raised, and when."""


def listen() -> None:
    """Turn SIGTERM into SystemExit(143) and Ctrl-C into KeyboardInterrupt, once a request."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _stop)


def refuse_stopped() -> None:
    """Raise the exception of a signal that came, if one did."""
    if _asked is not None:
        raise _exception(_asked[0])


def _stop(number: int, _frame: object) -> None:
    global _asked
    now = time.monotonic()
    if _asked is not None and now - _asked[1] < GRACE:
        return
    _asked = number, now
    raise _exception(number)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
