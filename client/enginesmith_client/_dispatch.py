"""Where an operation goes: chooses among the servers of a client, as a flow.

Owns the transports. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._flow import Flow, Open, Send
from enginesmith_client._messages import InferRequest
from enginesmith_client._operations import Operation


class Dispatcher:
    """The servers of one client; ``transports`` are all for threads or all for tasks, in the order of ``addresses``."""

    def __init__(self, addresses: Sequence[Address], transports: Sequence[Any]) -> None:
        self.addresses = tuple(addresses)
        self.transports = tuple(transports)

    @property
    def name(self) -> str:
        """The servers in words."""
        return ", ".join(str(address) for address in self.addresses)

    def perform(self, operation: Operation, deadline: Deadline) -> Flow[Any]:
        """The reply to ``operation``."""
        return (yield Send(self.transports[0], operation, deadline))

    def open(self, request: InferRequest, deadline: Deadline) -> Flow[Any]:
        """An open stream of answers to ``request``."""
        return (yield Open(self.transports[0], request, deadline))
