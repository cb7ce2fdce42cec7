"""Where an operation goes: to one server, to any or to all of them, as a flow.

Owns the transports. What becomes of one request is with ``_attempts``, which asks ``_endpoints`` where, ``_limits`` when
and ``_retries`` whether again. Knows nothing of tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from enginesmith_client._address import Address
from enginesmith_client._attempts import Attempts, Rules
from enginesmith_client._deadline import Deadline
from enginesmith_client._dispatched_stream import StreamFlows
from enginesmith_client._endpoints import Endpoint, Endpoints
from enginesmith_client._errors import ConnectError, DeadlineExceeded, TritonClientError
from enginesmith_client._flow import Flow, Send, Together
from enginesmith_client._limits import RateLimit
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import (
    Infer,
    LoadModel,
    ModelReady,
    Operation,
    ReadConfig,
    ReadIndex,
    ReadMetadata,
    ReadStatistics,
    ServerReady,
    UnloadModel,
)
from enginesmith_client._retries import Retry, RetryBudget
from enginesmith_client._running import Running, counted

_READS = (ReadMetadata, ReadConfig, ReadStatistics, ReadIndex)
_PINNED_SEQUENCES = 10_000


class Dispatcher:
    """The servers of one client; ``transports`` are all for threads or all for tasks, in the order of ``addresses``."""

    def __init__(
        self,
        addresses: Sequence[Address],
        transports: Sequence[Any],
        *,
        retry: Retry | None = None,
        limit: RateLimit | None = None,
    ) -> None:
        self.addresses = tuple(addresses)
        self.transports = tuple(transports)
        retry = retry or Retry()
        self._rules = Rules(
            endpoints=Endpoints([str(address) for address in addresses], self.transports),
            running=Running(self.name),
            retry=retry,
            budget=RetryBudget(retry),
            limit=limit,
        )
        self._endpoints = self._rules.endpoints
        self._lock = threading.Lock()
        self._sequences: dict[tuple[str, object], Endpoint] = {}

    @property
    def name(self) -> str:
        """The servers in words."""
        return ", ".join(str(address) for address in self.addresses)

    @property
    def running(self) -> Running:
        """The calls that are under way."""
        return self._rules.running

    def perform(
        self, operation: Operation, deadline: Deadline, *, idempotent: bool | None = None
    ) -> Flow[Any]:
        """The reply to ``operation``; ``idempotent`` is ``Retry.idempotent`` for this request alone.

        Readiness is that of any server, loading and unloading are done on all of them, and all else on one.
        """
        if isinstance(operation, (ServerReady, ModelReady)):
            return self._ready(operation, deadline)
        if isinstance(operation, (LoadModel, UnloadModel)) and len(self.transports) > 1:
            return self._everywhere(operation, deadline)
        return self._send(operation, deadline, idempotent=idempotent)

    def open(self, request: InferRequest, deadline: Deadline, *, idempotent: bool | None = None) -> Flow[Any]:
        """An open stream of answers to ``request``. Until its first answer is there, it is tried again like any request."""
        attempts = self._begin(Infer(request), deadline, idempotent=idempotent)
        stream = StreamFlows(self._rules, attempts, request, deadline)
        yield from stream.open()
        return stream.shell()

    def _everywhere(self, operation: LoadModel | UnloadModel, deadline: Deadline) -> Flow[None]:
        flows = [self._send(operation, deadline, only=one) for one in self._endpoints.all]
        yield Together(flows, at_once=len(flows))

    def _send(
        self,
        operation: Operation,
        deadline: Deadline,
        *,
        only: Endpoint | None = None,
        idempotent: bool | None = None,
    ) -> Flow[Any]:
        attempts = self._begin(operation, deadline, only=only, idempotent=idempotent)
        self.running.begin()
        try:
            while True:
                endpoint = attempts.take() or (yield from attempts.wait_and_take())
                try:
                    reply = yield Send(endpoint.transport, operation, deadline)
                except TritonClientError as error:
                    failure = error
                else:
                    attempts.answered(endpoint, reply if isinstance(reply, InferReply) else None)
                    return reply
                finally:
                    self._endpoints.release(endpoint)
                yield from attempts.failed(endpoint, failure)
        finally:
            self.running.end()

    @counted
    def _ready(self, operation: ServerReady | ModelReady, deadline: Deadline) -> Flow[bool]:
        """Whether any server says so; those that were asked in vain count only when none answers."""
        answered, failure = False, None
        for number, endpoint in enumerate(self._endpoints.all):
            left = len(self._endpoints.all) - number
            share = deadline if left == 1 else Deadline.after(deadline.remaining_s() / left)
            try:
                if (yield Send(endpoint.transport, operation, share)):
                    self._endpoints.probed(endpoint, alive=True)
                    return True
                answered = True
            except (ConnectError, DeadlineExceeded) as error:
                failure = error
        if failure is not None and not answered:
            raise self.running.closed_error() if self.running.is_cut else failure
        return False

    def _begin(
        self,
        operation: Operation,
        deadline: Deadline,
        *,
        only: Endpoint | None = None,
        idempotent: bool | None = None,
    ) -> Attempts:
        if not isinstance(operation, Infer):
            repeatable = isinstance(operation, _READS)
            return Attempts(self._rules, operation, deadline, repeatable=repeatable, only=only)
        parameters = operation.request.parameters
        number = parameters.get("sequence_id")
        if number:
            # A step of a sequence changes the state that the server keeps, so it is never repeatable.
            only = self._pinned((operation.model, number), ends=bool(parameters.get("sequence_end")))
            return Attempts(self._rules, operation, deadline, repeatable=False, only=only)
        repeatable = self._rules.retry.idempotent if idempotent is None else idempotent
        return Attempts(self._rules, operation, deadline, repeatable=repeatable, only=None)

    def _pinned(self, sequence: tuple[str, object], *, ends: bool) -> Endpoint | None:
        """The server that keeps the state of a sequence; chosen at its first request."""
        if len(self._endpoints.all) == 1:
            return None
        with self._lock:
            pinned = self._sequences.get(sequence)
            if pinned is None:
                pinned = self._endpoints.take(sequence[0])
                self._endpoints.release(pinned)
                if len(self._sequences) >= _PINNED_SEQUENCES:
                    del self._sequences[next(iter(self._sequences))]
                self._sequences[sequence] = pinned
            if ends:
                del self._sequences[sequence]
            return pinned
