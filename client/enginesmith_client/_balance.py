"""Several connections to one server, of which the least busy one is used. Pure."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

Member = TypeVar("Member")


class LeastBusy(Generic[Member]):
    """``members``, each with the number of calls that it carries. Safe to use from several threads."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self._busy = [0] * len(self.members)
        self._lock = threading.Lock()

    def take(self) -> int:
        """The number of the member that carries the fewest calls, now one more."""
        if len(self.members) == 1:
            return 0
        with self._lock:
            number = self._busy.index(min(self._busy))
            self._busy[number] += 1
        return number

    def give_back(self, number: int) -> None:
        """One call less on a member."""
        if len(self.members) > 1:
            with self._lock:
                self._busy[number] -= 1
