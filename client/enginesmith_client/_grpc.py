"""The gRPC transport for threads, over the messages and stubs of tritonclient.

Not over ``tritonclient.grpc.InferenceServerClient``: that one keeps one stream per client object. A connection of HTTP/2
has no such limit, so here every request to a decoupled model is a stream of its own, with its own deadline,
cancellation and status, and all share the client's few connections.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2_grpc

from enginesmith_client._address import Address
from enginesmith_client._balance import LeastBusy
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, error_from_status
from enginesmith_client._flow import run
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


class GrpcTransport:
    """Speaks KServe v2 with Triton's extensions over gRPC."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._process = OwnProcess()
        self._wire = _Wire(address, settings)
        self._memory = shared_memory_over(self._wire, settings)

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """As ``Transport.perform``."""
        self._process.require()
        if self._memory is not None and type(operation) is Infer:
            return run(self._memory.infer(operation, deadline))
        return self._wire.perform(operation, deadline)

    def open(self, request: InferRequest, deadline: Deadline) -> GrpcReplyStream:
        """As ``Transport.open``."""
        self._process.require()
        return self._wire.open(request, deadline)

    def close(self) -> None:
        """As ``Transport.close``; in a child of the process nothing happens, what there is belongs to the parent."""
        if not self._process.is_this:
            return
        if self._memory is not None:
            run(self._memory.release())
        self._wire.close()


class _Wire:
    """The connections, and how operations go over them."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        encrypted = address.encrypted or settings.tls is not None
        self._address = f"grpc{'s' if encrypted else ''}://{address.authority}"
        options, compression = channel_options(settings), COMPRESSIONS[settings.compression]
        if encrypted:
            credentials = channel_credentials(settings.tls or Tls())
            self._channels = [
                grpc.secure_channel(address.authority, credentials, options, compression)
                for _ in range(settings.connections)
            ]
        else:
            self._channels = [
                grpc.insecure_channel(address.authority, options, compression)
                for _ in range(settings.connections)
            ]
        self._stubs = LeastBusy(
            [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in self._channels]
        )
        self._metadata = tuple(settings.headers.items()) or None
        self._endings = Endings()

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        rpc = RPCS[type(operation)]
        message = rpc.message(operation)
        number = self._stubs.take()
        try:
            reply = getattr(self._stubs.members[number], rpc.method)(
                message, timeout=deadline.remaining_s(), metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._call(operation, deadline)) from error
        except ValueError as error:  # How grpcio says that the channel was closed.
            raise error_from_status("cancelled", str(error), call=self._call(operation, deadline)) from error
        finally:
            self._stubs.give_back(number)
        return rpc.reply(reply)

    def open(self, request: InferRequest, deadline: Deadline) -> GrpcReplyStream:
        message = stream_message_from_request(request)
        call = self._call(Infer(request), deadline)
        number = self._stubs.take()
        try:
            answers = self._stubs.members[number].ModelStreamInfer(
                iter((message,)), timeout=deadline.remaining_s(), metadata=self._metadata
            )
        except ValueError as error:
            self._stubs.give_back(number)
            raise error_from_status("cancelled", str(error), call=call) from error
        return GrpcReplyStream(answers, call, self._endings, on_end=lambda: self._stubs.give_back(number))

    def close(self) -> None:
        self._endings.wait(timeout_s=ENDING_TIMEOUT_S)
        for channel in self._channels:
            channel.close()

    def _call(self, operation: Operation, deadline: Deadline) -> Call:
        model = getattr(operation, "model", None) or None
        return Call(self._address, described(operation), deadline.timeout_s, model)


class GrpcReplyStream:
    """The answers to one request."""

    def __init__(self, answers: Any, call: Call, endings: Endings, *, on_end: Callable[[], None]) -> None:
        self._answers = answers
        self._call = call
        self._endings = endings
        self._on_end = on_end
        self._ended = threading.Lock()
        """Held from the end on: whoever gets it ends the stream."""

    def receive(self) -> InferReply | None:
        """As ``ReplyStream.receive``."""
        if self._ended.locked():
            return None
        try:
            answer = next(self._answers, None)
            if answer is None:
                raise error_from_status("broken", "the stream ended before its last answer", call=self._call)
            reply = reply_from_stream(answer, self._call)
        except grpc.RpcError as error:
            self.close()
            raise error_from_rpc(error, self._call) from error
        except BaseException:
            self.close()
            raise
        if is_final(answer.infer_response) and self._ended.acquire(blocking=False):
            self._endings.add(self._answers)
            self._on_end()
        return reply

    def close(self) -> None:
        """As ``ReplyStream.close``."""
        if self._ended.acquire(blocking=False):
            self._answers.cancel()
            self._on_end()


class Endings:
    """Streams of which all is read but the status, which the server sends right after.

    They are not cancelled: tritonserver 2.51 then often never finishes unloading the model.
    """

    def __init__(self) -> None:
        self._calls: set[Any] = set()
        self._changed = threading.Condition()

    def add(self, answers: Any) -> None:
        """Keep ``answers`` until its status is there: grpcio cancels a call that nobody holds any more."""
        with self._changed:
            self._calls.add(answers)
        if not answers.add_callback(lambda: self._remove(answers)):
            self._remove(answers)

    def wait(self, *, timeout_s: float) -> None:
        """Return when all have ended, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, timeout_s)

    def _remove(self, answers: Any) -> None:
        with self._changed:
            self._calls.discard(answers)
            self._changed.notify_all()
