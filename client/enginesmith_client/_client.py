"""The synchronous client: a thin shell that asks a transport and lets the pure modules do the rest.

Owns the deadline of a call, the cache of metadata, and the naming of models that a server does not serve.
Knows nothing of gRPC, HTTP or bytes.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from enginesmith_client import _generate, _texts
from enginesmith_client._address import Protocol, address_from_url
from enginesmith_client._codec import Array, text_bytes
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import (
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    TritonClientError,
)
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
from enginesmith_client._requests import request_from_arrays, result_from_reply
from enginesmith_client._transport import TRANSPORTS

_POLL_INTERVAL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
_LISTED_MODELS = 20
_LISTING_TIMEOUT_S = 1.0
_CONCURRENT_REQUESTS = 4
"""Requests of one call that are on their way at once: while one is computed, the next is there already."""

Result = TypeVar("Result")


class Client:
    """A connection to one Triton server, for use as a context manager or until ``close``.

    Connects on the first call. Safe to use from several threads. Every call is over within its ``timeout_s``
    (default: the client's), which covers all messages that the call needs; only finding out for an error message
    which models there are may add a second. All errors are ``TritonClientError``.
    """

    def __init__(self, url: str, *, protocol: Protocol | None = None, timeout_s: float = 60.0) -> None:
        """``url`` is ``grpc://host:port``, ``http://host:port/path`` or ``host:port`` (gRPC unless the port is 8000)."""
        self._address = address_from_url(url, protocol)
        self._timeout_s = Deadline.after(timeout_s).timeout_s
        self._transport = TRANSPORTS[self._address.protocol](self._address)
        self._known: dict[tuple[str, str], ModelMetadata] = {}
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({str(self._address)!r}, timeout_s={self._timeout_s:g})"

    @property
    def url(self) -> str:
        """The server's address, with its protocol and port."""
        return str(self._address)

    def close(self) -> None:
        """Close the connection. Every later call raises ``InvalidInput``."""
        self._closed = True
        self._transport.close()

    def generate(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        chat: bool = False,
        version: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        """The model's continuation of ``prompt``, or with ``chat`` its answer to it as a user's message.

        Options left out are the model's defaults. An option that the model does not have raises ``InvalidInput``.
        """
        started_s = time.monotonic()
        options: dict[str, _generate.Option] = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "chat": True if chat else None,
        }

        def ask(metadata: ModelMetadata, deadline: Deadline) -> InferResult:
            inputs = _generate.inputs_from_prompt(metadata, prompt, options=options)
            outputs = _generate.outputs_to_request(metadata)
            return self._send(metadata, inputs, deadline, outputs=outputs, version=version)

        result = self._with_metadata(model, version, self._deadline(timeout_s), ask)
        return _generate.generation_from_result(result, latency_s=time.monotonic() - started_s)

    def embed(
        self, model: str, texts: Sequence[str], *, version: str = "", timeout_s: float | None = None
    ) -> Array:
        """The vectors of ``texts``: float32 [texts, width], in their order.

        Sent in requests of at most the model's ``max_batch_size``, several at once; when one fails, the call does.
        ``model`` takes texts; for one that takes tokens, ``<model>-text`` is asked where the server has it.
        """
        batches = self._infer_texts(
            model, _texts.EMBEDDING, {_texts.TEXT: texts}, version=version, timeout_s=timeout_s
        )
        return _texts.embeddings_from_results(batches)

    def classify(
        self, model: str, texts: Sequence[str], *, version: str = "", timeout_s: float | None = None
    ) -> list[Classification]:
        """The classes of each of ``texts``. Sent as ``embed`` sends."""
        batches = self._infer_texts(
            model, _texts.CLASSES, {_texts.TEXT: texts}, version=version, timeout_s=timeout_s
        )
        return _texts.classifications_from_results(batches)

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
        _texts.check_texts([query], what="query")
        _texts.check_texts(documents, what="documents")
        columns = {_texts.TEXT: [query] * len(documents), _texts.TEXT_PAIR: documents}
        batches = self._infer_texts(model, _texts.SCORE, columns, version=version, timeout_s=timeout_s)
        return _texts.ranking_from_results(batches, documents)

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
    ) -> InferResult:
        """The outputs of the model (all, or those named in ``outputs``) for ``inputs``.

        Arrays carry the batch dimension if the model has one. Names, dtypes and shapes are checked against the
        model's metadata before anything is sent; nothing is converted but float32 for BF16 inputs.
        ``parameters`` are Triton's request parameters (``priority``, ``timeout`` in microseconds, ``sequence_id``, ...).
        """

        def ask(metadata: ModelMetadata, deadline: Deadline) -> InferResult:
            return self._send(
                metadata,
                inputs,
                deadline,
                outputs=outputs,
                version=version,
                request_id=request_id,
                parameters=parameters,
            )

        return self._with_metadata(model, version, self._deadline(timeout_s), ask)

    def is_ready(
        self, model: str | None = None, *, version: str = "", timeout_s: float | None = None
    ) -> bool:
        """Whether the server, or one model on it, takes requests. Raises ``ConnectError`` when no server answers."""
        return self._probe(model, version, self._deadline(timeout_s))

    def wait_ready(
        self, model: str | None = None, *, version: str = "", timeout_s: float | None = None
    ) -> None:
        """Return as soon as the server (every model that it must serve), or one model, takes requests.

        Neither a server that is not up yet nor a model that is unknown or failed to load ends the waiting: both
        can come in time. When the time is up, raises ``ConnectError`` if no server answered the last probe, else
        ``ModelNotReady`` with the server's own reasons.
        """
        deadline = self._deadline(timeout_s)
        unreached: TritonClientError | None = None
        while not deadline.expired:
            try:
                if self._probe(model, version, Deadline.after(min(_PROBE_TIMEOUT_S, deadline.remaining_s()))):
                    return
                unreached = None
            except (ConnectError, DeadlineExceeded) as error:
                unreached = error
            time.sleep(min(_POLL_INTERVAL_S, deadline.remaining_s()))
        waited = f"after {deadline.timeout_s:g} s of waiting"
        if unreached is not None:
            raise ConnectError(f"{waited}, {unreached.message}", hint=unreached.hint) from unreached
        what = f"model {model!r}" if model else "the server"
        raise ModelNotReady(f"{what} at {self._address} is not ready {waited}", hint=self._list_models(model))

    def models(self, *, timeout_s: float | None = None) -> list[ModelStatus]:
        """Every version of every model in the server's repository, ready or not."""
        return statuses_from_json(self._transport.index(self._deadline(timeout_s)))

    def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """The inputs and outputs of the model, as the server has them now."""
        return self._fetch_metadata(model, version, self._deadline(timeout_s))

    def config(self, model: str, *, version: str = "", timeout_s: float | None = None) -> Json:
        """The model configuration (``config.pbtxt`` with the server's defaults filled in) as JSON values."""
        deadline = self._deadline(timeout_s)
        return self._about(model, version, lambda: self._transport.config(model, version, deadline))

    def statistics(
        self, model: str, *, version: str = "", timeout_s: float | None = None
    ) -> tuple[ModelStatistics, ...]:
        """Counts and durations since each version of the model was loaded; one entry per loaded version."""
        deadline = self._deadline(timeout_s)
        return statistics_from_json(
            self._about(model, version, lambda: self._transport.statistics(model, version, deadline))
        )

    def _infer_texts(
        self,
        model: str,
        task: _texts.TextTask,
        columns: Mapping[str, Sequence[str]],
        *,
        version: str,
        timeout_s: float | None,
    ) -> list[tuple[str, InferResult]]:
        """For each batch of rows, in their order: the output that carries the task, and the answer."""
        for name, texts in columns.items():
            _texts.check_texts(texts, what="documents" if name == _texts.TEXT_PAIR else "texts")
        deadline = self._deadline(timeout_s)
        served = self._text_model(model, version, deadline)

        def ask(batch: Mapping[str, Sequence[str]]) -> tuple[str, InferResult]:
            def send(metadata: ModelMetadata, deadline: Deadline) -> InferResult:
                output = _texts.output_for(metadata, task, columns)
                inputs = _texts.inputs_from_texts(metadata, batch)
                classes = output.shape[-1] if task is _texts.CLASSES else 0
                result = self._send(
                    metadata, inputs, deadline, outputs=[output.name], version=version, classes=classes
                )
                rows = len(batch[_texts.TEXT])
                _texts.check_rows(result, output, texts=rows, batched=metadata.max_batch_size > 0)
                return result

            result = self._with_metadata(served.name, version, deadline, send)
            return next(iter(result.outputs)), result

        batches = list(_texts.batches_of(columns, size=max(1, served.max_batch_size)))
        if len(batches) == 1:
            return [ask(batches[0])]
        with ThreadPoolExecutor(min(_CONCURRENT_REQUESTS, len(batches))) as pool:
            answers = [pool.submit(ask, batch) for batch in batches]
            try:
                return [answer.result() for answer in answers]
            finally:
                for answer in answers:
                    answer.cancel()

    def _text_model(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """The metadata of ``model`` if it takes texts, else of the model beside it that does."""
        metadata = self._known.get((model, version)) or self._fetch_metadata(model, version, deadline)
        if metadata.input(_texts.TEXT) is not None:
            return metadata
        beside = f"{model}{_texts.TEXT_MODEL_SUFFIX}"
        try:
            return self._known.get((beside, version)) or self._fetch_metadata(beside, version, deadline)
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
    ) -> InferResult:
        request = request_from_arrays(
            metadata,
            inputs,
            outputs=outputs,
            version=version,
            request_id=request_id,
            parameters=parameters,
            classes=classes,
        )
        return result_from_reply(self._transport.infer(request, deadline))

    def _with_metadata(
        self,
        model: str,
        version: str,
        deadline: Deadline,
        ask: Callable[[ModelMetadata, Deadline], InferResult],
    ) -> InferResult:
        """Ask with the cached metadata; if that is refused and the model has changed meanwhile, once more."""
        _check_model(model, version)
        known = self._known.get((model, version))
        if known is not None:
            try:
                return self._about(model, version, lambda: ask(known, deadline))
            except InvalidInput:
                if self._fetch_metadata(model, version, deadline) == known:
                    raise
        current = self._known.get((model, version)) or self._fetch_metadata(model, version, deadline)
        return self._about(model, version, lambda: ask(current, deadline))

    def _fetch_metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        def fetch() -> ModelMetadata:
            metadata = self._transport.metadata(model, version, deadline)
            return metadata_from_json(metadata, self._transport.config(model, version, deadline))

        self._known.pop((model, version), None)
        self._known[model, version] = metadata = self._about(model, version, fetch)
        return metadata

    def _about(self, model: str, version: str, act: Callable[[], Result]) -> Result:
        """The result of ``act``; when the server does not serve the model, the error says which ones it does."""
        _check_model(model, version)
        try:
            return act()
        except ModelNotReady as error:
            raise ModelNotReady(error.message, hint=self._list_models(model)) from error.__cause__

    def _list_models(self, wanted: str | None) -> str:
        """What the server serves, in words. Runs while an error is being made, so it raises none of its own."""
        try:
            return _listing(self.models(timeout_s=_LISTING_TIMEOUT_S), wanted)
        except TritonClientError as error:
            return f"the list of the server's models could not be read: {error.message}"

    def _probe(self, model: str | None, version: str, deadline: Deadline) -> bool:
        if model is None:
            return self._transport.server_ready(deadline)
        _check_model(model, version)
        return self._transport.model_ready(model, version, deadline)

    def _deadline(self, timeout_s: float | None) -> Deadline:
        if self._closed:
            raise InvalidInput(
                f"the client of {self._address} is closed", hint="make the call inside the with block"
            )
        return Deadline.after(self._timeout_s if timeout_s is None else timeout_s)


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
