"""The checks that need no server: inputs against metadata, options of generate, addresses, deadlines."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from enginesmith_client import InvalidInput, ModelMetadata, TensorMetadata
from enginesmith_client._address import Address, address_from_url
from enginesmith_client._deadline import Deadline
from enginesmith_client._generate import Options, Question, inputs_from_question
from enginesmith_client._messages import InferRequest
from enginesmith_client._requests import Envelope, Sequence_, request_from_arrays

BATCHED = ModelMetadata(
    name="m",
    versions=("1",),
    platform="python",
    inputs=(TensorMetadata("x", "FP32", (-1, 2)), TensorMetadata("y", "INT32", (-1, -1), optional=True)),
    outputs=(TensorMetadata("z", "FP32", (-1, 2)),),
    max_batch_size=4,
    decoupled=False,
)
LLM = ModelMetadata(
    name="llm",
    versions=("1",),
    platform="python",
    inputs=(
        TensorMetadata("text_input", "BYTES", (-1, 1)),
        TensorMetadata("max_tokens", "INT32", (-1, 1), optional=True),
        TensorMetadata("temperature", "FP32", (-1, 1), optional=True),
        TensorMetadata("seed", "UINT64", (-1, 1), optional=True),
        TensorMetadata("stop_words", "BYTES", (-1, -1), optional=True),
        TensorMetadata("apply_chat_template", "BOOL", (-1, 1), optional=True),
    ),
    outputs=(TensorMetadata("text_output", "BYTES", (-1, 1)),),
    max_batch_size=4,
    decoupled=False,
)


def request(inputs: Mapping[str, Any], **changes: Any) -> InferRequest:
    outputs = changes.pop("outputs", None)
    return request_from_arrays(
        BATCHED,
        inputs,
        outputs=outputs,
        version="",
        envelope=Envelope(**changes),
        deadline=Deadline.after(5),
    )


def inputs_of(prompt: Any, options: Mapping[str, Any], **changes: Any) -> dict[str, np.ndarray]:
    return inputs_from_question(LLM, Question(prompt, Options(**options)), **changes)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_valid_request_carries_every_input_with_its_shape() -> None:
    made = request(
        {"y": np.zeros((3, 5), np.int32), "x": floats(3, 2)}, outputs=["z"], parameters={"priority": 1}
    )
    assert {tensor.name: (tensor.datatype, tensor.shape) for tensor in made.inputs} == {
        "x": ("FP32", (3, 2)),
        "y": ("INT32", (3, 5)),
    }
    assert made.outputs == ("z",)
    assert made.parameters["priority"] == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "needs inputs that were not given: x (FP32 [-1, 2])"),
        ({"y": np.zeros((1, 1), np.int32)}, "needs inputs that were not given: x"),
        ({"x": floats(1, 2), "yy": floats(1, 2)}, "did you mean 'y'?"),
        ({"x": floats(1, 2), "image": floats(1)}, "it has: x, y"),
        ({"x": [[1.0, 2.0]]}, "is list; it must be a numpy array"),
        ({"x": np.zeros((1, 2))}, "convert it: array.astype(np.float32)"),
        ({"x": np.zeros((1, 2), np.complex64)}, "complex64 (no Triton datatype)"),
        ({"x": floats(1, 3)}, "has shape [-1, 2] (-1: any size); seen: [1, 3]"),
        ({"x": floats(2)}, "the first dimension is the batch"),
        ({"x": floats(5, 2)}, "takes batches of 1 to 4; seen: 5"),
        ({"x": floats(0, 2)}, "takes batches of 1 to 4; seen: 0"),
        (
            {"x": floats(2, 2), "y": np.zeros((3, 1), np.int32)},
            "same batch size (first dimension); seen: x: 2, y: 3",
        ),
    ],
)
def test_inputs_that_the_model_would_refuse_are_refused_with_advice(
    inputs: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        request(inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": ["w"]},
        {"request_id": "\ud800"},
        {"parameters": {"a": None}},
        {"parameters": {"a": math.nan}},
        {"parameters": {"a": 2**63}},
        {"parameters": {"a": "\ud800"}},
        {"parameters": {"binary_data_output": False}},
        {"priority": -1},
        {"priority": True},
        {"priority": 2**31},
        {"sequence": "s"},
        {"sequence": Sequence_(0)},
        {"sequence": Sequence_("")},
        {"sequence": Sequence_(-1)},
        {"sequence": Sequence_(2**63)},
        {"sequence": Sequence_(True)},
        {"sequence": Sequence_("\ud800")},
    ],
)
def test_requests_that_cannot_be_sent_are_refused(changes: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        request({"x": floats(1, 2)}, **changes)


def test_the_deadline_goes_with_the_request_in_microseconds_unless_the_caller_has_another() -> None:
    timeout_us = request({"x": floats(1, 2)}).parameters["timeout"]
    assert isinstance(timeout_us, int)
    assert 4_000_000 < timeout_us <= 5_000_000
    assert request({"x": floats(1, 2)}, parameters={"timeout": 7}).parameters["timeout"] == 7


def test_a_sequence_travels_as_tritons_parameters() -> None:
    made = request({"x": floats(1, 2)}, sequence=Sequence_("s1", start=True), priority=2).parameters
    assert {name: made[name] for name in made if name != "timeout"} == {
        "priority": 2,
        "sequence_id": "s1",
        "sequence_start": True,
        "sequence_end": False,
    }


def test_a_scalar_for_a_batched_input_is_a_wrong_shape_and_not_a_crash() -> None:
    with pytest.raises(InvalidInput, match="has shape"):
        request({"x": floats()})


def test_a_prompt_becomes_a_batch_of_one_and_only_asked_options_are_sent() -> None:
    arrays = inputs_of("héllo", {"max_tokens": None, "chat": False})
    assert list(arrays) == ["text_input"]
    assert arrays["text_input"].tolist() == [["héllo".encode()]]


def test_options_have_the_datatypes_of_the_model() -> None:
    options = {"max_tokens": 5, "temperature": 1, "seed": 2**64 - 1, "stop": ["a", "bc"], "chat": True}
    arrays = inputs_of("", options)
    assert {
        name: (array.dtype.str, array.tolist()) for name, array in arrays.items() if name != "text_input"
    } == {
        "max_tokens": ("<i4", [[5]]),
        "temperature": ("<f4", [[1.0]]),
        "seed": ("<u8", [[2**64 - 1]]),
        "stop_words": ("|O", [[b"a", b"bc"]]),
        "apply_chat_template": ("|b1", [[True]]),
    }


def test_one_stop_word_may_be_given_as_a_string() -> None:
    assert inputs_of("", {"stop": "END"})["stop_words"].tolist() == [[b"END"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, "no option top_k (no input 'top_k')"),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648; the model takes"),
        ({"max_tokens": 3.0}, "the model takes INT32"),
        ({"max_tokens": True}, "the model takes INT32"),
        ({"seed": -1}, "seed is -1; the model takes 0 to"),
        ({"temperature": math.nan}, "temperature is nan; it must be a finite FP32 number"),
        ({"temperature": 1e39}, "it must be a finite FP32 number"),
        ({"temperature": "hot"}, "the model takes FP32"),
        ({"stop": []}, "one or more non-empty strings"),
        ({"stop": ["a", ""]}, "one or more non-empty strings"),
        ({"stop": 5}, "one or more non-empty strings"),
        ({"stop": "\udc00"}, "not valid Unicode"),
        ({"chat": 1}, "the model takes BOOL"),
    ],
)
def test_options_that_the_model_cannot_take_are_refused(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        inputs_of("hi", options)


def test_a_model_that_does_not_generate_text_is_named_as_such() -> None:
    with pytest.raises(InvalidInput, match="'m' does not generate text"):
        inputs_from_question(BATCHED, Question("hi", Options()))


@pytest.mark.parametrize("prompt", ["\ud800", b"bytes", None])
def test_a_prompt_that_is_not_text_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidInput, match="the prompt"):
        inputs_of(prompt, {})


@pytest.mark.parametrize(
    ("url", "protocol", "address"),
    [
        ("localhost:8001", None, Address("grpc", "localhost", 8001)),
        ("localhost:8000", None, Address("http", "localhost", 8000)),
        ("localhost:8000", "grpc", Address("grpc", "localhost", 8000)),
        ("localhost:9000", None, Address("grpc", "localhost", 9000)),
        ("localhost:9000", "http", Address("http", "localhost", 9000)),
        ("localhost", None, Address("grpc", "localhost", 8001)),
        ("grpc://h:1", None, Address("grpc", "h", 1)),
        ("http://h", None, Address("http", "h", 8000)),
        ("http://h:80/triton/", "http", Address("http", "h", 80, "/triton")),
        ("[::1]:8001", None, Address("grpc", "::1", 8001)),
    ],
)
def test_addresses_name_protocol_host_and_port(url: str, protocol: Any, address: Address) -> None:
    assert address_from_url(url, protocol) == address
    assert address_from_url(str(address)) == address


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("", None),
        (":8001", None),
        ("h:port", None),
        ("h:99999", None),
        ("ftp://h", None),
        ("http://h", "grpc"),
        ("h", "smtp"),
        ("grpc://h/path", None),
        ("http://h?q", None),
        ("http://u:p@h", None),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused(url: str, protocol: Any) -> None:
    with pytest.raises(InvalidInput):
        address_from_url(url, protocol)


@pytest.mark.parametrize("timeout_s", [0, -1, math.inf, math.nan, 1e9, None, True, "5"])
def test_a_call_without_an_end_cannot_be_made(timeout_s: Any) -> None:
    with pytest.raises(InvalidInput, match="timeout_s must be"):
        Deadline.after(timeout_s)
