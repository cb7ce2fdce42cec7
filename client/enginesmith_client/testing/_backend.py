"""The server behind the fake transports: performs operations on models in memory, as Triton would. Opens no socket.

Safe to use from several threads. Time is virtual: a latency is not slept but counted against the deadline.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from enginesmith_client._codec import Array
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import (
    Call,
    Cancelled,
    InvalidInput,
    Overloaded,
    ServerError,
    Status,
    TritonClientError,
    error_from_status,
)
from enginesmith_client._messages import InferReply, InferRequest, Parameter
from enginesmith_client._operations import (
    Infer,
    LoadModel,
    ModelReady,
    Operation,
    ReadConfig,
    ReadIndex,
    ReadMetadata,
    ReadStatistics,
    ServerReady,
    UnloadModel,
    described,
)
from enginesmith_client.testing._models import FakeModel, Refusal, metadata_json
from enginesmith_client.testing._state import Served

_STATUSES: dict[type[TritonClientError], Status] = {
    InvalidInput: "invalid_argument",
    Overloaded: "unavailable",
    Cancelled: "cancelled",
    ServerError: "internal",
}
"""The status that a model's own error travels with."""


@dataclass(eq=False)
class RecordedRequest:
    """An inference that reached the server."""

    model: str
    version: str
    id: str
    inputs: dict[str, Array]
    """As they arrived; BYTES as object arrays of bytes. Empty when the server refused them."""
    outputs: tuple[str, ...]
    parameters: dict[str, Parameter]
    timeout_s: float
    """Of the call that it belongs to."""
    ended: bool = False
    """Whether the server is done with it."""
    cancelled: bool = False
    """Whether the client closed the stream before its end."""


