"""The servers of a client and what is known of each: which is least busy, which is down, which lacks a model.

Knows nothing of messages: it is told what became of a request and says where the next one goes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from enginesmith_client._errors import ConnectError, DeadlineExceeded, ModelNotReady, TritonClientError

EJECTION_S = 0.25
"""How long a server is left alone after its first connection error; doubles with each in a row."""
MAX_EJECTION_S = 30.0
AVOIDANCE_S = 0.5
"""The same for one model that is not ready on it."""
MAX_AVOIDANCE_S = 10.0
TIMEOUTS = 3
"""Deadlines missed in a row after which a server has to show that it is alive."""


@dataclass
class _Absence:
    """How often something was not there in a row, and until when it is not asked."""

    times: int = 0
    until_s: float = 0.0

    def again(self, now_s: float, *, first_s: float, longest_s: float) -> None:
        # An outage meets all requests that are under way at once; that is one absence and not many.
        if now_s >= self.until_s:
            self.until_s = now_s + min(longest_s, first_s * 2.0 ** min(self.times, 30))
            self.times += 1


@dataclass(eq=False)
class Endpoint:
    """One server. Changed by ``Endpoints`` only."""

    name: str
    transport: Any
    in_flight: int = 0
    timeouts: int = 0
    ejected: _Absence | None = None
    probed: bool = False
    """A call is just finding out whether it is back."""
    missing: dict[str, _Absence] = field(default_factory=dict)
    """By model."""


class Endpoints:
    """The servers of one client; for any number of threads."""

    def __init__(
        self, names: Sequence[str], transports: Sequence[Any], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.all = tuple(Endpoint(name, transport) for name, transport in zip(names, transports, strict=True))
        self._clock = clock
        self._lock = threading.Lock()
        self._turn = 0
        self._served: set[str] = set()

    def take(self, model: str, *, tried: Collection[Endpoint] = ()) -> Endpoint:
        """The server for a request, counted as in flight there until ``release``.

        The least busy one, in turn where several are; those that are down or lack the model only when no other is left.
        """
        with self._lock:
            if len(self.all) == 1:
                chosen = self.all[0]
            else:
                now_s = self._clock()
                self._turn += 1
                chosen = min(
                    enumerate(self.all),
                    key=lambda one: (
                        one[1].ejected is not None,
                        _is_missing(one[1], model, now_s),
                        one[1] in tried,
                        one[1].in_flight,
                        (one[0] - self._turn) % len(self.all),
                    ),
                )[1]
            chosen.in_flight += 1
            return chosen

    def hold(self, endpoint: Endpoint) -> None:
        """Count a request as in flight on a server that is not chosen by ``take``."""
        with self._lock:
            endpoint.in_flight += 1

    def release(self, endpoint: Endpoint) -> None:
        """The request is over."""
        with self._lock:
            endpoint.in_flight -= 1

    def has_other(self, model: str, *, tried: Collection[Endpoint]) -> bool:
        """Whether there is a server that was not tried and that nothing speaks against."""
        with self._lock:
            now_s = self._clock()
            return any(
                one not in tried and one.ejected is None and not _is_missing(one, model, now_s)
                for one in self.all
            )

    @property
    def is_any_down(self) -> bool:
        """Whether one of several servers is left alone, so that ``due`` is worth asking."""
        return len(self.all) > 1 and any(one.ejected is not None for one in self.all)

    def due(self) -> Endpoint | None:
        """A server that is down and should be asked now whether it is back; the caller must say with ``probed``."""
        if len(self.all) == 1:
            return None
        with self._lock:
            now_s = self._clock()
            for one in self.all:
                if one.ejected is not None and not one.probed and now_s >= one.ejected.until_s:
                    one.probed = True
                    return one
            return None

    def probed(self, endpoint: Endpoint, *, alive: bool | None) -> None:
        """What a probe found: ``alive`` is None where it was given up."""
        with self._lock:
            endpoint.probed = False
            if alive:
                endpoint.ejected, endpoint.timeouts = None, 0
            elif alive is False:
                self._eject(endpoint)

    def answered(self, endpoint: Endpoint, model: str) -> None:
        """A request was answered."""
        if endpoint.timeouts or endpoint.ejected is not None or endpoint.missing or model not in self._served:
            with self._lock:
                endpoint.timeouts = 0
                endpoint.ejected = None
                endpoint.missing.pop(model, None)
                self._served.add(model)

    def failed(self, endpoint: Endpoint, model: str, error: TritonClientError) -> None:
        """A request failed."""
        with self._lock:
            if isinstance(error, ModelNotReady):
                absence = endpoint.missing.setdefault(model, _Absence())
                absence.again(self._clock(), first_s=AVOIDANCE_S, longest_s=MAX_AVOIDANCE_S)
            elif isinstance(error, ConnectError):
                self._eject(endpoint)
            elif isinstance(error, DeadlineExceeded):
                endpoint.timeouts += 1
                if endpoint.timeouts >= TIMEOUTS and endpoint.ejected is None:
                    # It may just be slow: the next call asks it, and does not wait to.
                    endpoint.ejected = _Absence()

    def has_served(self, model: str) -> bool:
        """Whether any of the servers ever answered for the model."""
        return model in self._served

    def _eject(self, endpoint: Endpoint) -> None:
        endpoint.ejected = endpoint.ejected or _Absence()
        endpoint.ejected.again(self._clock(), first_s=EJECTION_S, longest_s=MAX_EJECTION_S)


def _is_missing(endpoint: Endpoint, model: str, now_s: float) -> bool:
    absence = endpoint.missing.get(model)
    return absence is not None and now_s < absence.until_s
