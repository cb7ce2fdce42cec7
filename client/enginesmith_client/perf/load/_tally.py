"""What became of the requests of a load so far: counts, the last second, failures in a row. Pure.

Times are nanoseconds since the run's origin.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from enginesmith_client.perf._records import OutcomeKind
from enginesmith_client.perf.load._wire import Answer

_NS = 1_000_000_000
_LOST_KINDS: frozenset[OutcomeKind] = frozenset({"connect", "not_ready", "invalid", "server"})
"""Failures of which one after the other means that no load arrives. An overloaded server is something to measure."""
LOST_REQUESTS = 20
LOST_NS = 2 * _NS
_MS = 1e6


@dataclass(frozen=True)
class Recent:
    """About the last second."""

    requests_per_s: float
    tokens_per_s: float | None
    p50_ms: float | None
    p99_ms: float | None


class Tally:
    """Counts answers as they come."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self._recent: deque[tuple[int, int, int | None]] = deque()
        """When each came, its latency, its tokens."""
        self._failing_since_ns: int | None = None
        self._failures = 0
        self._last_failure: Answer | None = None

    def add(self, answer: Answer, *, ended_ns: int, latency_ns: int) -> None:
        """One more."""
        if answer.outcome == "ok":
            self.answered += 1
            self._recent.append((ended_ns, latency_ns, answer.output_tokens))
        else:
            self.failed += 1
        if answer.outcome not in _LOST_KINDS:
            self._failing_since_ns, self._failures = None, 0
            return
        if self._failing_since_ns is None:
            self._failing_since_ns = ended_ns
        self._failures += 1
        self._last_failure = answer

    def lost(self, now_ns: int) -> str | None:
        """Why the load should end, in words: nothing but failures has come for a while."""
        since_ns, last = self._failing_since_ns, self._last_failure
        if since_ns is None or last is None or self._failures < LOST_REQUESTS:
            return None
        if now_ns - since_ns < LOST_NS:
            return None
        return (
            f"server lost: the last {self._failures} requests failed, over {(now_ns - since_ns) / _NS:.1f} s; "
            f"the last one ({last.outcome}): {last.error}"
        )

    def recent(self, now_ns: int) -> Recent:
        """The second before ``now_ns``, or less at the beginning."""
        while self._recent and self._recent[0][0] < now_ns - _NS:
            self._recent.popleft()
        seconds = max(1, min(now_ns, _NS)) / _NS
        rate = len(self._recent) / seconds
        if not self._recent:
            return Recent(rate, None, None, None)
        tokens = [count for _, _, count in self._recent if count is not None]
        p50_ns, p99_ns = np.percentile([latency_ns for _, latency_ns, _ in self._recent], (50, 99))
        return Recent(
            rate, sum(tokens) / seconds if tokens else None, float(p50_ns) / _MS, float(p99_ns) / _MS
        )
