"""The process while a load goes on: an interpreter that does nothing else, and Ctrl-C that ends the load in good order.

Both belong to the process and not to a load. Several loads may go on at once; the last one that ends puts all back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SWITCH_INTERVAL_S = 0.0002
"""For how long another thread, one that draws a progress bar, say, may keep the interpreter from the loop. Default: 5 ms."""


@dataclass
class _Before:
    """How things were before the first of the loads that go on."""

    loads: int = 0
    collected: bool = True
    interval_s: float = 0.0
    acts: list[Callable[[], None]] = field(default_factory=list)
    on_sigint: Any = None


_before = _Before()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection, and no other thread of Python for long, while the block runs.

    Requests leave no cycles behind, so that memory does not grow without the collector.
    """
    if _before.loads == 0:
        _before.collected, _before.interval_s = gc.isenabled(), sys.getswitchinterval()
        gc.collect()
        gc.freeze()
        gc.disable()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
    _before.loads += 1
    try:
        yield
    finally:
        _before.loads -= 1
        if _before.loads == 0:
            sys.setswitchinterval(_before.interval_s)
            gc.unfreeze()
            if _before.collected:
                gc.enable()


@contextlib.contextmanager
def ahead_of_others(*, wanted: bool) -> Iterator[bool]:
    """Real-time priority for this thread while the block runs; gives whether the system granted it.

    A generator on the server's machine otherwise waits for its turn, some milliseconds now and then, just when the
    server is busy, and so is late. What it takes from the server is the same either way: its own work. Linux grants it
    to root and with CAP_SYS_NICE, and ends real-time threads that never sleep after 95% of a second.
    """
    granted = False
    if wanted and hasattr(os, "SCHED_RR"):
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        with contextlib.suppress(OSError):
            # Processes that it starts have the usual one.
            policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
            granted = True
    try:
        yield granted
    finally:
        if granted:
            os.sched_setscheduler(0, *before)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``act`` instead of raising KeyboardInterrupt, where that can be had: on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    if not _before.acts:
        _before.on_sigint = signal.getsignal(signal.SIGINT)
        # Event loops of Windows have no such handlers; there Ctrl-C ends the program.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signal.SIGINT, _interrupt)
    _before.acts.append(act)
    try:
        yield
    finally:
        _before.acts.remove(act)
        with contextlib.suppress(NotImplementedError):
            if not _before.acts and loop.remove_signal_handler(signal.SIGINT):
                # None: a handler that was not set from Python, which cannot be set again.
                signal.signal(signal.SIGINT, _before.on_sigint or signal.SIG_DFL)


def _interrupt() -> None:
    for act in tuple(_before.acts):
        act()
