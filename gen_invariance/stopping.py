"""SIGTERM and Ctrl-C: outside of a loop they end the command at once, inside of one after the step in hand is saved.

    with signals_noted() as stop_asked:
        for step in range(start, steps):
            ...
            if stop_asked():
                save(step + 1)
                break

When the block ends, a signal that was noted in it does what it would have done before the block. Only the handlers of
Python itself and of the command line are held back this way; somebody else's (of a launcher, say) are left alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: raised where Ctrl-C would raise `KeyboardInterrupt`."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # nobody else may set handlers


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, so that files are closed and temporary ones removed."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_noted(*, active: bool = True) -> Iterator[Callable[[], bool]]:
    """Within the block a first SIGINT or SIGTERM is noted instead of obeyed; a second one is obeyed at once.

    Args:
        active: off leaves the handlers alone. Several processes would stop at different steps, each waiting for the
            others, so loops on several processes switch it off.

    Yields:
        A function that says whether one came.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        noted.append(number)

    if active and _in_main_thread():
        for number in _STOPPING:
            handler = signal.getsignal(number)
            if handler in (signal.default_int_handler, signal.SIG_DFL, _terminate):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield lambda: bool(noted)
    finally:
        restore()
    if noted:
        signal.raise_signal(noted[0])
        raise KeyboardInterrupt
