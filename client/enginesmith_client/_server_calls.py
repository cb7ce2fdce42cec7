"""What a client asks of a server beside inference, as flows over a ``Dispatcher``.

Owns the cache of metadata and the naming of models that a server does not serve. Knows nothing of threads, tasks,
gRPC, HTTP or bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from enginesmith_client._codec import text_bytes
from enginesmith_client._deadline import Deadline
from enginesmith_client._dispatch import Dispatcher
from enginesmith_client._errors import (
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    TritonClientError,
)
from enginesmith_client._flow import Flow, Pause
from enginesmith_client._messages import (
    Json,
    ModelMetadata,
    ModelStatistics,
    ModelStatus,
    metadata_from_json,
    statistics_from_json,
    statuses_from_json,
)
from enginesmith_client._operations import (
    LoadModel,
    ModelReady,
    ReadConfig,
    ReadIndex,
    ReadMetadata,
    ReadStatistics,
    ServerReady,
    UnloadModel,
)
from enginesmith_client._running import Running, counted

_POLL_INTERVAL_S = 0.2
_UNLOAD_POLL_INTERVAL_S = 0.02
_PROBE_TIMEOUT_S = 5.0
_LISTED_MODELS = 20
_LISTING_TIMEOUT_S = 1.0

Result = TypeVar("Result")
Ask = Callable[[ModelMetadata, Deadline], Flow[Result]]


class ServerCalls:
    """The calls of one client about servers and models."""

    def __init__(self, dispatcher: Dispatcher, timeout_s: float) -> None:
        self.dispatcher = dispatcher
        self.timeout_s = Deadline.after(timeout_s).timeout_s
        self.closed = False
        self._known: dict[tuple[str, str], ModelMetadata] = {}

    @property
    def running(self) -> Running:
        """The calls that are under way; ``close`` may wait for them."""
        return self.dispatcher.running

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
        _check_model(model, version)
        perform = self.dispatcher.perform(ReadConfig(model, version), self.deadline(timeout_s))
        config: Json = yield from self._about(model, perform)
        return config

    def statistics(
        self, model: str, *, version: str, timeout_s: float | None
    ) -> Flow[tuple[ModelStatistics, ...]]:
        """Counts and durations, one entry per loaded version."""
        _check_model(model, version)
        perform = self.dispatcher.perform(ReadStatistics(model, version), self.deadline(timeout_s))
        return statistics_from_json((yield from self._about(model, perform)))

    def load(
        self,
        model: str,
        *,
        config: Json | None,
        files: Mapping[str, bytes] | None,
        timeout_s: float | None,
    ) -> Flow[None]:
        """Ends when the server has loaded the model."""
        _check_model(model, "")
        _check_override(model, config, files)
        deadline = self.deadline(timeout_s)
        try:
            yield from self.dispatcher.perform(LoadModel(model, config, dict(files or {})), deadline)
        except DeadlineExceeded as error:
            error.hint = f"{yield from self._list_models(model)}. {_SLOW_LOAD}"
            raise
        except TritonClientError as error:
            raise _control_error(error) from error.__cause__
        finally:
            self._forget(model)

    def unload(self, model: str, *, dependents: bool, timeout_s: float | None) -> Flow[None]:
        """Ends when the server has let the model go."""
        _check_model(model, "")
        deadline = self.deadline(timeout_s)
        self._forget(model)
        try:
            yield from self.dispatcher.perform(UnloadModel(model, dependents), deadline)
        except TritonClientError as error:
            raise _control_error(error) from error.__cause__
        # Triton answers when it has begun; requests on their way are finished first.
        while (yield from self._is_unloading(model, deadline)):
            if deadline.expired:
                raise DeadlineExceeded(
                    f"model {model!r} was still unloading after {deadline.timeout_s:g} s",
                    hint="it ends the requests that it has begun; look at client.statistics or give a larger timeout_s",
                )
            yield Pause(min(_UNLOAD_POLL_INTERVAL_S, deadline.remaining_s()))

    def deadline(self, timeout_s: float | None) -> Deadline:
        """The deadline of a call that begins now; refuses calls of a closed client."""
        if self.closed:
            raise InvalidInput(
                f"the client of {self.dispatcher.name} is closed", hint="make the call inside the with block"
            )
        return Deadline.after(self.timeout_s if timeout_s is None else timeout_s)

    def _is_unloading(self, model: str, deadline: Deadline) -> Flow[bool]:
        index = yield from self.dispatcher.perform(ReadIndex(), deadline)
        return any(
            status.name == model and status.state == "UNLOADING" for status in statuses_from_json(index)
        )

    def _forget(self, model: str) -> None:
        for name, version in list(self._known):
            if name == model:
                self._known.pop((name, version), None)

    @counted
    def _with_metadata(self, model: str, version: str, deadline: Deadline, ask: Ask[Result]) -> Flow[Result]:
        """Ask with the cached metadata; if that is refused and the model has changed meanwhile, once more."""
        _check_model(model, version)
        known = self._known.get((model, version))
        if known is not None:
            try:
                return (yield from self._about(model, ask(known, deadline)))
            except InvalidInput:
                if (yield from self._fetch_metadata(model, version, deadline)) == known:
                    raise
        current = yield from self._cached_metadata(model, version, deadline)
        return (yield from self._about(model, ask(current, deadline)))

    def _cached_metadata(self, model: str, version: str, deadline: Deadline) -> Flow[ModelMetadata]:
        _check_model(model, version)
        known = self._known.get((model, version))
        return known or (yield from self._fetch_metadata(model, version, deadline))

    def _fetch_metadata(self, model: str, version: str, deadline: Deadline) -> Flow[ModelMetadata]:
        def fetch() -> Flow[ModelMetadata]:
            metadata = yield from self.dispatcher.perform(ReadMetadata(model, version), deadline)
            config = yield from self.dispatcher.perform(ReadConfig(model, version), deadline)
            return metadata_from_json(metadata, config)

        _check_model(model, version)
        self._known.pop((model, version), None)
        metadata = yield from self._about(model, fetch())
        self._known[model, version] = metadata
        return metadata

    def _about(self, model: str, flow: Flow[Result]) -> Flow[Result]:
        """The result of ``flow``; when the server does not serve the model, the error says which ones it does."""
        try:
            return (yield from flow)
        except ModelNotReady as error:
            error.hint = yield from self._list_models(model)
            raise

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


def _check_override(model: str, config: Json | None, files: Mapping[str, bytes] | None) -> None:
    if files and config is None:
        raise InvalidInput(
            f"files for model {model!r} came without config",
            hint="a model that is sent takes nothing from the repository: give config=... too",
        )
    for path, content in (files or {}).items():
        if not isinstance(path, str) or not isinstance(content, bytes):
            raise InvalidInput(
                f"files must map paths (str) to contents (bytes); seen: {path!r} ({type(content).__name__})",
                hint="paths are those of the model's directory, such as '1/model.py'",
            )


def _control_error(error: TritonClientError) -> TritonClientError:
    """The error for a refusal of model control; Triton has one status for all of them."""
    if isinstance(error, (ConnectError, DeadlineExceeded, Cancelled)):
        return error
    if "is not allowed" in error.message:
        return InvalidInput(error.message, hint=_NO_CONTROL)
    unread = "failed to poll from model repository" in error.message
    return ModelNotReady(error.message, hint=_UNREAD if unread else _FAILED_LOAD)


_NO_CONTROL = "start tritonserver with --model-control-mode=explicit to let clients load and unload models"
_UNREAD = "the repository has no such model, or its configuration cannot be read; the log of the server has the reason"
_FAILED_LOAD = "a version that was ready before still serves; the log of the server has the rest"
_SLOW_LOAD = (
    "give a larger timeout_s if it needs longer. tritonserver (seen with 2.51) never finishes to load a version directory "
    "without its model file, nor any later load of that model: then restart it with the directory complete"
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
