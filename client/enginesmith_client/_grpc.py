"""The gRPC transport for threads, over the messages and stubs of tritonclient."""

from __future__ import annotations

from typing import Any

import grpc  # type: ignore[import-untyped]
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


class GrpcTransport:
    """Speaks KServe v2 with Triton's extensions over gRPC."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._address = str(address)
        self._settings = settings
        self._channel = grpc.insecure_channel(address.authority, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        rpc = RPCS[type(operation)]
        message = rpc.message(operation)
        try:
            reply = getattr(self._stub, rpc.method)(message, timeout=deadline.remaining_s())
        except grpc.RpcError as error:
            model = getattr(operation, "model", None) or None
            call = Call(self._address, described(operation), deadline.timeout_s, model)
            raise error_from_rpc(error, call) from error
        return rpc.reply(reply)

    def open(self, request: InferRequest, deadline: Deadline) -> GrpcReplyStream:
        message = message_from_request(request)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        answers = self._stub.ModelStreamInfer(iter([message]), timeout=deadline.remaining_s())
        call = Call(self._address, f"inference of model {request.model!r}", deadline.timeout_s, request.model)
        return GrpcReplyStream(answers, call)

    def close(self) -> None:
        self._channel.close()


class GrpcReplyStream:
    """The answers to one request."""

    def __init__(self, answers: Any, call: Call) -> None:
        self._answers = answers
        self._call = call
        self._ended = False

    def receive(self) -> InferReply | None:
        if self._ended:
            return None
        try:
            answer = next(self._answers, None)
        except grpc.RpcError as error:
            self._ended = True
            raise error_from_rpc(error, self._call) from error
        if answer is None:
            self._ended = True
            raise error_from_status("broken", "the stream ended before its last answer", call=self._call)
        if answer.error_message:
            self.close()
            raise error_from_status("internal", answer.error_message, call=self._call)
        reply = answer.infer_response
        if is_final(reply):
            self.close()
            if not reply.outputs:
                return None
        return reply_from_message(reply)

    def close(self) -> None:
        self._ended = True
        self._answers.cancel()
