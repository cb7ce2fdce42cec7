"""Limits that callers set themselves: so many requests and so many tokens in a second, first come, first served.

Owns the token buckets and the queue before them. Does not wait: it says how long to, and ``_dispatch`` pauses.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from enginesmith_client._errors import InvalidInput, Overloaded
from enginesmith_client._messages import InferReply, InferRequest, WireTensor
from enginesmith_client._signal import Signal

_BYTES_PER_TOKEN = 4
"""Of English text, as tokenizers with vocabularies of 32k to 128k cut it; what is wrong with it is settled afterwards."""
_TEXT_INPUTS = frozenset(("text_input", "messages", "TEXT", "TEXT_PAIR"))
_PROMPT_INPUTS = frozenset(("text_input", "messages"))
_TOKEN_INPUTS = frozenset(("input_ids",))
_MAX_TOKENS_INPUTS = frozenset(("max_tokens", "sampling_param_max_tokens", "request_output_len"))
_COUNT_OUTPUTS = frozenset(("num_input_tokens", "num_output_tokens"))
_INTEGERS = {"INT32": "<i4", "INT64": "<i8", "UINT32": "<u4", "UINT64": "<u8"}
_ROUNDING = 1e-9


class RateLimit:
    """At most ``requests_per_s`` requests and ``tokens_per_s`` tokens, for every client that it is given to.

    A request that has to wait does, in the order of arrival; one that would wait longer than its deadline allows fails
    at once with ``Overloaded``, whose ``retry_after_s`` says when there will be room. Tokens are estimated before
    (a quarter of the bytes of the prompt, and ``max_tokens``) and settled by the counts of the answer. May be shared by
    threads, tasks, event loops and clients of one process. The clock may jump: backwards nothing is lost or won,
    forwards at most the burst is won.

    Args:
        requests_per_s: None: any number.
        tokens_per_s: None: any number.
        burst_requests: how many may go at once after a pause. Default: those of one second, at least 1.
        burst_tokens: the same for tokens. A request of more tokens waits for a full bucket and leaves a debt.
        default_max_tokens: what is assumed of the answer to a prompt that is sent without ``max_tokens``.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        requests_per_s: float | None = None,
        tokens_per_s: float | None = None,
        *,
        burst_requests: float | None = None,
        burst_tokens: float | None = None,
        default_max_tokens: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if requests_per_s is None and tokens_per_s is None:
            raise InvalidInput("a RateLimit limits nothing", hint="give requests_per_s, tokens_per_s or both")
        self.default_max_tokens = default_max_tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._requests = _bucket("requests", requests_per_s, burst_requests, now_s=clock())
        self._tokens = _bucket("tokens", tokens_per_s, burst_tokens, now_s=clock())
        self._waiting_tokens = 0.0

    def enter(self, tokens: float, remaining_s: float) -> Ticket:
        """A place for a request of about ``tokens``: admitted, or at the end of the queue.

        Raises:
            Overloaded: its turn would not come within ``remaining_s``.
        """
        ticket = Ticket(tokens)
        with self._lock:
            self._refill()
            wait_s = self._wait_s(
                ticket, requests_ahead=len(self._waiting), tokens_ahead=self._waiting_tokens
            )
            if not self._waiting and wait_s == 0:
                self._admit(ticket)
            elif wait_s > remaining_s:
                raise self.refusal(wait_s, remaining_s)
            else:
                self._waiting.append(ticket)
                self._waiting_tokens += tokens
        return ticket

    def poll(self, ticket: Ticket) -> float:
        """Seconds to wait before the next ``poll``, or until ``ticket.signal``; 0: admitted."""
        with self._lock:
            if ticket.admitted:
                return 0.0
            ticket.signal = Signal()
            if self._waiting[0] is not ticket:
                return math.inf
            self._refill()
            wait_s = self._wait_s(ticket, requests_ahead=0, tokens_ahead=0.0)
            if wait_s == 0:
                self._dequeue(ticket)
                self._admit(ticket)
            return wait_s

    def leave(self, ticket: Ticket) -> None:
        """Give up a place in the queue. Nothing happens to a ticket that is admitted."""
        with self._lock:
            if not ticket.admitted and ticket in self._waiting:
                self._dequeue(ticket)

    def settle(self, ticket: Ticket, tokens: float) -> None:
        """Put ``tokens``, what an admitted request really cost, in the place of the estimate."""
        with self._lock:
            if ticket.admitted and self._tokens is not None:
                self._refill()
                self._tokens.take(tokens - ticket.tokens)
                ticket.tokens = tokens
                self._wake_first()

    def refusal(self, wait_s: float, remaining_s: float) -> Overloaded:
        """The error of a request that would have to wait too long."""
        return Overloaded(
            f"the rate limit of this client has no room within {remaining_s:.3g} s: the request would wait {wait_s:.3g} s",
            hint="send less at once, allow more time, or raise the RateLimit",
            retry_after_s=wait_s,
        )

    def _refill(self) -> None:
        now_s = self._clock()
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.refill(now_s)

    def _wait_s(self, ticket: Ticket, *, requests_ahead: float, tokens_ahead: float) -> float:
        requests_s = self._requests.wait_s(1.0, ahead=requests_ahead) if self._requests else 0.0
        tokens_s = self._tokens.wait_s(ticket.tokens, ahead=tokens_ahead) if self._tokens else 0.0
        return max(requests_s, tokens_s)

    def _admit(self, ticket: Ticket) -> None:
        ticket.admitted = True
        if self._requests is not None:
            self._requests.take(1.0)
        if self._tokens is not None:
            self._tokens.take(ticket.tokens)

    def _dequeue(self, ticket: Ticket) -> None:
        first = self._waiting[0] is ticket
        self._waiting.remove(ticket)
        self._waiting_tokens = self._waiting_tokens - ticket.tokens if self._waiting else 0.0
        if first:
            self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].signal.set()


