"""The fake server as a test uses it: models that are functions, faults that are scripted, clients that are real."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from enginesmith_client._address import address_from_url
from enginesmith_client._aio import AsyncClient
from enginesmith_client._client import Client
from enginesmith_client._errors import Call, TritonClientError, error_from_status
from enginesmith_client._limits import RateLimit
from enginesmith_client._messages import ModelMetadata, TensorMetadata
from enginesmith_client._operations import Operation
from enginesmith_client._retries import Retry
from enginesmith_client.testing._backend import Backend, RecordedRequest
from enginesmith_client.testing._encoders import (
    Classify,
    Embed,
    Score,
    classifier_answers,
    classifier_interface,
    embedder_answers,
    embedder_interface,
    hashed_vector,
    reranker_answers,
    reranker_interface,
)
from enginesmith_client.testing._llm import Script, llm_answers, llm_interface
from enginesmith_client.testing._models import Answers, Arrays, FakeModel, config_json, once, several
from enginesmith_client.testing._state import Served
from enginesmith_client.testing._transports import AsyncFakeTransport, FakeTransport

ModelFunction: TypeAlias = "Callable[[Arrays], Arrays] | Callable[[Arrays], Iterable[Arrays]]"


class FakeServer:
    """A Triton server without sockets: its models are functions of the test, its clients the real ones.

    Calls of a client go through all that they go through on the way to a server, but for the transport: checks of dtypes
    and shapes, encoding, deadlines, retries, limits, typed errors. Nothing sleeps: latencies are virtual.
    Safe to use from several threads and event loops.
    """

    def __init__(self, *, url: str = "grpc://fake-server:8001") -> None:
        """``url`` is what errors call the server; nothing connects to it."""
        self._backend = Backend(str(address_from_url(url)))

    @property
    def requests(self) -> list[RecordedRequest]:
        """The inferences that reached the server, in their order."""
        return list(self._backend.requests)

    @property
    def operations(self) -> list[Operation]:
        """Everything that reached the server, the reading of metadata among it."""
        return list(self._backend.operations)

    @property
    def clock_s(self) -> float:
        """How much virtual time has passed: the sum of the latencies."""
        return self._backend.clock_s

    def client(
        self, *, timeout_s: float = 60.0, retry: Retry = Retry(), limit: RateLimit | None = None
    ) -> Client:
        """A client of this server, for threads. Any number may be made. Pauses between its retries are real."""
        return Client._with_transport(
            FakeTransport(self._backend),
            name=self._backend.address,
            timeout_s=timeout_s,
            retry=retry,
            limit=limit,
        )

    def async_client(
        self, *, timeout_s: float = 60.0, retry: Retry = Retry(), limit: RateLimit | None = None
    ) -> AsyncClient:
        """A client of this server, for tasks."""
        return AsyncClient._with_transport(
            AsyncFakeTransport(self._backend),
            name=self._backend.address,
            timeout_s=timeout_s,
            retry=retry,
            limit=limit,
        )

    def add_model(
        self,
        name: str,
        answer: ModelFunction,
        *,
        inputs: Sequence[TensorMetadata],
        outputs: Sequence[TensorMetadata],
        max_batch_size: int = 0,
        decoupled: bool = False,
        versions: Sequence[str] = ("1",),
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Serve a model; one of the same name is replaced.

        Args:
            answer: from the input arrays of one request to the output arrays; with ``decoupled`` to any number of them.
                What it raises is what the model fails with: ``InvalidInput``, ``Overloaded`` and ``Cancelled`` arrive as
                such, ``AssertionError`` fails the test, and all else is a ``ServerError``.
            inputs: shapes with the batch dimension (-1, where ``max_batch_size`` is not 0), as ``client.metadata`` has them.
            labels: of the classes of an output.
        """
        metadata = ModelMetadata(
            name, tuple(versions), "python", tuple(inputs), tuple(outputs), max_batch_size, decoupled
        )
        self.add_signature(metadata, answer, labels=labels)

    def add_signature(
        self,
        signature: ModelMetadata,
        answer: ModelFunction,
        *,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Serve a model with the interface of another: of ``client.metadata(model)``, or of a generated client."""
        answers = several(answer) if signature.decoupled else once(answer)  # type: ignore[arg-type]
        self._add(signature, answers, labels=labels)

    def add_llm(
        self, name: str, answer: Script = "An answer of a fake model.", *, max_batch_size: int = 8
    ) -> None:
        """Serve a language model that says what the script says, streamed or not."""
        self._add(llm_interface(name, max_batch_size=max_batch_size), llm_answers(answer))

    def add_embedder(
        self, name: str, embed: Embed | None = None, *, width: int = 8, max_batch_size: int = 32
    ) -> None:
        """Serve a text encoder; without ``embed`` each text has a vector of length 1 that depends on it alone."""
        interface = embedder_interface(name, width=width, max_batch_size=max_batch_size)
        self._add(interface, embedder_answers(embed or (lambda text: hashed_vector(text, width).tolist())))

    def add_classifier(
        self, name: str, classify: Classify, *, labels: Sequence[str], max_batch_size: int = 32
    ) -> None:
        """Serve a model that gives a text the probabilities of ``labels``."""
        interface = classifier_interface(name, classes=len(labels), max_batch_size=max_batch_size)
        self._add(interface, classifier_answers(labels, classify), labels={"probabilities": labels})

    def add_reranker(self, name: str, score: Score, *, max_batch_size: int = 32) -> None:
        """Serve a model that scores a query and a document."""
        self._add(reranker_interface(name, max_batch_size=max_batch_size), reranker_answers(score))

    def stop(self) -> None:
        """Nothing reaches the server any more, and its streams break."""
        self._backend.running = False

    def start(self) -> None:
        """The server is there again, with its models as they were."""
        self._backend.running = True

    def overload(self, model: str, *, times: int = 1, retry_after_s: float | None = None) -> None:
        """The next inferences of ``model`` find its queue full: ``Overloaded``."""
        call = Call(self._backend.address, f"inference of model {model!r}", 0.0, model)
        detail = "Exceeds maximum queue size"
        self.fail(
            model,
            error_from_status("unavailable", detail, call=call, retry_after_s=retry_after_s),
            times=times,
        )

    def fail(self, model: str, error: TritonClientError, *, times: int = 1) -> None:
        """The next inferences of ``model`` end with ``error``."""
        self._served(model).faults.errors += [copy.copy(error) for _ in range(times)]

    def break_stream(self, model: str, *, after: int, times: int = 1) -> None:
        """The next streams of ``model`` lose their connection after so many answers: ``ConnectError``."""
        self._served(model).faults.breaks += [after] * times

    def set_latency(self, model: str, latency_s: float) -> None:
        """Each answer of ``model`` takes so long, in virtual time; beyond a deadline it is ``DeadlineExceeded`` at once."""
        self._served(model).faults.latency_s = latency_s

    def set_ready(self, model: str, ready: bool, *, reason: str = "unloaded") -> None:
        """Whether ``model`` takes requests; what ``load`` and ``unload`` do as well."""
        served = self._served(model)
        served.ready, served.reason = ready, "" if ready else reason

    def fail_loading(self, model: str, reason: str | None) -> None:
        """What ``load`` of ``model`` ends with from now on; None: it works again."""
        self._served(model).load_error = reason

    def _add(
        self, metadata: ModelMetadata, answers: Answers, *, labels: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        config = config_json(metadata, labels=labels or {})
        model = FakeModel(config, metadata.versions or ("1",), answers, dict(labels or {}))
        with self._backend.lock:
            self._backend.models[metadata.name] = Served(model)

    def _served(self, model: str) -> Served:
        if model not in self._backend.models:
            raise ValueError(
                f"the fake server has no model {model!r}; it has: {', '.join(self._backend.models) or 'none'}"
            )
        return self._backend.models[model]
