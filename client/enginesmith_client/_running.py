"""The calls of one client that are under way: counted, waited for when it closes, and cut off when that takes too long."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from enginesmith_client._errors import Cancelled
from enginesmith_client._flow import Flow, Pause
from enginesmith_client._signal import Signal


class _Counting(Protocol):
    @property
    def running(self) -> Running: ...


_Owner = TypeVar("_Owner", bound=_Counting)
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def counted(
    method: Callable[Concatenate[_Owner, _Given], Flow[_Result]],
) -> Callable[Concatenate[_Owner, _Given], Flow[_Result]]:
    """``method`` as a flow that counts as one running call from its first step to its end, pauses among it."""

    @functools.wraps(method)
    def call(self: _Owner, /, *args: _Given.args, **kwargs: _Given.kwargs) -> Flow[_Result]:
        self.running.begin()
        try:
            return (yield from method(self, *args, **kwargs))
        finally:
            self.running.end()

    return call


class Running:
    """The calls of the client of ``name``, which is used in messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._running = 0
        self._pauses: set[Signal] = set()
        self._drained: Signal | None = None
        self._cut = False

    def begin(self) -> None:
        """Count a call as running: ``drain`` waits for its ``end``.

        Raises:
            Cancelled: the client was closed and waits no more.
        """
        with self._lock:
            if self._cut:
                raise self.closed_error()
            self._running += 1

    def end(self) -> None:
        """Count a call as over."""
        with self._lock:
            self._running -= 1
            if self._running == 0 and self._drained is not None:
                self._drained.set()

    def drain(self, drain_s: float) -> Flow[None]:
        """Ends when no call is running or ``drain_s`` are over; from then on calls are cancelled.

        The caller closes the transports next, which ends what is still on its way.
        """
        until_s = time.monotonic() + drain_s
        while (left_s := until_s - time.monotonic()) > 0:
            with self._lock:
                if self._running == 0:
                    break
                self._drained = drained = Signal()
            yield Pause(left_s, drained)
        with self._lock:
            self._cut = True
            pauses = tuple(self._pauses)
        for signal in pauses:
            signal.set()

    @property
    def is_cut(self) -> bool:
        """Whether running calls are cancelled, not waited for."""
        return self._cut

    def closed_error(self) -> Cancelled:
        """The error of a call that was running when the client was closed."""
        return Cancelled(
            f"the client of {self._name} was closed while the call was running",
            hint="close it later, or give close a drain_s that lets running calls end",
        )

    def pause(self, seconds: float, until: Signal) -> Flow[None]:
        """Wait; closing the client ends it with ``Cancelled``."""
        with self._lock:
            if self._cut:
                raise self.closed_error()
            self._pauses.add(until)
        try:
            yield Pause(seconds, until)
        finally:
            with self._lock:
                self._pauses.discard(until)
        if self._cut:
            raise self.closed_error()