@dataclass(eq=False)
class Ticket:
    """One request before or in a ``RateLimit``."""

    tokens: float
    admitted: bool = False
    signal: Signal = field(default_factory=Signal)


@dataclass
class _Bucket:
    rate_per_s: float
    burst: float
    level: float
    filled_at_s: float

    def refill(self, now_s: float) -> None:
        self.level = min(self.burst, self.level + max(0.0, now_s - self.filled_at_s) * self.rate_per_s)
        self.filled_at_s = now_s

    def wait_s(self, amount: float, *, ahead: float) -> float:
        """Until ``ahead`` and then ``amount`` can be taken. More than the burst is taken from a full bucket."""
        missing = ahead + min(amount, self.burst) - self.level
        return missing / self.rate_per_s if missing > _ROUNDING else 0.0

    def take(self, amount: float) -> None:
        self.level = min(self.burst, self.level - amount)


def tokens_of_request(request: InferRequest, *, default_max_tokens: int) -> float:
    """About how many tokens a request will read and write; 0 for a model that has nothing to do with tokens."""
    tokens, prompts, answers = 0.0, 0, None
    for tensor in request.inputs:
        elements = math.prod(tensor.shape)
        if tensor.name in _TEXT_INPUTS:
            # Each element has its length in four bytes before it.
            tokens += max(1, (len(tensor.data) - 4 * elements) / _BYTES_PER_TOKEN)
            prompts += elements if tensor.name in _PROMPT_INPUTS else 0
        elif tensor.name in _TOKEN_INPUTS:
            tokens += elements
        elif tensor.name in _MAX_TOKENS_INPUTS:
            answers = _total(tensor)
    return tokens + (prompts * default_max_tokens if answers is None else max(0, answers))


def tokens_of_reply(reply: InferReply) -> float | None:
    """How many tokens the server says that it read and wrote; None where it does not say."""
    counts = [_total(tensor) for tensor in reply.outputs if tensor.name in _COUNT_OUTPUTS]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(_COUNT_OUTPUTS) else None


def _total(tensor: WireTensor) -> int | None:
    code = _INTEGERS.get(tensor.datatype)
    return None if code is None else int(np.frombuffer(tensor.data, code).sum())


def _bucket(what: str, rate_per_s: float | None, burst: float | None, *, now_s: float) -> _Bucket | None:
    if rate_per_s is None:
        if burst is not None:
            raise InvalidInput(f"burst_{what} is {burst!r}, but {what}_per_s is not given")
        return None
    size = max(1.0, rate_per_s) if burst is None else burst
    for name, value in ((f"{what}_per_s", rate_per_s), (f"burst_{what}", size)):
        if not 0 < value < math.inf:
            raise InvalidInput(f"{name} must be a positive, finite number; seen: {value!r}")
    if size < 1:
        raise InvalidInput(f"burst_{what} must be at least 1; seen: {size!r}")
    return _Bucket(rate_per_s, size, size, now_s)
