"""Being on time in an event loop: a timer finer than the loop's own.

asyncio rounds the time-outs of epoll up to whole milliseconds (``selectors.EpollSelector.select``), which would make every
request up to a millisecond late. A timerfd is a file that becomes readable on time, so it wakes the same loop exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from typing import Any

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_NS = 1_000_000_000


class _Time(ctypes.Structure):
    """``struct timespec``."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    """``struct itimerspec``, see timerfd_create(2)."""

    _fields_ = (("interval", _Time), ("value", _Time))


class Timer:
    """Wakes one task of the running event loop; where there is no timerfd, as late as the loop's own timers do."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] | None = None
        self._spec = _TimerSpec()
        self._libc: Any = ctypes.PyDLL(None) if sys.platform == "linux" else None
        self._descriptor = (
            self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC) if self._libc else -1
        )
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._expired)

    async def until(self, at_ns: int) -> None:
        """Return when ``time.monotonic_ns()`` is ``at_ns``; at once if it is past."""
        if self._descriptor < 0:
            while (left_ns := at_ns - time.monotonic_ns()) > 0:
                await asyncio.sleep(left_ns / _NS)
            return
        # Zero would disarm the timer; a time that is past makes it expire at once.
        self._spec.value.seconds, self._spec.value.nanoseconds = divmod(max(1, at_ns), _NS)
        self._libc.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)
        self._woken = self._loop.create_future()
        await self._woken

    def close(self) -> None:
        """Give the file back."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)
