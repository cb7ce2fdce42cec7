"""When a request may be sent again, how often, and after how long. Pure but for the lock around the budget.

The rules: what only reads may always be sent again; an inference only if it is certain that no server ran it, or if
the caller has said that running it twice is harmless.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from enginesmith_client._errors import (
    ConnectError,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
    TritonClientError,
)

_RETRYABLE = (ConnectError, Overloaded, ModelNotReady, ServerError)


@dataclass(frozen=True)
class Retry:
    """How a client tries again what failed. ``Retry(attempts=1)`` never does."""

    attempts: int = 3
    """How often a request is sent at most, the first time included. Going on to another server after one that surely
    did not run the request (not reached, model not ready) does not count."""
    backoff_s: float = 0.05
    """The longest pause before the first retry; it doubles with each."""
    max_backoff_s: float = 2.0
    jitter: float = 1.0
    """The share of a pause that is chosen by chance: 1 between nothing and all of it, 0 always all of it."""
    budget_share: float = 0.1
    """Retries that the client may make for each request, on average, so that retries cannot keep a server overloaded."""
    budget_burst: float = 10.0
    """Retries that it may make at once before the share counts."""
    idempotent: bool = False
    """Whether running a request twice is harmless. Then also one is sent again whose connection broke on the way."""
    errors: tuple[type[TritonClientError], ...] = (ConnectError, Overloaded, ModelNotReady)
    """What is tried again; ``ServerError`` may be added, and counts only for what is idempotent."""

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or self.attempts < 1:
            raise InvalidInput(f"Retry.attempts must be an integer of at least 1; seen: {self.attempts!r}")
        for name in ("backoff_s", "max_backoff_s", "budget_share", "budget_burst"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidInput(
                    f"Retry.{name} must be 0 or more and finite; seen: {getattr(self, name)!r}"
                )
        if not 0 <= self.jitter <= 1:
            raise InvalidInput(f"Retry.jitter must be between 0 and 1; seen: {self.jitter!r}")
        strange = [kind for kind in self.errors if kind not in _RETRYABLE]
        if strange:
            raise InvalidInput(
                f"Retry.errors holds {', '.join(str(kind) for kind in strange)}",
                hint=f"allowed: {', '.join(kind.__name__ for kind in _RETRYABLE)}",
            )


def is_safe(error: TritonClientError, *, repeatable: bool, served: bool) -> bool:
    """Whether what failed with ``error`` may be sent again.

    Args:
        repeatable: it only reads, or running it twice is harmless.
        served: the model has answered this client before, so that it is coming back or changing its version; one that
            never did is rather misspelt.
    """
    if isinstance(error, ConnectError):
        return error.unsent or repeatable
    if isinstance(error, ModelNotReady):
        return served
    return isinstance(error, Overloaded) or (isinstance(error, ServerError) and repeatable)


def pause_s(
    retry: Retry,
    error: TritonClientError,
    *,
    retries: int,
    draw: Callable[[], float] = random.random,
) -> float:
    """How long to wait before retry number ``retries`` (from 0); infinite where the server wants none.

    At least as long as the server says (``Overloaded.retry_after_s``). "Full jitter" of
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """
    # Beyond 2**60 a float of seconds has long met max_backoff_s, or never will because backoff_s is 0.
    longest_s = min(retry.max_backoff_s, retry.backoff_s * 2.0 ** min(retries, 60))
    own_s = longest_s * (1.0 - retry.jitter * draw())
    asked_s = error.retry_after_s if isinstance(error, Overloaded) else None
    return own_s if asked_s is None else max(own_s, asked_s)


class RetryBudget:
    """The retries that a client has left: every request adds a share, every retry takes one."""

    def __init__(self, retry: Retry) -> None:
        self._share = retry.budget_share
        self._burst = retry.budget_burst
        self._left = retry.budget_burst
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Count a request that is sent for the first time."""
        with self._lock:
            self._left = min(self._burst, self._left + self._share)

    def spend(self) -> bool:
        """Take one retry, if there is one."""
        with self._lock:
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True
