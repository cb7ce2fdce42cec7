"""The requests of a run as bytes: encodes arrays as the client does, and asks the model whether it takes them.

What ``_text``, ``_embed`` and ``_tensors`` share. A request carries what ``Client`` sends, down to the parameter
``timeout``, which lets the server drop what nobody waits for any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from enginesmith_client._client import Client
from enginesmith_client._codec import Array
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import InvalidInput, ServerError
from enginesmith_client._grpc_messages import message_from_request, stream_message_from_request
from enginesmith_client._messages import InferResult, ModelMetadata
from enginesmith_client._requests import NO_ENVELOPE, request_from_arrays
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import RequestsPart
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import Due, Prepared, TokenCounts

Kind: TypeAlias = Literal["text", "embed", "tensors"]
Arrays: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Workload:
    """The requests of a run, gone round in their order."""

    kind: Kind
    streaming: bool
    """Whether answers come in pieces."""
    counts: TokenCounts
    requests: tuple[Prepared, ...] = field(repr=False)
    described: Mapping[str, Any]
    """What was made, for ``Run.workload``. Plain JSON values."""
    for_lengths: Callable[[int, Due], Prepared] | None = field(default=None, repr=False, compare=False)
    """The request with this number and the lengths of a trace; None: lengths mean nothing to this model."""

    def request(self, number: int, due: Due | None = None) -> Prepared:
        """The one with this number; of the lengths that ``due`` has, if any."""
        if due is not None and (due.prompt_tokens is not None or due.output_tokens is not None):
            return self._by_number(number) if self.for_lengths is None else self.for_lengths(number, due)
        return self._by_number(number)

    def _by_number(self, number: int) -> Prepared:
        return self.requests[number % len(self.requests)]


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and what the profile says of its requests."""

    client: Client
    target: Target
    metadata: ModelMetadata
    requests: RequestsPart
    seed: int
    timeout_s: float

    def prepared(self, arrays: Arrays, *, outputs: Sequence[str] = (), classes: int = 0) -> Prepared:
        """The request that carries ``arrays``. No ``outputs``: all.

        Raises:
            ProfileError: the model does not take them.
        """
        try:
            request = request_from_arrays(
                self.metadata,
                arrays,
                outputs=outputs,
                version=self.target.version,
                envelope=NO_ENVELOPE,
                deadline=Deadline.after(self.timeout_s),
                classes=classes,
            )
        except InvalidInput as error:
            raise ProfileError(error.message, hint=error.hint) from error
        request = replace(request, parameters={"timeout": int(self.timeout_s * 1e6)})
        streams = self.metadata.decoupled
        message = stream_message_from_request(request) if streams else message_from_request(request)
        rows = next(iter(arrays.values())).shape[0] if self.metadata.max_batch_size else 1
        return Prepared(message.SerializeToString(deterministic=True), streaming=streams, rows=rows)

    def first_answer(self, arrays: Arrays, *, outputs: Sequence[str] = ()) -> InferResult | None:
        """The first response to ``arrays``, after the last. None: there was no response.

        The answer is read to its end: to cancel one of the last moment can leave a Python model of tritonserver 2.51
        without a word for anybody from then on.

        Raises:
            RefusedError: the model does not take them.
            TritonClientError: anything else that keeps it from answering.
        """
        asked = self.client.infer_stream(
            self.target.model,
            arrays,
            outputs=outputs or None,
            version=self.target.version,
            timeout_s=self.timeout_s,
        )
        try:
            with asked as answers:
                responses = list(answers)
        except (InvalidInput, ServerError) as error:
            raise RefusedError(error.message, refused=isinstance(error, InvalidInput)) from error
        return responses[0] if responses else None


class RefusedError(Exception):
    """The model refused a question (``refused``), or failed at it. Becomes a ProfileError that names a key."""

    def __init__(self, words: str, *, refused: bool) -> None:
        super().__init__(words)
        self.words = words
        self.refused = refused
