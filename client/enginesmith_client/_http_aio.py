"""The HTTP transport for tasks."""

from __future__ import annotations

import asyncio
from typing import Any

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import InvalidInput
from enginesmith_client._http import HttpTransport
from enginesmith_client._messages import InferRequest
from enginesmith_client._operations import Operation
from enginesmith_client._settings import ConnectionSettings
from enginesmith_client._transport import AsyncReplyStream


class AsyncHttpTransport:
    """``HttpTransport`` in threads of its own."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._inner = HttpTransport(address, settings)

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        return await asyncio.to_thread(self._inner.perform, operation, deadline)

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncReplyStream:
        raise InvalidInput(
            f"model {request.model!r} is decoupled, which this client asks over gRPC only",
            hint="use a grpc:// address",
        )

    async def close(self) -> None:
        self._inner.close()
