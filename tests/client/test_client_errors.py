"""Which answer of a server becomes which error. The texts are those of tritonserver 2.51."""

import pytest

from enginesmith_client import (
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
    TritonClientError,
)
from enginesmith_client._errors import Call, Status, error_from_status

CALL = Call("grpc://host:8001", "inference of model 'm'", timeout_s=2.5, model="m")
STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        ("unreachable", "Connection refused", ConnectError),
        ("deadline", "Deadline Exceeded", DeadlineExceeded),
        ("unavailable", "[request id: <id_unknown>] Exceeds maximum queue size", Overloaded),
        ("unavailable", "Request timeout expired", Overloaded),
        ("unavailable", STOPPING, ModelNotReady),
        ("not_found", "Request for unknown model: 'm' is not found", ModelNotReady),
        ("unavailable", "Request for unknown model: 'm' version 1 is not at ready state", ModelNotReady),
        ("invalid_argument", "requested model 'm' is not available", ModelNotReady),
        ("invalid_argument", "requested model version is not available for model 'm'", ModelNotReady),
        ("invalid_argument", "unexpected shape for input 'a'", InvalidInput),
        ("not_found", "no row 7 in the table of the model", ServerError),
        ("unimplemented", "not supported", ServerError),
        ("internal", "out of memory", ServerError),
        # How models that enginesmith builds name the status where the protocol has none.
        ("internal", "[INVALID_ARG] temperature is -1", InvalidInput),
        ("invalid_argument", "[UNAVAILABLE] the queue is full", Overloaded),
        ("invalid_argument", "[CANCELLED] the request was cancelled", Cancelled),
        ("internal", "[DEADLINE_EXCEEDED] the request's timeout has passed", DeadlineExceeded),
        ("invalid_argument", "[INTERNAL] the engine produced nan", ServerError),
        ("invalid_argument", "[SOMETHING] else", InvalidInput),
    ],
)
def test_an_answer_has_the_class_of_what_the_caller_can_do(
    status: Status, detail: str, kind: type[TritonClientError]
) -> None:
    error = error_from_status(status, detail, call=CALL)
    assert type(error) is kind
    assert "grpc://host:8001" in error.message
    assert "<id_unknown>" not in str(error)


def test_a_deadline_says_how_long_was_waited_and_for_what() -> None:
    error = error_from_status("deadline", "", call=CALL)
    assert error.message == "inference of model 'm' had no answer from grpc://host:8001 within 2.5 s"


def test_the_hint_is_part_of_the_text_and_apart_from_the_message() -> None:
    error = TritonClientError("it broke", hint="mend it")
    assert (str(error), error.message, error.hint) == ("it broke\n  hint: mend it", "it broke", "mend it")
    assert str(TritonClientError("it broke")) == "it broke"
