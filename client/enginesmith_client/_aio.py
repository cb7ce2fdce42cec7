"""The asynchronous client: awaits the flows of ``_calls`` in the tasks of one event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from enginesmith_client._address import Protocol, address_from_url
from enginesmith_client._calls import Calls
from enginesmith_client._codec import Array
from enginesmith_client._dispatch import Dispatcher
from enginesmith_client._flow_aio import run_async
from enginesmith_client._limits import RateLimit
from enginesmith_client._messages import (
    Classification,
    InferResult,
    Json,
    ModelMetadata,
    ModelStatistics,
    ModelStatus,
    Parameter,
    RankedDocument,
)
from enginesmith_client._requests import Envelope, Sequence_
from enginesmith_client._retries import Retry
from enginesmith_client._settings import Compression, ConnectionSettings, Tls
from enginesmith_client._stream_aio import AsyncResultStream
from enginesmith_client._text_methods_aio import AsyncTextMethods
from enginesmith_client._transport import ASYNC_TRANSPORTS, AsyncTransport


class AsyncClient(AsyncTextMethods):
    """``Client`` for asyncio: the same methods, as coroutines. Make it and use it in one event loop."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        protocol: Protocol | None = None,
        timeout_s: float = 60.0,
        headers: Mapping[str, str] | None = None,
        tls: Tls | None = None,
        compression: Compression = "none",
        retry: Retry = Retry(),
        limit: RateLimit | None = None,
        shared_memory_bytes: int | None = None,
        connections: int = 1,
    ) -> None:
        """As ``Client``."""
        addresses = [address_from_url(one, protocol) for one in ([url] if isinstance(url, str) else url)]
        settings = ConnectionSettings(
            headers=dict(headers or {}),
            tls=tls,
            compression=compression,
            connections=connections,
            shared_memory_bytes=shared_memory_bytes,
        )
        transports = [ASYNC_TRANSPORTS[address.protocol](address, settings) for address in addresses]
        self._calls = Calls(Dispatcher(addresses, transports, retry=retry, limit=limit), timeout_s)

    @classmethod
    def _with_transport(
        cls,
        transport: AsyncTransport,
        *,
        name: str,
        timeout_s: float = 60.0,
        retry: Retry = Retry(),
        limit: RateLimit | None = None,
    ) -> AsyncClient:
        """A client of something that behaves like a server; ``enginesmith_client.testing`` uses it."""
        client = cls.__new__(cls)
        client._calls = Calls(
            Dispatcher([address_from_url(name)], [transport], retry=retry, limit=limit), timeout_s
        )
        return client

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r}, timeout_s={self._calls.timeout_s:g})"

    @property
    def url(self) -> str:
        """The server's address, with its protocol and port; several are joined by commas."""
        return self._calls.dispatcher.name

    async def close(self, *, drain_s: float = 0.0) -> None:
        """As ``Client.close``, for the calls of other tasks."""
        self._calls.closed = True
        await run_async(self._calls.dispatcher.running.drain(drain_s))
        for transport in self._calls.dispatcher.transports:
            await transport.close()

    async def embed(
        self, model: str, texts: Sequence[str], *, version: str = "", timeout_s: float | None = None
    ) -> Array:
        """As ``Client.embed``."""
        return await run_async(self._calls.embed(model, texts, version=version, timeout_s=timeout_s))

    async def classify(
        self, model: str, texts: Sequence[str], *, version: str = "", timeout_s: float | None = None
    ) -> list[Classification]:
        """As ``Client.classify``."""
        return await run_async(self._calls.classify(model, texts, version=version, timeout_s=timeout_s))

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        version: str = "",
        timeout_s: float | None = None,
    ) -> list[RankedDocument]:
        """As ``Client.rerank``."""
        return await run_async(
            self._calls.rerank(model, query, documents, version=version, timeout_s=timeout_s)
        )

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        parameters: Mapping[str, Parameter] | None = None,
        priority: int | None = None,
        sequence: Sequence_ | None = None,
        idempotent: bool | None = None,
    ) -> InferResult:
        """As ``Client.infer``."""
        envelope = Envelope(request_id, priority, sequence, parameters, idempotent)
        flow = self._calls.infer(
            model, inputs, outputs=outputs, envelope=envelope, version=version, timeout_s=timeout_s
        )
        return await run_async(flow)

    def infer_stream(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        version: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        parameters: Mapping[str, Parameter] | None = None,
        priority: int | None = None,
        sequence: Sequence_ | None = None,
    ) -> AsyncResultStream:
        """As ``Client.infer_stream``."""
        envelope = Envelope(request_id, priority, sequence, parameters)
        opening = self._calls.infer_stream(
            model, inputs, outputs=outputs, envelope=envelope, version=version, timeout_s=timeout_s
        )
        return AsyncResultStream(opening)

    async def is_ready(
        self, model: str | None = None, *, version: str = "", timeout_s: float | None = None
    ) -> bool:
        """As ``Client.is_ready``."""
        return await run_async(self._calls.is_ready(model, version=version, timeout_s=timeout_s))

    async def wait_ready(
        self, model: str | None = None, *, version: str = "", timeout_s: float | None = None
    ) -> None:
        """As ``Client.wait_ready``."""
        await run_async(self._calls.wait_ready(model, version=version, timeout_s=timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[ModelStatus]:
        """As ``Client.models``."""
        return await run_async(self._calls.models(timeout_s=timeout_s))

    async def metadata(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> ModelMetadata:
        """As ``Client.metadata``."""
        return await run_async(self._calls.metadata(model, version=version, timeout_s=timeout_s))

    async def config(self, model: str, *, version: str = "", timeout_s: float | None = None) -> Json:
        """As ``Client.config``."""
        return await run_async(self._calls.config(model, version=version, timeout_s=timeout_s))

    async def statistics(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> tuple[ModelStatistics, ...]:
        """As ``Client.statistics``."""
        return await run_async(self._calls.statistics(model, version=version, timeout_s=timeout_s))

    async def load(
        self,
        model: str,
        *,
        config: Json | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """As ``Client.load``."""
        await run_async(self._calls.load(model, config=config, files=files, timeout_s=timeout_s))

    async def unload(self, model: str, *, dependents: bool = False, timeout_s: float | None = None) -> None:
        """As ``Client.unload``."""
        await run_async(self._calls.unload(model, dependents=dependents, timeout_s=timeout_s))
