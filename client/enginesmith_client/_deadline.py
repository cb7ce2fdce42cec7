"""A point in time by which a call must be over, however many messages it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from enginesmith_client._errors import InvalidInput

_LONGEST_S = 1e8
"""Three years: sockets, gRPC and Triton's clock in nanoseconds each overflow somewhere above."""


@dataclass(frozen=True)
class Deadline:
    """Counts down from ``timeout_s``, on the monotonic clock."""

    timeout_s: float
    expires_at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """A deadline ``timeout_s`` from now; a timeout must be positive and finite, so that no call can hang."""
        if (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, (int, float))
            or not 0 < timeout_s <= _LONGEST_S
        ):
            raise InvalidInput(
                f"timeout_s must be a positive, finite number of seconds, at most {_LONGEST_S:g}; seen: {timeout_s!r}"
            )
        return cls(float(timeout_s), time.monotonic() + timeout_s)

    def remaining_s(self) -> float:
        """Seconds left; a millisecond at least, because sockets take zero for "do not wait at all"."""
        return max(self.expires_at_s - time.monotonic(), 0.001)

    @property
    def expired(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.expires_at_s
