"""Every error a caller can meet, sorted by what the caller can do about it.

A message says what happened and what was seen; ``hint`` says what to do. The exception of the transport
(gRPC, socket, JSON) is chained as ``__cause__``. ``error_from_status`` is the one place where an answer of
a server becomes an error; both transports use it, so the same failure has the same class on both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


class TritonClientError(Exception):
    """The root of every error that this package raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.attempts = 1
        """How often the request was tried; the error is that of the last time."""

    def __str__(self) -> str:
        tried = f" (tried {self.attempts} times)" if self.attempts > 1 else ""
        return f"{self.message}{tried}\n  hint: {self.hint}" if self.hint else f"{self.message}{tried}"


class ConnectError(TritonClientError):
    """No server was reached, or the connection broke: check the address and the server."""

    def __init__(self, message: str, *, hint: str | None = None, unsent: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.unsent = unsent
        """Whether it is certain that no server got the request, so that sending it again cannot do anything twice."""


class DeadlineExceeded(TritonClientError):  # noqa: N818 - says what is the case, as the statuses of gRPC do
    """The answer did not come in time: allow more time or ask for less. The server may still be working."""


class Overloaded(TritonClientError):  # noqa: N818 - says what is the case, as the statuses of gRPC do
    """The server is there but refused the request for want of room: send it again later."""

    def __init__(self, message: str, *, hint: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        """When to send it again, where that is known; infinite: not at all."""


class ModelNotReady(TritonClientError):  # noqa: N818 - says what is the case, as the statuses of gRPC do
    """The server does not serve this model or version, or not yet."""


class Cancelled(TritonClientError):  # noqa: N818 - says what is the case, as the statuses of gRPC do
    """The call was ended on purpose before its answer: by its caller, by closing the client, or by the server."""


class InvalidInput(TritonClientError):  # noqa: N818 - says what is the case, as the statuses of gRPC do
    """The call itself is wrong and will be refused every time: change it."""


class ServerError(TritonClientError):
    """The server or the model failed while working on a valid request, or its answer cannot be read."""


Status = Literal[
    "unreachable",
    "broken",
    "deadline",
    "unavailable",
    "cancelled",
    "not_found",
    "invalid_argument",
    "unimplemented",
    "internal",
]
"""``unreachable``: it is certain that no server got the request. ``broken``: the connection was lost after that."""


@dataclass(frozen=True)
class Call:
    """What was being done when something failed; used in messages."""

    address: str
    action: str
    """In words, for the middle of a sentence: ``inference on model 'm'``."""
    timeout_s: float
    model: str | None = None


# Models that enginesmith builds begin an error with the name of its status: tritonserver sends none with an error in a
# stream, and HTTP has one status for several.
_NAMED_STATUS = re.compile(r"\[([A-Z_]+)\] ")
_NAMED_STATUSES: dict[str, Status] = {
    "INVALID_ARG": "invalid_argument",
    "UNAVAILABLE": "unavailable",
    "CANCELLED": "cancelled",
    "DEADLINE_EXCEEDED": "deadline",
    "INTERNAL": "internal",
}


def error_from_status(
    status: Status, detail: str, *, call: Call, retry_after_s: float | None = None
) -> TritonClientError:
    """The error for a failed call; ``detail`` is what the server or the transport said.

    ``retry_after_s`` is the server's own word on when to come back: ``Retry-After``, ``grpc-retry-pushback-ms``.
    """
    detail = detail.strip().removeprefix("[request id: <id_unknown>] ")
    named = _NAMED_STATUS.match(detail)
    if named and named[1] in _NAMED_STATUSES:
        status, detail = _NAMED_STATUSES[named[1]], detail[named.end() :]
    if status == "unreachable":
        return connect_error(call.address, detail)
    if status == "broken":
        return ConnectError(
            f"the connection to {call.address} broke during {call.action}: {detail}",
            hint="the server may have done the work or not; send it again if doing it twice is harmless, and look "
            "whether the server runs and whether this is the port of this protocol",
        )
    if status == "cancelled":
        return Cancelled(f"{call.action} was cancelled at {call.address}: {detail}")
    if status == "deadline":
        return DeadlineExceeded(
            f"{call.action} had no answer from {call.address} within {call.timeout_s:g} s",
            hint="give a larger timeout_s, ask for less work, or look at client.statistics(model) for a long queue; "
            "the server may still be computing",
        )
    if _means_not_served(detail):
        what = f"model {call.model!r}" if call.model else "this"
        return ModelNotReady(f"{call.address} does not serve {what}: {detail}")
    if status == "unavailable":
        return Overloaded(
            f"{call.address} refused {call.action}: {detail}",
            hint="wait and send it again, send fewer requests at once, or give the model more instances or a longer queue",
            retry_after_s=retry_after_s,
        )
    if status == "invalid_argument":
        return InvalidInput(
            f"{call.address} refused {call.action}: {detail}",
            hint="compare the request with client.metadata(model)" if call.model else None,
        )
    return ServerError(
        f"{call.action} failed on {call.address}: {detail}", hint="the log of the server has the rest"
    )


def connect_error(address: str, detail: str) -> ConnectError:
    """The error for a server that cannot be reached at ``address``."""
    return ConnectError(
        f"cannot reach a Triton server at {address}: {detail}",
        hint="check that the server runs and that this is the port of this protocol (Triton's defaults: gRPC 8001, HTTP 8000)",
        unsent=True,
    )


def _means_not_served(detail: str) -> bool:
    # Triton has no status of its own for this: it is NOT_FOUND for inference, INVALID_ARG for statistics
    # and UNAVAILABLE while a model or the server stops, and models may use the same codes for their own errors.
    return detail.startswith(("Request for unknown model", "Server is stopping")) or (
        detail.startswith("requested model") and "is not available" in detail
    )
