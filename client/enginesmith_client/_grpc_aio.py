"""The gRPC transport for tasks, over the messages and stubs of tritonclient."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2_grpc

from enginesmith_client._address import Address
from enginesmith_client._balance import LeastBusy
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, error_from_status
from enginesmith_client._event_loop import OwnLoop
from enginesmith_client._flow_aio import run_async
from enginesmith_client._grpc_messages import (
    COMPRESSIONS,
    ENDING_TIMEOUT_S,
    RPCS,
    channel_credentials,
    channel_options,
    error_from_rpc,
    is_final,
    reply_from_stream,
    stream_message_from_request,
)
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Infer, Operation, described
from enginesmith_client._process import OwnProcess
from enginesmith_client._settings import ConnectionSettings, Tls
from enginesmith_client._sharing import shared_memory_over


class AsyncGrpcTransport:
    """Speaks KServe v2 with Triton's extensions over gRPC."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._process = OwnProcess()
        self._loop = OwnLoop()
        self._wire = _Wire(address, settings)
        self._memory = shared_memory_over(self._wire, settings)

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """As ``AsyncTransport.perform``."""
        self._process.require()
        self._loop.require()
        if self._memory is not None and type(operation) is Infer:
            return await run_async(self._memory.infer(operation, deadline))
        return await self._wire.perform(operation, deadline)

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncGrpcReplyStream:
        """As ``AsyncTransport.open``."""
        self._process.require()
        self._loop.require()
        return self._wire.open(request, deadline)

    async def close(self) -> None:
        """As ``AsyncTransport.close``."""
        if not self._process.is_this:
            return
        if self._memory is not None:
            await run_async(self._memory.release())
        await self._wire.close()


class _Wire:
    """The connections, made in the event loop that first uses them."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._authority = address.authority
        self._settings = settings
        encrypted = address.encrypted or settings.tls is not None
        self._address = f"grpc{'s' if encrypted else ''}://{address.authority}"
        self._credentials = channel_credentials(settings.tls or Tls()) if encrypted else None
        self._metadata = tuple(settings.headers.items()) or None
        self._channels: list[Any] = []
        self._stubs: LeastBusy[Any] | None = None
        self._endings = Endings()

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        rpc = RPCS[type(operation)]
        message = rpc.message(operation)
        stubs = self._connected()
        number = stubs.take()
        try:
            reply = await getattr(stubs.members[number], rpc.method)(
                message, timeout=deadline.remaining_s(), metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._call(operation, deadline)) from error
        except grpc.aio.UsageError as error:  # How grpcio says that the channel was closed.
            raise error_from_status("cancelled", str(error), call=self._call(operation, deadline)) from error
        finally:
            stubs.give_back(number)
        return rpc.reply(reply)

    def open(self, request: InferRequest, deadline: Deadline) -> AsyncGrpcReplyStream:
        message = stream_message_from_request(request)

        async def requests() -> AsyncIterator[Any]:
            yield message

        call = self._call(Infer(request), deadline)
        stubs = self._connected()
        number = stubs.take()
        try:
            answers = stubs.members[number].ModelStreamInfer(
                requests(), timeout=deadline.remaining_s(), metadata=self._metadata
            )
        except grpc.aio.UsageError as error:
            stubs.give_back(number)
            raise error_from_status("cancelled", str(error), call=call) from error
        return AsyncGrpcReplyStream(answers, call, self._endings, on_end=lambda: stubs.give_back(number))

    async def close(self) -> None:
        await self._endings.wait(timeout_s=ENDING_TIMEOUT_S)
        for channel in self._channels:
            await channel.close()

    def _connected(self) -> LeastBusy[Any]:
        if self._stubs is None:
            options, compression = (
                channel_options(self._settings),
                COMPRESSIONS[self._settings.compression],
            )
            for _ in range(self._settings.connections):
                self._channels.append(
                    grpc.aio.insecure_channel(self._authority, options, compression)
                    if self._credentials is None
                    else grpc.aio.secure_channel(self._authority, self._credentials, options, compression)
                )
            self._stubs = LeastBusy(
                [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in self._channels]
            )
        return self._stubs

    def _call(self, operation: Operation, deadline: Deadline) -> Call:
        model = getattr(operation, "model", None) or None
        return Call(self._address, described(operation), deadline.timeout_s, model)


class AsyncGrpcReplyStream:
    """The answers to one request."""

    def __init__(self, answers: Any, call: Call, endings: Endings, *, on_end: Callable[[], None]) -> None:
        self._answers = answers
        self._call = call
        self._endings = endings
        self._on_end = on_end
        self._ended = False

    async def receive(self) -> InferReply | None:
        """As ``AsyncReplyStream.receive``."""
        if self._ended:
            return None
        try:
            answer = await self._answers.read()
            if answer is grpc.aio.EOF:
                raise error_from_status("broken", "the stream ended before its last answer", call=self._call)
            reply = reply_from_stream(answer, self._call)
        except grpc.RpcError as error:
            await self.close()
            raise error_from_rpc(error, self._call) from error
        except BaseException:
            await self.close()
            raise
        if is_final(answer.infer_response) and not self._ended:
            self._ended = True
            self._endings.add(self._answers)
            self._on_end()
        return reply

    async def close(self) -> None:
        """As ``AsyncReplyStream.close``."""
        if not self._ended:
            self._ended = True
            self._answers.cancel()
            self._on_end()


class Endings:
    """As that of the transport for threads."""

    def __init__(self) -> None:
        self._statuses: set[asyncio.Future[Any]] = set()

    def add(self, answers: Any) -> None:
        """Keep ``answers`` until its status is there."""
        status = asyncio.ensure_future(answers.code())
        self._statuses.add(status)
        status.add_done_callback(self._statuses.discard)

    async def wait(self, *, timeout_s: float) -> None:
        """Return when all have ended, or the time is over."""
        if self._statuses:
            await asyncio.wait(set(self._statuses), timeout=timeout_s)
