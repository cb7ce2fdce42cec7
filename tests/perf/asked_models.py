"""Models that workloads and suites are tried on, besides those of the session's server: loads them into it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc.framework.foundation import logging_pool
from perf_models import PerfServer
from tritonclient.grpc import service_pb2

from enginesmith_client import Client

CLIENT_MODELS = Path(__file__).parents[1] / "client" / "models"
_SERVICE = "/inference.GRPCInferenceService/"


def load_models(client: Client, server: PerfServer, *names: str) -> None:
    """Have the session's server serve models of the client's tests, or ``wordy``, too."""
    for name in names:
        place = server.repository / name
        if not place.exists():
            shutil.copytree(CLIENT_MODELS / name, place)
        client.load(name)


@contextmanager
def recorder(grpc_url: str) -> Iterator[tuple[str, list[Any]]]:
    """A proxy in front of the server: its address, and the ``ModelInferRequest`` that went through it."""
    seen: list[Any] = []
    with grpc.insecure_channel(grpc_url) as channel, logging_pool.pool(8) as pool:
        proxy = grpc.server(pool)
        proxy.add_generic_rpc_handlers([_Proxy(channel, seen)])
        port = proxy.add_insecure_port("127.0.0.1:0")
        proxy.start()
        try:
            yield f"grpc://127.0.0.1:{port}", seen
        finally:
            proxy.stop(grace=None).wait()


class _Proxy(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, channel: grpc.Channel, seen: list[Any]) -> None:
        self._channel = channel
        self._seen = seen

    def service(self, call: Any) -> Any:
        if call.method == f"{_SERVICE}ModelStreamInfer":
            stream = self._channel.stream_stream(call.method)
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, _: stream(self._noted(one) for one in requests)
            )
        forward = self._channel.unary_unary(call.method)
        is_inference = call.method == f"{_SERVICE}ModelInfer"
        return grpc.unary_unary_rpc_method_handler(
            lambda request, _: forward(self._noted(request) if is_inference else request, timeout=30)
        )

    def _noted(self, request: bytes) -> bytes:
        self._seen.append(service_pb2.ModelInferRequest.FromString(request))
        return request
