"""The seam between what the client says and how it travels.

A transport carries messages and nothing else: it checks no shapes, caches nothing and never retries. It
turns every failure into an error of ``_errors``, and it is over when the deadline is, whatever the server does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from enginesmith_client import _address
from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._messages import InferReply, InferRequest, Json


class Transport(Protocol):
    """One way to reach one server. Safe to use from several threads at once; connects when first used.

    The control calls return the JSON of Triton's HTTP protocol. An empty ``version`` lets the server choose.
    """

    def server_ready(self, deadline: Deadline) -> bool:
        """Whether the server and all models that it must serve are ready."""

    def model_ready(self, model: str, version: str, deadline: Deadline) -> bool:
        """Whether the model can take requests; False for a model that the server does not know."""

    def metadata(self, model: str, version: str, deadline: Deadline) -> Json:
        """Names, datatypes and shapes of the model's tensors."""

    def config(self, model: str, version: str, deadline: Deadline) -> Json:
        """The model configuration with the server's defaults filled in."""

    def statistics(self, model: str, version: str, deadline: Deadline) -> Json:
        """``{"model_stats": [...]}``."""

    def index(self, deadline: Deadline) -> Json:
        """``{"models": [...]}``: the repository index."""

    def infer(self, request: InferRequest, deadline: Deadline) -> InferReply:
        """The answer of the model to one request."""

    def close(self) -> None:
        """Let go of every connection. May be called more than once."""


def _grpc(address: Address) -> Transport:
    from enginesmith_client._grpc import GrpcTransport

    return GrpcTransport(address)


def _http(address: Address) -> Transport:
    from enginesmith_client._http import HttpTransport

    return HttpTransport(address)


TRANSPORTS: dict[_address.Protocol, Callable[[Address], Transport]] = {"grpc": _grpc, "http": _http}
"""How to make the transport of each protocol; each imports its library only when it is wanted."""
