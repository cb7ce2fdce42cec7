"""One request while it is tried: the rate limit before it, the server for it, and whether it is sent again, as flows."""

from __future__ import annotations

from dataclasses import dataclass

from enginesmith_client._deadline import Deadline
from enginesmith_client._endpoints import Endpoint, Endpoints
from enginesmith_client._errors import ConnectError, ModelNotReady, TritonClientError
from enginesmith_client._flow import Flow, Send
from enginesmith_client._limits import RateLimit, Ticket, tokens_of_reply, tokens_of_request
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Infer, ModelReady, Operation, ServerReady
from enginesmith_client._retries import Retry, RetryBudget, is_safe, pause_s
from enginesmith_client._running import Running
from enginesmith_client._signal import Signal

_PROBE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Rules:
    """What all requests of a client share."""

    endpoints: Endpoints
    running: Running
    retry: Retry
    budget: RetryBudget
    limit: RateLimit | None


class Attempts:
    """What is known of one request while it is tried: where it was, how often, and what it may still cost."""

    def __init__(
        self,
        rules: Rules,
        operation: Operation,
        deadline: Deadline,
        *,
        repeatable: bool,
        only: Endpoint | None,
    ) -> None:
        self._rules = rules
        self._operation = operation
        self._model: str = getattr(operation, "model", "")
        self._deadline = deadline
        self._repeatable = repeatable
        self._only = only
        self._tried: list[Endpoint] = []
        self._counted = 0
        self._ticket: Ticket | None = None

    def take(self) -> Endpoint | None:
        """As ``wait_and_take`` if that needs no step: the way of nearly all requests. Else None."""
        rules = self._rules
        if rules.limit is not None or self._only is not None:
            return None
        if rules.endpoints.is_any_down:
            return None
        if not self._tried:
            rules.budget.earn()
        return rules.endpoints.take(self._model, tried=self._tried)

    def wait_and_take(self) -> Flow[Endpoint]:
        """The server for the next attempt, counted as in flight there; the caller releases it."""
        rules = self._rules
        if not self._tried:
            rules.budget.earn()
        if rules.limit is not None and isinstance(self._operation, Infer):
            yield from self._enter(rules.limit, self._operation.request)
        if self._only is not None:
            rules.endpoints.hold(self._only)
            return self._only
        due = rules.endpoints.due()
        if due is not None:
            yield from self._probe(due)
        return rules.endpoints.take(self._model, tried=self._tried)

    def answered(self, endpoint: Endpoint, reply: InferReply | None) -> None:
        """The server answered, with ``reply`` if that was an inference."""
        self._rules.endpoints.answered(endpoint, self._model)
        if reply is not None:
            self.settle(reply)

    def settle(self, reply: InferReply) -> None:
        """Tell the rate limit what the answer says that the request cost."""
        limit = self._rules.limit
        if limit is not None and self._ticket is not None:
            tokens = tokens_of_reply(reply)
            if tokens is not None:
                limit.settle(self._ticket, tokens)

    def failed(self, endpoint: Endpoint, error: TritonClientError) -> Flow[None]:
        """Ends when the request may be sent again; raises ``error`` when it may not."""
        rules = self._rules
        self.note(endpoint, error)
        self._tried.append(endpoint)
        error.attempts = len(self._tried)
        if rules.running.is_cut:
            raise rules.running.closed_error() from error
        moves_on = self._only is None and rules.endpoints.has_other(self._model, tried=self._tried)
        if moves_on and _never_ran(error):
            return
        served = rules.endpoints.has_served(self._model)
        self._counted += 1
        if (
            not isinstance(error, rules.retry.errors)
            or not is_safe(error, repeatable=self._repeatable, served=served)
            or self._counted >= rules.retry.attempts
        ):
            raise error
        seconds = 0.0 if moves_on else pause_s(rules.retry, error, retries=self._counted - 1)
        if seconds >= self._deadline.remaining_s() or self._deadline.expired or not rules.budget.spend():
            raise error
        if seconds > 0:
            yield from rules.running.pause(seconds, Signal())

    def note(self, endpoint: Endpoint, error: TritonClientError) -> None:
        """Tell the servers' record and the rate limit of a failure."""
        self._rules.endpoints.failed(endpoint, self._model, error)
        limit = self._rules.limit
        if limit is not None and self._ticket is not None and is_safe(error, repeatable=False, served=True):
            limit.settle(self._ticket, 0.0)

    def _enter(self, limit: RateLimit, request: InferRequest) -> Flow[None]:
        """Wait for the turn of this attempt."""
        tokens = tokens_of_request(request, default_max_tokens=limit.default_max_tokens)
        ticket = limit.enter(tokens, self._deadline.remaining_s())
        self._ticket = ticket
        try:
            while (wait_s := limit.poll(ticket)) > 0:
                if self._deadline.expired:
                    raise limit.refusal(wait_s, self._deadline.timeout_s)
                yield from self._rules.running.pause(min(wait_s, self._deadline.remaining_s()), ticket.signal)
        finally:
            limit.leave(ticket)

    def _probe(self, endpoint: Endpoint) -> Flow[None]:
        """Find out whether a server that was down is back."""
        question = ModelReady(self._model) if self._model else ServerReady()
        alive: bool | None = None
        try:
            share = Deadline.after(min(_PROBE_TIMEOUT_S, self._deadline.remaining_s() / 4))
            yield Send(endpoint.transport, question, share)
            # Any answer will do: what is not ready there is found out model by model.
            alive = True
        except TritonClientError:
            alive = False
        finally:
            self._rules.endpoints.probed(endpoint, alive=alive)


def _never_ran(error: TritonClientError) -> bool:
    """Whether the server neither ran the request nor was busy with it, so that asking another adds no load."""
    return isinstance(error, ModelNotReady) or (isinstance(error, ConnectError) and error.unsent)
