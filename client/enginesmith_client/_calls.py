"""Every call of the client, once: flows over a ``Dispatcher``, for ``Client`` and ``AsyncClient`` alike.

Owns the cache of metadata and the naming of models that a server does not serve. Knows nothing of threads, tasks,
gRPC, HTTP or bytes.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from enginesmith_client import _generate, _texts
from enginesmith_client._codec import Array, text_bytes
from enginesmith_client._deadline import Deadline
from enginesmith_client._dispatch import Dispatcher
from enginesmith_client._errors import (
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    TritonClientError,
)
from enginesmith_client._flow import Flow, Pause, Together
from enginesmith_client._messages import (
    Classification,
    Generation,
    InferResult,
    Json,
    ModelMetadata,
    ModelStatistics,
    ModelStatus,
    Parameter,
    RankedDocument,
    metadata_from_json,
    statistics_from_json,
    statuses_from_json,
)
from enginesmith_client._operations import (
    Infer,
    ModelReady,
    ReadConfig,
    ReadIndex,
    ReadMetadata,
    ReadStatistics,
    ServerReady,
)
from enginesmith_client._requests import request_from_arrays, result_from_reply

_POLL_INTERVAL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
_LISTED_MODELS = 20
_LISTING_TIMEOUT_S = 1.0
_CONCURRENT_REQUESTS = 4
"""Requests of one call that are on their way at once: while one is computed, the next is there already."""

Result = TypeVar("Result")
Ask = Callable[[ModelMetadata, Deadline], Flow[Result]]


class Calls:
    """The calls of one client."""

    def __init__(self, dispatcher: Dispatcher, timeout_s: float) -> None:
        self.dispatcher = dispatcher
        self.timeout_s = Deadline.after(timeout_s).timeout_s
        self.closed = False
        self._known: dict[tuple[str, str], ModelMetadata] = {}

    def generate(
        self,
        model: str,
        prompt: str,
        *,
        options: Mapping[str, _generate.Option],
        version: str,
        timeout_s: float | None,
    ) -> Flow[Generation]:
        """The model's answer to ``prompt``."""
        started_s = time.monotonic()

        def ask(metadata: ModelMetadata, deadline: Deadline) -> Flow[InferResult]:
            inputs = _generate.inputs_from_prompt(metadata, prompt, options=options)
            outputs = _generate.outputs_to_request(metadata)
            return self._send(metadata, inputs, deadline, outputs=outputs, version=version)

        result = yield from self._with_metadata(model, version, self.deadline(timeout_s), ask)
        return _generate.generation_from_result(result, latency_s=time.monotonic() - started_s)

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

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None,
        version: str,
        timeout_s: float | None,
        request_id: str,
        parameters: Mapping[str, Parameter] | None,
    ) -> Flow[InferResult]:
        """The outputs of the model for ``inputs``."""

        def ask(metadata: ModelMetadata, deadline: Deadline) -> Flow[InferResult]:
            return self._send(
                metadata,
                inputs,
                deadline,
                outputs=outputs,
                version=version,
                request_id=request_id,
                parameters=parameters,
            )

        return (yield from self._with_metadata(model, version, self.deadline(timeout_s), ask))

    def is_ready(self, model: str | None, *, version: str, timeout_s: float | None) -> Flow[bool]:
        """Whether the server, or one model on it, takes requests."""
        return (yield from self._probe(model, version, self.deadline(timeout_s)))

    def wait_ready(self, model: str | None, *, version: str, timeout_s: float | None) -> Flow[None]:
        """Ends as soon as the server, or one model, takes requests."""
        deadline = self.deadline(timeout_s)
        unreached: TritonClientError | None = None
        while not deadline.expired:
            try:
                probe = Deadline.after(min(_PROBE_TIMEOUT_S, deadline.remaining_s()))
                if (yield from self._probe(model, version, probe)):
                    return
                unreached = None
            except (ConnectError, DeadlineExceeded) as error:
                unreached = error
            yield Pause(min(_POLL_INTERVAL_S, deadline.remaining_s()))
        waited = f"after {deadline.timeout_s:g} s of waiting"
        if unreached is not None:
            raise ConnectError(f"{waited}, {unreached.message}", hint=unreached.hint) from unreached
        what = f"model {model!r}" if model else "the server"
        listing = yield from self._list_models(model)
        raise ModelNotReady(f"{what} at {self.dispatcher.name} is not ready {waited}", hint=listing)

    def models(self, *, timeout_s: float | None) -> Flow[list[ModelStatus]]:
        """Every version of every model in the server's repository."""
        return statuses_from_json((yield from self.dispatcher.perform(ReadIndex(), self.deadline(timeout_s))))

    def metadata(self, model: str, *, version: str, timeout_s: float | None) -> Flow[ModelMetadata]:
        """The interface of the model, as the server has it now."""
        return (yield from self._fetch_metadata(model, version, self.deadline(timeout_s)))

    def config(self, model: str, *, version: str, timeout_s: float | None) -> Flow[Json]:
        """The model configuration as JSON values."""
        perform = self.dispatcher.perform(ReadConfig(model, version), self.deadline(timeout_s))
        config: Json = yield from self._about(model, version, perform)
        return config

    def statistics(
        self, model: str, *, version: str, timeout_s: float | None
    ) -> Flow[tuple[ModelStatistics, ...]]:
        """Counts and durations, one entry per loaded version."""
        perform = self.dispatcher.perform(ReadStatistics(model, version), self.deadline(timeout_s))
        return statistics_from_json((yield from self._about(model, version, perform)))

    def deadline(self, timeout_s: float | None) -> Deadline:
        """The deadline of a call that begins now; refuses calls of a closed client."""
        if self.closed:
            raise InvalidInput(
                f"the client of {self.dispatcher.name} is closed", hint="make the call inside the with block"
            )
        return Deadline.after(self.timeout_s if timeout_s is None else timeout_s)

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
        request_id: str = "",
        parameters: Mapping[str, Parameter] | None = None,
        classes: int = 0,
    ) -> Flow[InferResult]:
        request = request_from_arrays(
            metadata,
            inputs,
            outputs=outputs,
            version=version,
            request_id=request_id,
            parameters=parameters,
            classes=classes,
        )
        return result_from_reply((yield from self.dispatcher.perform(Infer(request), deadline)))

    def _with_metadata(self, model: str, version: str, deadline: Deadline, ask: Ask[Result]) -> Flow[Result]:
        """Ask with the cached metadata; if that is refused and the model has changed meanwhile, once more."""
        _check_model(model, version)
        known = self._known.get((model, version))
        if known is not None:
            try:
                return (yield from self._about(model, version, ask(known, deadline)))
            except InvalidInput:
                if (yield from self._fetch_metadata(model, version, deadline)) == known:
                    raise
        current = yield from self._cached_metadata(model, version, deadline)
        return (yield from self._about(model, version, ask(current, deadline)))

    def _cached_metadata(self, model: str, version: str, deadline: Deadline) -> Flow[ModelMetadata]:
        known = self._known.get((model, version))
        return known or (yield from self._fetch_metadata(model, version, deadline))

    def _fetch_metadata(self, model: str, version: str, deadline: Deadline) -> Flow[ModelMetadata]:
        def fetch() -> Flow[ModelMetadata]:
            metadata = yield from self.dispatcher.perform(ReadMetadata(model, version), deadline)
            config = yield from self.dispatcher.perform(ReadConfig(model, version), deadline)
            return metadata_from_json(metadata, config)

        self._known.pop((model, version), None)
        metadata = yield from self._about(model, version, fetch())
        self._known[model, version] = metadata
        return metadata

    def _about(self, model: str, version: str, flow: Flow[Result]) -> Flow[Result]:
        """The result of ``flow``; when the server does not serve the model, the error says which ones it does."""
        _check_model(model, version)
        try:
            return (yield from flow)
        except ModelNotReady as error:
            listing = yield from self._list_models(model)
            raise ModelNotReady(error.message, hint=listing) from error.__cause__

    def _list_models(self, wanted: str | None) -> Flow[str]:
        """What the server serves, in words. Runs while an error is being made, so it raises none of its own."""
        try:
            return _listing((yield from self.models(timeout_s=_LISTING_TIMEOUT_S)), wanted)
        except TritonClientError as error:
            return f"the list of the server's models could not be read: {error.message}"

    def _probe(self, model: str | None, version: str, deadline: Deadline) -> Flow[bool]:
        if model is None:
            return bool((yield from self.dispatcher.perform(ServerReady(), deadline)))
        _check_model(model, version)
        return bool((yield from self.dispatcher.perform(ModelReady(model, version), deadline)))


