"""The gRPC transport for tasks, over the messages and stubs of tritonclient."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2_grpc

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, error_from_status
from enginesmith_client._grpc_messages import (
    CHANNEL_OPTIONS,
    RPCS,
    error_from_rpc,
    is_final,
    message_from_request,
    reply_from_message,
)
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Operation, described
from enginesmith_client._settings import ConnectionSettings


class AsyncGrpcTransport:
    """Speaks KServe v2 with Triton's extensions over gRPC."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._address = str(address)
        self._settings = settings
        self._channel = grpc.aio.insecure_channel(address.authority, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        rpc = RPCS[type(operation)]
        message = rpc.message(operation)
        try:
            reply = await getattr(self._stub, rpc.method)(message, timeout=deadline.remaining_s())
        except grpc.RpcError as error:
            model = getattr(operation, "model", None) or None
            call = Call(self._address, described(operation), deadline.timeout_s, model)
            raise error_from_rpc(error, call) from error
        return rpc.reply(reply)

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncGrpcReplyStream:
        message = message_from_request(request)
        message.parameters["triton_enable_empty_final_response"].bool_param = True

        async def requests() -> AsyncIterator[Any]:
            yield message

        answers = self._stub.ModelStreamInfer(requests(), timeout=deadline.remaining_s())
        call = Call(self._address, f"inference of model {request.model!r}", deadline.timeout_s, request.model)
        return AsyncGrpcReplyStream(answers, call)

    async def close(self) -> None:
        await self._channel.close()


class AsyncGrpcReplyStream:
    """The answers to one request."""

    def __init__(self, answers: Any, call: Call) -> None:
        self._answers = answers
        self._call = call
        self._ended = False

    async def receive(self) -> InferReply | None:
        if self._ended:
            return None
        try:
            answer = await self._answers.read()
        except grpc.RpcError as error:
            self._ended = True
            raise error_from_rpc(error, self._call) from error
        if answer is grpc.aio.EOF:
            self._ended = True
            raise error_from_status("broken", "the stream ended before its last answer", call=self._call)
        if answer.error_message:
            await self.close()
            raise error_from_status("internal", answer.error_message, call=self._call)
        reply = answer.infer_response
        if is_final(reply):
            await self.close()
            if not reply.outputs:
                return None
        return reply_from_message(reply)

    async def close(self) -> None:
        self._ended = True
        self._answers.cancel()