class Backend:
    """The models of a fake server, and what happened to them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.running = True
        self.models: dict[str, Served] = {}
        self.operations: list[Operation] = []
        self.requests: list[RecordedRequest] = []
        self.clock_s = 0.0
        self.lock = threading.RLock()
        self._spent_s: weakref.WeakKeyDictionary[Deadline, float] = weakref.WeakKeyDictionary()

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """The reply to an operation, as ``Transport.perform`` gives it."""
        call = self._call(operation, deadline)
        self._arrive(operation, call)
        try:
            if isinstance(operation, Infer):
                return self._infer(operation.request, deadline, call)
            return self._administer(operation)
        except Refusal as refusal:
            raise error_from_status(refusal.status, refusal.detail, call=call) from refusal

    def stream(
        self, request: InferRequest, deadline: Deadline
    ) -> tuple[RecordedRequest, Generator[InferReply, None, None]]:
        """A request that has arrived, and its answers, each made when it is asked for."""
        operation = Infer(request)
        call = self._call(operation, deadline)
        self._arrive(operation, call)
        record = self._record(request, deadline)
        return record, self._stream(record, request, deadline, call)

    def served(self, model: str, version: str = "") -> Served:
        """A model that is ready.

        Raises:
            Refusal: it is not, or there is none.
        """
        served = self.models.get(model)
        prefix = f"Request for unknown model: '{model}'"
        if served is None or not served.ever_loaded:
            raise Refusal("not_found", f"{prefix} is not found")
        if not served.ready:
            raise Refusal("unavailable", f"{prefix} has no available versions")
        if version and version not in served.model.versions:
            raise Refusal("not_found", f"{prefix} version {version} is not found")
        return served

    def _call(self, operation: Operation, deadline: Deadline) -> Call:
        model = getattr(operation, "model", None) or None
        return Call(self.address, described(operation), deadline.timeout_s, model)

    def _arrive(self, operation: Operation, call: Call) -> None:
        with self.lock:
            self._check_running(call)
            self.operations.append(operation)

    def _record(self, request: InferRequest, deadline: Deadline) -> RecordedRequest:
        record = RecordedRequest(
            model=request.model,
            version=request.version,
            id=request.id,
            inputs={},
            outputs=request.outputs,
            parameters=dict(request.parameters),
            timeout_s=deadline.timeout_s,
        )
        with self.lock:
            self.requests.append(record)
        return record

    def _check_running(self, call: Call) -> None:
        if not self.running:
            raise error_from_status("unreachable", "the fake server is stopped", call=call)

    def _pass_time(self, latency_s: float, deadline: Deadline, call: Call) -> None:
        """Let virtual time pass; a deadline that it goes beyond is exceeded without waiting."""
        with self.lock:
            spent_s = self._spent_s.get(deadline, 0.0)
            left_s = max(deadline.remaining_s() - spent_s, 0.0)
            passed_s = min(latency_s, left_s)
            self.clock_s += passed_s
            self._spent_s[deadline] = spent_s + passed_s
        if latency_s > left_s:
            raise error_from_status("deadline", "", call=call)

    def _infer(self, request: InferRequest, deadline: Deadline, call: Call) -> InferReply:
        record = self._record(request, deadline)
        served = self.served(request.model, request.version)
        if served.model.metadata.decoupled:
            raise Refusal(
                "unimplemented", "ModelInfer RPC doesn't support models with decoupled transaction policy"
            )
        replies = list(self._answers(served, record, request, deadline, call))
        if len(replies) != 1:
            raise ValueError(
                f"the fake model {request.model!r} gave {len(replies)} answers; add it with decoupled=True"
            )
        return replies[0]

    def _stream(
        self, record: RecordedRequest, request: InferRequest, deadline: Deadline, call: Call
    ) -> Generator[InferReply, None, None]:
        try:
            served = self.served(request.model, request.version)
            broken = error_from_status("broken", "the stream was scripted to break", call=call)
            answers = self._answers(served, record, request, deadline, call)
            for reply in served.faults.broken(answers, broken):
                yield reply
                if not self.running:
                    raise error_from_status("broken", "the fake server was stopped", call=call)
        except Refusal as refusal:
            raise error_from_status(refusal.status, refusal.detail, call=call) from refusal
        finally:
            record.ended = True

    def _answers(
        self, served: Served, record: RecordedRequest, request: InferRequest, deadline: Deadline, call: Call
    ) -> Iterator[InferReply]:
        """The answers of a model; they are timed and counted."""
        outcome: Literal["success", "fail"] = "fail"
        latency_s, began_s, batch_size = served.faults.latency_s, self.clock_s, 1
        try:
            with self.lock:
                scripted = served.faults.next_error()
            record.inputs = served.model.checked_inputs(request)
            if served.model.metadata.max_batch_size:
                batch_size = len(next(iter(record.inputs.values())))
            if scripted is not None:
                raise scripted
            for reply in _computed(served.model, request, record.inputs, call):
                self._pass_time(latency_s, deadline, call)
                yield reply
            outcome = "success"
        finally:
            record.ended = True
            served.count(batch_size=batch_size, latency_s=self.clock_s - began_s, outcome=outcome)

    def _administer(self, operation: Operation) -> Any:
        if isinstance(operation, ServerReady):
            return True
        if isinstance(operation, ModelReady):
            try:
                return bool(self.served(operation.model, operation.version))
            except Refusal:
                return False
        if isinstance(operation, ReadMetadata):
            model = self.served(operation.model, operation.version).model
            return metadata_json(model.config, model.versions)
        if isinstance(operation, ReadConfig):
            return copy.deepcopy(dict(self.served(operation.model, operation.version).model.config))
        if isinstance(operation, ReadStatistics):
            return self._statistics(operation)
        if isinstance(operation, LoadModel):
            return self._load(operation)
        if isinstance(operation, UnloadModel):
            return self._unload(operation)
        assert isinstance(operation, ReadIndex), f"no operation of a transport: {operation}"
        entries = [entry for name in sorted(self.models) for entry in self.models[name].index_json()]
        return {"models": entries}

    def _statistics(self, operation: ReadStatistics) -> dict[str, Any]:
        name = operation.model
        chosen = (
            [served for served in self.models.values() if served.ready]
            if not name
            else [self.models.get(name)]
        )
        found = [served for served in chosen if served is not None and served.ready]
        if name and not found:
            raise Refusal("invalid_argument", f"requested model '{name}' is not available")
        if operation.version and operation.version not in found[0].model.versions:
            raise Refusal("invalid_argument", f"requested model version is not available for model '{name}'")
        return {
            "model_stats": [
                served.statistics_json(version)
                for served in found
                for version in served.model.versions
                if operation.version in ("", version)
            ]
        }

    def _load(self, operation: LoadModel) -> None:
        served = self.models.get(operation.model)
        if served is None:
            raise Refusal(
                "internal", f"failed to load '{operation.model}', failed to poll from model repository"
            )
        served.ever_loaded = True
        if served.load_error is not None:
            version = max(served.model.versions, key=int)
            # What was ready before serves on.
            served.reason = "" if served.ready else served.load_error
            raise Refusal(
                "invalid_argument",
                f"load failed for model '{operation.model}': version {version} is at UNAVAILABLE state: {served.load_error};",
            )
        if operation.config is not None:
            model = served.model
            config = {**model.config, **operation.config, "name": operation.model}
            served.model = FakeModel(config, model.versions, model.answers, model.labels)
        if not served.ready or operation.config is not None:
            served.reset()
        served.ready, served.reason = True, ""

    def _unload(self, operation: UnloadModel) -> None:
        # Triton says yes to the unloading of what it does not serve.
        served = self.models.get(operation.model)
        if served is not None and served.ready:
            served.ready, served.reason, served.model = False, "unloaded", served.original


def _computed(
    model: FakeModel, request: InferRequest, inputs: dict[str, Array], call: Call
) -> Iterator[InferReply]:
    """The answers of the model's function; what it raises becomes what a client sees of a model's failure."""
    answers = None
    try:
        answers = iter(model.answers(inputs))
        while True:
            try:
                outputs = next(answers)
            except StopIteration:
                return
            except AssertionError:
                raise  # Of the test that wrote the function: it must fail the test, not the model.
            except TritonClientError as error:
                status = _STATUSES.get(type(error))
                if status is None:
                    raise
                retry_after_s = getattr(error, "retry_after_s", None)
                raise error_from_status(
                    status, error.message, call=call, retry_after_s=retry_after_s
                ) from error
            except Exception as error:  # the boundary of the model's process, as in a server
                detail = f"Failed to process the request(s) for model '{model.name}_0_0', message: {type(error).__name__}: {error}"
                raise error_from_status("internal", detail, call=call) from error
            yield model.reply(request, outputs)
    finally:
        close = getattr(answers, "close", None)
        if close is not None:
            close()