def _check_model(model: Any, version: Any) -> None:
    if not isinstance(model, str) or not model:
        raise InvalidInput(f"a model is named by a non-empty str; seen: {model!r}")
    text_bytes(model, what="the name of the model")
    if not isinstance(version, str) or (version and not (version.isascii() and version.isdigit())):
        raise InvalidInput(
            f"version is {version!r}; it must be digits in a str, such as '1', or '' to let the server choose"
        )


def _listing(statuses: Sequence[ModelStatus], wanted: str | None) -> str:
    ready = list(dict.fromkeys(status.name for status in statuses if status.state == "READY"))
    others = [status for status in statuses if status.state != "READY"]
    close = difflib.get_close_matches(wanted, ready, n=1) if wanted and wanted not in ready else []
    parts = [f"did you mean {close[0]!r}?"] if close else []
    parts.append(f"ready models: {_shortened(ready) or 'none'}")
    if others:
        # The wanted model first: its reason is what the reader looks for.
        others.sort(key=lambda status: status.name != wanted)
        parts.append("not ready: " + _shortened([_state(status) for status in others]))
    return "; ".join(parts)


def _state(status: ModelStatus) -> str:
    reason = status.reason.splitlines()[0] if status.reason else ""
    name = f"{status.name} version {status.version}" if status.version else status.name
    return f"{name} ({status.state}: {reason})" if reason else f"{name} ({status.state})"


def _shortened(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED_MODELS
    return ", ".join(names[:_LISTED_MODELS]) + (f" and {rest} more" if rest > 0 else "")
