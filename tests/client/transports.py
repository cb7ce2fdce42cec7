"""All four transports behind one interface, and what stands between them and a server in tests."""

import asyncio
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from enginesmith_client._address import address_from_url
from enginesmith_client._codec import bytes_from_array
from enginesmith_client._deadline import Deadline
from enginesmith_client._messages import (
    InferReply,
    InferRequest,
    ModelMetadata,
    WireTensor,
    metadata_from_json,
)
from enginesmith_client._operations import Operation, ReadConfig, ReadMetadata
from enginesmith_client._settings import ConnectionSettings
from enginesmith_client._transport import ASYNC_TRANSPORTS, TRANSPORTS

KINDS = ("grpc", "http", "grpc-async", "http-async")
"""Protocols, each for threads and for tasks."""


class Driver:
    """A transport of either kind; those for tasks run in an event loop of their own."""

    def __init__(self, kind: str, url: str, **settings: Any) -> None:
        self.protocol, _, tasks = kind.partition("-")
        address = address_from_url(url if "://" in url else f"{self.protocol}://{url}")
        self.settings = ConnectionSettings(**settings)
        self._loop = asyncio.new_event_loop() if tasks else None
        self._metadata: dict[str, ModelMetadata] = {}
        if self._loop is None:
            self.transport: Any = TRANSPORTS[address.protocol](address, self.settings)
        else:
            self._thread = threading.Thread(target=self._loop.run_forever)
            self._thread.start()
            try:
                self.transport = ASYNC_TRANSPORTS[address.protocol](address, self.settings)
            except BaseException:
                self._stop()
                raise

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._wait(self.transport.close())
        if self._loop is not None and self._loop.is_running():
            self._stop()

    def perform(self, operation: Operation, timeout_s: float = 30) -> Any:
        return self._wait(self.transport.perform(operation, Deadline.after(timeout_s)))

    def open(self, request: InferRequest, timeout_s: float = 30) -> "Stream":
        return Stream(self, self._wait(self.transport.open(request, Deadline.after(timeout_s))))

    def request(self, model: str, inputs: Mapping[str, Any], **options: Any) -> InferRequest:
        """A request that is encoded as the client does it."""
        if model not in self._metadata:
            self._metadata[model] = metadata_from_json(
                self.perform(ReadMetadata(model)), self.perform(ReadConfig(model))
            )
        return request_with(self._metadata[model], inputs, **options)

    def _wait(self, result: Any) -> Any:
        if self._loop is None:
            return result
        return asyncio.run_coroutine_threadsafe(result, self._loop).result(60)

    def _stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Stream:
    """A stream of either kind."""

    def __init__(self, driver: Driver, stream: Any) -> None:
        self._driver = driver
        self._stream = stream

    def receive(self) -> InferReply | None:
        reply: InferReply | None = self._driver._wait(self._stream.receive())
        return reply

    def rest(self) -> list[InferReply]:
        return list(iter(self.receive, None))

    def close(self) -> None:
        self._driver._wait(self._stream.close())


def request_with(
    metadata: ModelMetadata,
    inputs: Mapping[str, Any],
    *,
    outputs: Sequence[str] = (),
    request_id: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> InferRequest:
    """A request as the client's calls make it, unchecked."""
    tensors = []
    for name, array in inputs.items():
        tensor = metadata.input(name)
        assert tensor is not None, name
        data = bytes_from_array(array, tensor.datatype)
        tensors.append(WireTensor(name, tensor.datatype, array.shape, data))
    return InferRequest(
        metadata.name, "", request_id, tuple(tensors), tuple(outputs), parameters or {}, metadata=metadata
    )


def pieces(
    text: bytes = b"hi", *, count: int = 1, then: str = "end", mark: Path | None = None
) -> dict[str, Any]:
    """Inputs of the model ``pieces``."""
    inputs: dict[str, Any] = {
        "text_input": np.array([[text]], np.object_),
        "count": np.array([[count]], np.int32),
        "then": np.array([[then]], np.object_),
    }
    if mark is not None:
        inputs["mark"] = np.array([[str(mark)]], np.object_)
    return inputs


def await_mark(mark: Path, content: str) -> None:
    """Return when the model has written ``content``; it does so in another process, which sends no event."""
    limit_s = time.monotonic() + 20
    while not mark.exists() or mark.read_text() != content:
        assert time.monotonic() < limit_s, f"{mark.name} never said {content!r}"
        time.sleep(0.002)


class Forwarder:
    """A TCP server that passes everything on to ``target``; with a certificate, it takes TLS and passes on plain text."""

    def __init__(self, target: str, certificate: tuple[Path, Path] | None = None) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._tls = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*certificate)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """End every connection as it is."""
        for pair in self._pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with client, socket.create_connection(self._target) as server:
                self._pairs.append((client, server))
                self._pass_on(client, server)
        except OSError:
            client.close()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        while True:
            pending = isinstance(client, ssl.SSLSocket) and client.pending()
            ready = [client] if pending else select.select([client, server], [], [])[0]
            for source in ready:
                data = source.recv(1 << 16)
                if not data:
                    return
                if source is client:
                    self.sent_bytes += len(data)
                    server.sendall(data)
                else:
                    self.received_bytes += len(data)
                    client.sendall(data)


@contextmanager
def forwarding(target: str, certificate: tuple[Path, Path] | None = None) -> Iterator[Forwarder]:
    """A ``Forwarder`` for the time of a ``with`` block."""
    forwarder = Forwarder(target, certificate)
    try:
        yield forwarder
    finally:
        forwarder.close()
