"""The synchronous client: runs the flows of ``_calls`` in the calling thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from enginesmith_client._address import Protocol, address_from_url
from enginesmith_client._calls import Calls
from enginesmith_client._codec import Array
from enginesmith_client._dispatch import Dispatcher
from enginesmith_client._flow import run
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
from enginesmith_client._stream import ResultStream
from enginesmith_client._text_methods import TextMethods
from enginesmith_client._transport import TRANSPORTS, Transport


class Client(TextMethods):
    """A connection to Triton servers, for use as a context manager or until ``close``.

    Connects on the first call. Safe to use from several threads. Every call is over within its ``timeout_s``
    (default: the client's), which covers all messages that the call needs; only finding out for an error message
    which models there are may add a second. All errors are ``TritonClientError``.
    """

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
        """``url`` is ``grpc://host:port``, ``http://host:port/path`` or ``host:port`` (gRPC unless the port is 8000)."""
        addresses = [address_from_url(one, protocol) for one in ([url] if isinstance(url, str) else url)]
        settings = ConnectionSettings(
            headers=dict(headers or {}),
            tls=tls,
            compression=compression,
            connections=connections,
            shared_memory_bytes=shared_memory_bytes,
        )
        transports = [TRANSPORTS[address.protocol](address, settings) for address in addresses]
        self._calls = Calls(Dispatcher(addresses, transports, retry=retry, limit=limit), timeout_s)

    @classmethod
    def _with_transport(
        cls,
        transport: Transport,
        *,
        name: str,
        timeout_s: float = 60.0,
        retry: Retry = Retry(),
        limit: RateLimit | None = None,
    ) -> Client:
        """A client of something that behaves like a server; ``enginesmith_client.testing`` uses it."""
        client = cls.__new__(cls)
        client._calls = Calls(
            Dispatcher([address_from_url(name)], [transport], retry=retry, limit=limit), timeout_s
        )
        return client

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r}, timeout_s={self._calls.timeout_s:g})"

    @property
    def url(self) -> str:
        """The server's address, with its protocol and port; several are joined by commas."""
        return self._calls.dispatcher.name

    def close(self, *, drain_s: float = 0.0) -> None:
        """Close the connections. Every later call raises ``InvalidInput``.

        Calls that are running in other threads have ``drain_s`` to end; then they are ended with ``Cancelled``.
        """
        self._calls.closed = True
        run(self._calls.dispatcher.running.drain(drain_s))
        for transport in self._calls.dispatcher.transports:
            transport.close()

    def embed(
        self, model: str, texts: Sequence[str], *, version: str = "", timeout_s: float | None = None
    ) -> Array:
        """The vectors of ``texts``: float32 [texts, width], in their order.

        Sent in requests of at most the model's ``max_batch_size``, several at once; when one fails, the call does.
        ``model`` takes texts; for one that takes tokens, ``<model>-text`` is asked where the server has it.
        """
        return run(self._calls.embed(model, texts, version=version, timeout_s=timeout_s))

    def classify(
        self, model: str, texts: Sequence[str], *, version: str = "", timeout_s: float | None = None
    ) -> list[Classification]:
        """The classes of each of ``texts``. Sent as ``embed`` sends."""
        return run(self._calls.classify(model, texts, version=version, timeout_s=timeout_s))

    def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        version: str = "",
        timeout_s: float | None = None,
    ) -> list[RankedDocument]:
        """``documents`` by their relevance to ``query``, the most relevant first. Sent as ``embed`` sends."""
        return run(self._calls.rerank(model, query, documents, version=version, timeout_s=timeout_s))

    def infer(
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
        """The outputs of the model (all, or those named in ``outputs``) for ``inputs``.

        Arrays carry the batch dimension if the model has one. Names, dtypes and shapes are checked against the
        model's metadata before anything is sent; nothing is converted but float32 for BF16 inputs. ``sequence`` is
        for models that keep state between requests; ``parameters`` are further request parameters of Triton's.
        ``idempotent`` says whether it may run twice, so that it is sent again when a connection broke; without it
        the client's ``Retry`` says so.
        """
        envelope = Envelope(request_id, priority, sequence, parameters, idempotent)
        flow = self._calls.infer(
            model, inputs, outputs=outputs, envelope=envelope, version=version, timeout_s=timeout_s
        )
        return run(flow)

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
    ) -> ResultStream:
        """The answers of a decoupled model, as they come; otherwise as ``infer``. ``stream`` says when it is sent and ended."""
        envelope = Envelope(request_id, priority, sequence, parameters)
        opening = self._calls.infer_stream(
            model, inputs, outputs=outputs, envelope=envelope, version=version, timeout_s=timeout_s
        )
        return ResultStream(opening)

    def is_ready(
        self, model: str | None = None, *, version: str = "", timeout_s: float | None = None
    ) -> bool:
        """Whether the server, or one model on it, takes requests. Raises ``ConnectError`` when no server answers."""
        return run(self._calls.is_ready(model, version=version, timeout_s=timeout_s))

    def wait_ready(
        self, model: str | None = None, *, version: str = "", timeout_s: float | None = None
    ) -> None:
        """Return as soon as the server (every model that it must serve), or one model, takes requests.

        Neither a server that is not up yet nor a model that is unknown or failed to load ends the waiting: both
        can come in time. When the time is up, raises ``ConnectError`` if no server answered the last probe, else
        ``ModelNotReady`` with the server's own reasons.
        """
        run(self._calls.wait_ready(model, version=version, timeout_s=timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[ModelStatus]:
        """Every version of every model in the server's repository, ready or not."""
        return run(self._calls.models(timeout_s=timeout_s))

    def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """The inputs and outputs of the model, as the server has them now."""
        return run(self._calls.metadata(model, version=version, timeout_s=timeout_s))

    def config(self, model: str, *, version: str = "", timeout_s: float | None = None) -> Json:
        """The model configuration (``config.pbtxt`` with the server's defaults filled in) as JSON values."""
        return run(self._calls.config(model, version=version, timeout_s=timeout_s))

    def statistics(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> tuple[ModelStatistics, ...]:
        """Counts and durations since each version of the model was loaded; one entry per loaded version.

        Triton counts a request when its answer is on its way already: the last one may not be in yet.
        """
        return run(self._calls.statistics(model, version=version, timeout_s=timeout_s))

    def load(
        self,
        model: str,
        *,
        config: Json | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Have the server load the model, or load it again; return when it is ready.

        ``config`` (JSON values as ``config`` gives them) replaces the model's configuration, ``files`` (paths in the
        model's directory) its files. Raises ``ModelNotReady`` with the server's reason when it cannot be loaded, and
        ``InvalidInput`` when the server does not let clients load models.
        """
        run(self._calls.load(model, config=config, files=files, timeout_s=timeout_s))

    def unload(self, model: str, *, dependents: bool = False, timeout_s: float | None = None) -> None:
        """Have the server unload the model, with ``dependents`` also those that it is composed of; return when it is gone.

        Requests that it has begun are finished first. A model that is not loaded is nothing to do.
        """
        run(self._calls.unload(model, dependents=dependents, timeout_s=timeout_s))
