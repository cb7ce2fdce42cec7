"""Every inference of the client, once: flows over a ``Dispatcher``, for ``Client`` and ``AsyncClient`` alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from enginesmith_client import _texts
from enginesmith_client._answer import Answer
from enginesmith_client._codec import Array
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import ModelNotReady, TritonClientError
from enginesmith_client._flow import CloseStream, Flow, Receive, Together
from enginesmith_client._generate import Question, inputs_from_question, outputs_to_request
from enginesmith_client._messages import (
    Classification,
    Generation,
    InferReply,
    InferRequest,
    InferResult,
    ModelMetadata,
    RankedDocument,
)
from enginesmith_client._operations import Infer
from enginesmith_client._requests import (
    NO_ENVELOPE,
    Envelope,
    check_answers_once,
    request_from_arrays,
    result_from_reply,
)
from enginesmith_client._running import counted
from enginesmith_client._server_calls import ServerCalls
from enginesmith_client._stream import Opening, Reading

_CONCURRENT_REQUESTS = 4
"""Requests of one call that are on their way at once: while one is computed, the next is there already."""


class Calls(ServerCalls):
    """The calls of one client."""

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None,
        envelope: Envelope,
        version: str,
        timeout_s: float | None,
    ) -> Flow[InferResult]:
        """The outputs of the model for ``inputs``."""

        def ask(metadata: ModelMetadata, deadline: Deadline) -> Flow[InferResult]:
            return self._send(metadata, inputs, deadline, outputs=outputs, version=version, envelope=envelope)

        return (yield from self._with_metadata(model, version, self.deadline(timeout_s), ask))

    def infer_stream(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None,
        envelope: Envelope,
        version: str,
        timeout_s: float | None,
    ) -> Opening:
        """Asks a model that may answer many times; one that answers once does so."""

        def opening(reading: Reading) -> Flow[InferReply | None]:
            def ask(metadata: ModelMetadata, deadline: Deadline) -> Flow[InferReply | None]:
                request = request_from_arrays(
                    metadata,
                    inputs,
                    outputs=outputs,
                    version=version,
                    envelope=envelope,
                    deadline=deadline,
                )
                return self._open(metadata, request, deadline, reading)

            return (yield from self._with_metadata(model, version, self.deadline(timeout_s), ask))

        return opening

    def stream(
        self,
        model: str,
        question: Question,
        *,
        envelope: Envelope,
        version: str,
        timeout_s: float | None,
        streaming: bool = True,
    ) -> Opening:
        """Asks a language model; ``streaming`` is whether it is to answer in pieces, where it can."""

        def opening(reading: Reading) -> Flow[InferReply | None]:
            started_s = time.monotonic()

            def ask(metadata: ModelMetadata, deadline: Deadline) -> Flow[InferReply | None]:
                reading.answer = Answer(metadata, question.options, started_s=started_s)
                request = request_from_arrays(
                    metadata,
                    inputs_from_question(metadata, question, streaming=streaming and metadata.decoupled),
                    outputs=outputs_to_request(metadata, question.options),
                    version=version,
                    envelope=envelope,
                    deadline=deadline,
                )
                return self._open(metadata, request, deadline, reading)

            return (yield from self._with_metadata(model, version, self.deadline(timeout_s), ask))

        return opening

    def generate(
        self,
        model: str,
        question: Question,
        *,
        envelope: Envelope,
        version: str,
        timeout_s: float | None,
    ) -> Flow[Generation]:
        """The model's whole answer."""
        reading = Reading()
        opening = self.stream(
            model, question, envelope=envelope, version=version, timeout_s=timeout_s, streaming=False
        )
        reply = yield from opening(reading)
        assert reading.answer is not None, "the request was sent, so the metadata is known"
        try:
            while reply is not None:
                reading.read_item(reply)
                reply = (yield Receive(reading.stream)) if reading.stream is not None else None
        except Exception:
            if reading.stream is not None:
                yield CloseStream(reading.stream)
            raise
        return reading.answer.generation(streamed=False)

    def embed(
        self, model: str, texts: Sequence[str], *, version: str, timeout_s: float | None
    ) -> Flow[Array]:
        """float32 [texts, width]."""
        columns = {_texts.TEXT: texts}
        batches = yield from self._infer_texts(
            model, _texts.EMBEDDING, columns, version=version, timeout_s=timeout_s
        )
        return _texts.embeddings_from_results(batches)

    def classify(
        self, model: str, texts: Sequence[str], *, version: str, timeout_s: float | None
    ) -> Flow[list[Classification]]:
        """The classes of each of ``texts``."""
        columns = {_texts.TEXT: texts}
        batches = yield from self._infer_texts(
            model, _texts.CLASSES, columns, version=version, timeout_s=timeout_s
        )
        return _texts.classifications_from_results(batches)

    def rerank(
        self, model: str, query: str, documents: Sequence[str], *, version: str, timeout_s: float | None
    ) -> Flow[list[RankedDocument]]:
        """``documents`` by their relevance to ``query``."""
        _texts.check_texts([query], what="query")
        _texts.check_texts(documents, what="documents")
        columns = {_texts.TEXT: [query] * len(documents), _texts.TEXT_PAIR: documents}
        batches = yield from self._infer_texts(
            model, _texts.SCORE, columns, version=version, timeout_s=timeout_s
        )
        return _texts.ranking_from_results(batches, documents)

    @counted
    def _infer_texts(
        self,
        model: str,
        task: _texts.TextTask,
        columns: Mapping[str, Sequence[str]],
        *,
        version: str,
        timeout_s: float | None,
    ) -> Flow[list[tuple[str, InferResult]]]:
        """For each batch of rows, in their order: the output that carries the task, and the answer."""
        for name, texts in columns.items():
            _texts.check_texts(texts, what="documents" if name == _texts.TEXT_PAIR else "texts")
        deadline = self.deadline(timeout_s)
        served = yield from self._text_model(model, version, deadline)

        def ask(batch: Mapping[str, Sequence[str]]) -> Flow[tuple[str, InferResult]]:
            def send(metadata: ModelMetadata, deadline: Deadline) -> Flow[InferResult]:
                output = _texts.output_for(metadata, task, columns)
                inputs = _texts.inputs_from_texts(metadata, batch)
                classes = output.shape[-1] if task is _texts.CLASSES else 0
                result = yield from self._send(
                    metadata, inputs, deadline, outputs=[output.name], version=version, classes=classes
                )
                rows = len(batch[_texts.TEXT])
                _texts.check_rows(result, output, texts=rows, batched=metadata.max_batch_size > 0)
                return result

            result = yield from self._with_metadata(served.name, version, deadline, send)
            return next(iter(result.outputs)), result

        batches = list(_texts.batches_of(columns, size=max(1, served.max_batch_size)))
        if len(batches) == 1:
            return [(yield from ask(batches[0]))]
        together: list[tuple[str, InferResult]] = yield Together(
            [ask(batch) for batch in batches], at_once=_CONCURRENT_REQUESTS
        )
        return together

    def _text_model(self, model: str, version: str, deadline: Deadline) -> Flow[ModelMetadata]:
        """The metadata of ``model`` if it takes texts, else of the model beside it that does."""
        metadata = yield from self._cached_metadata(model, version, deadline)
        if metadata.input(_texts.TEXT) is not None:
            return metadata
        beside = f"{model}{_texts.TEXT_MODEL_SUFFIX}"
        try:
            return (yield from self._cached_metadata(beside, version, deadline))
        except ModelNotReady as error:
            raise _texts.takes_no_text(metadata, beside) from error

    def _send(
        self,
        metadata: ModelMetadata,
        inputs: Mapping[str, Array],
        deadline: Deadline,
        *,
        version: str,
        outputs: Sequence[str] | None = None,
        envelope: Envelope = NO_ENVELOPE,
        classes: int = 0,
    ) -> Flow[InferResult]:
        check_answers_once(metadata)
        request = request_from_arrays(
            metadata,
            inputs,
            outputs=outputs,
            version=version,
            envelope=envelope,
            deadline=deadline,
            classes=classes,
        )
        perform = self.dispatcher.perform(Infer(request), deadline, idempotent=envelope.idempotent)
        return result_from_reply((yield from perform))

    def _open(
        self, metadata: ModelMetadata, request: InferRequest, deadline: Deadline, reading: Reading
    ) -> Flow[InferReply | None]:
        """The first reply to ``request``. The server refuses what it refuses here, before anything was answered."""
        if not metadata.decoupled:
            reply: InferReply = yield from self.dispatcher.perform(Infer(request), deadline)
            return reply
        reading.stream = yield from self.dispatcher.open(request, deadline)
        try:
            reading.check_open()
            first: InferReply | None = yield Receive(reading.stream)
        except TritonClientError:
            yield CloseStream(reading.stream)
            raise
        return first
