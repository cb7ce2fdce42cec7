"""A wake-up call for one thread or one task, whichever waits."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Signal:
    """Set once, by any thread; waited for by one thread or one task, which goes on when it is set or time is up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def set(self) -> None:
        """Wake who waits, or who will."""
        with self._lock:
            self._event.set()
            task = self._task
        if task is not None:
            loop, woken = task
            # A loop that is closed has nobody left to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(woken.set)

    def wait(self, seconds: float) -> None:
        """Block this thread."""
        self._event.wait(min(seconds, threading.TIMEOUT_MAX))

    async def wait_async(self, seconds: float) -> None:
        """Suspend this task."""
        import asyncio

        woken = asyncio.Event()
        with self._lock:
            if self._event.is_set():
                return
            self._task = (asyncio.get_running_loop(), woken)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(woken.wait(), min(seconds, threading.TIMEOUT_MAX))
