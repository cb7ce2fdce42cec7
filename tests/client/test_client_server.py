"""The client against a real tritonserver, over both protocols."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from served_models import RunningServer, settled

from enginesmith_client import (
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
    TritonClientError,
)

pytestmark = pytest.mark.server

ECHOED = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 2**16 - 1]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[np.inf, 6e-8, -0.0]], np.float16),
    "FP32": np.array([[np.nan, 1e-45, -np.inf]], np.float32),
    "FP64": np.array([[np.pi, 5e-324]], np.float64),
    "BF16": np.array([[1.5, -(2.0**100), np.inf]], np.float32),
    "STRING": np.array([[b"", b"a\0b\0", b"\xff\xfe", "schön".encode()]], np.object_),
}


@pytest.mark.parametrize("datatype", ECHOED)
def test_every_datatype_comes_back_as_it_was_sent(client: Client, datatype: str) -> None:
    sent = ECHOED[datatype]
    received = client.infer("echo", {f"in_{datatype}": sent}, outputs=[f"out_{datatype}"])[f"out_{datatype}"]
    assert received.dtype == sent.dtype
    np.testing.assert_array_equal(received, sent)


def test_bfloat16_arrays_are_taken_as_they_are(client: Client) -> None:
    sent = np.array([[1.5, 3.140625]], ml_dtypes.bfloat16)
    received = client.infer("echo", {"in_BF16": sent}, outputs=["out_BF16"])["out_BF16"]
    np.testing.assert_array_equal(received, sent.astype(np.float32))


def test_str_arrays_arrive_as_utf_8(client: Client) -> None:
    result = client.infer("echo", {"in_STRING": np.array([["grün", "x"]])}, outputs=["out_STRING"])
    assert result["out_STRING"].tolist() == [["grün".encode(), b"x"]]


def test_a_tensor_without_elements_is_a_tensor(client: Client) -> None:
    result = client.infer("pair", {name: np.zeros((0, 2), np.float32) for name in "ab"})
    assert {name: array.shape for name, array in result.outputs.items()} == {
        "sum": (0, 2),
        "difference": (0, 2),
    }


def test_all_outputs_come_back_unless_some_are_named(client: Client) -> None:
    inputs = {"a": np.full((1, 2), 5, np.float32), "b": np.full((1, 2), 3, np.float32)}
    assert set(client.infer("pair", inputs).outputs) == {"sum", "difference"}
    result = client.infer("pair", inputs, outputs=["difference"], request_id="r1", version="1")
    assert (set(result.outputs), result.id, result.model, result.version) == (
        {"difference"},
        "r1",
        "pair",
        "1",
    )
    assert result["difference"].tolist() == [[2.0, 2.0]]


def test_a_wrong_request_never_reaches_the_server(client: Client) -> None:
    client.infer("pair", {name: np.zeros((1, 2), np.float32) for name in "ab"})
    before = settled(lambda: client.statistics("pair"))
    with pytest.raises(InvalidInput, match="seen: \\[1, 3\\]"):
        client.infer("pair", {"a": np.zeros((1, 2), np.float32), "b": np.zeros((1, 3), np.float32)})
    assert settled(lambda: client.statistics("pair")) == before


def test_a_model_with_text_in_and_text_out_is_enough_to_generate(client: Client) -> None:
    answer = client.generate("plain_llm", "as it is", max_tokens=3)
    assert (answer.text, answer.finish_reason, answer.output_tokens) == ("as it is", None, None)
    with pytest.raises(InvalidInput, match=r"no option temperature.*\n.*options of this model: max_tokens"):
        client.generate("plain_llm", "hi", temperature=0.5)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.infer("ecko", {}),
        lambda client: client.generate("ecko", "hi"),
        lambda client: client.metadata("ecko"),
        lambda client: client.config("ecko"),
        lambda client: client.statistics("ecko"),
    ],
)
def test_an_unknown_model_is_answered_with_the_models_that_there_are(
    client: Client, ask: Callable[[Client], Any]
) -> None:
    with pytest.raises(ModelNotReady) as caught:
        ask(client)
    assert "does not serve model 'ecko'" in str(caught.value)
    assert caught.value.hint is not None
    assert "did you mean 'echo'?; ready models: " in caught.value.hint
    assert "plain_llm" in caught.value.hint


def test_an_unknown_version_is_not_ready(client: Client) -> None:
    with pytest.raises(ModelNotReady, match="version 9 is not found"):
        client.infer("pair", {}, version="9")
    with pytest.raises(ModelNotReady, match="not available for model 'pair'"):
        client.statistics("pair", version="9")
    assert client.is_ready("pair", version="1")
    assert not client.is_ready("pair", version="9")


@pytest.mark.parametrize("version", ["x", "-1", "1/../2", 1])
def test_a_version_that_is_not_a_number_is_refused(client: Client, version: Any) -> None:
    with pytest.raises(InvalidInput, match="must be digits"):
        client.infer("pair", {}, version=version)


@pytest.mark.parametrize("model", ["", "\ud800", None, ["echo"]])
def test_a_name_that_no_model_can_have_is_refused(client: Client, model: Any) -> None:
    with pytest.raises(InvalidInput):
        client.infer(model, {})


def test_a_name_that_is_no_part_of_a_url_never_reaches_another_endpoint(client: Client) -> None:
    with pytest.raises((InvalidInput, ModelNotReady)):
        client.metadata("echo/ready?")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("exception", ServerError),
        ("INTERNAL", ServerError),
        ("UNSUPPORTED", ServerError),
        ("NOT_FOUND", ServerError),
        ("INVALID_ARG", InvalidInput),
        ("UNAVAILABLE", Overloaded),
    ],
)
def test_what_a_model_raises_has_the_class_of_what_the_caller_can_do(
    client: Client, code: str, error: type[TritonClientError]
) -> None:
    with pytest.raises(
        TritonClientError, match="the model's own trouble" if code == "exception" else "asked to fail"
    ) as caught:
        client.infer("raises", {"code": np.array([code], np.object_)})
    assert type(caught.value) is error


def test_a_model_with_many_answers_is_refused_by_infer(client: Client) -> None:
    with pytest.raises(InvalidInput, match=r"decoupled.*\n.*use infer_stream"):
        client.infer("streaming", {"text_input": np.array(["hi"], np.object_)})


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """The file that the model ``gated`` waits for; there at the latest when the test ends."""
    path = tmp_path / "gate"
    yield path
    path.touch()


def pass_gate(client: Client, gate: Path, timeout_s: float = 30) -> Any:
    return client.infer("gated", {"gate": np.array([[str(gate)]], np.object_)}, timeout_s=timeout_s)[
        "gate"
    ].item()


def test_a_call_ends_at_its_deadline_and_the_client_stays_usable(client: Client, gate: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"inference of model 'gated' had no answer .* within 0\.3 s"):
        pass_gate(client, gate, timeout_s=0.3)
    gate.touch()
    assert pass_gate(client, gate) == str(gate).encode()


def test_a_full_queue_is_overload_and_the_others_get_their_answers(client: Client, gate: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(pass_gate, client, gate) for _ in range(6)]
        wait(calls, timeout=30, return_when=FIRST_EXCEPTION)
        gate.touch()
    errors = [call.exception() for call in calls]
    assert any(errors)
    assert all(error is None or isinstance(error, Overloaded) for error in errors)
    assert errors.count(None) >= 2
    assert "Exceeds maximum queue size" in str(next(error for error in errors if error))


def test_one_client_serves_many_threads(client: Client) -> None:
    def ask(number: int) -> int:
        sent = np.array([[number]], np.int64)
        return int(client.infer("echo", {"in_INT64": sent}, outputs=["out_INT64"])["out_INT64"].item())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(100))) == list(range(100))


def test_a_model_that_was_reloaded_with_other_inputs_is_asked_anew(
    client: Client, server: RunningServer
) -> None:
    config = server.repository / "changing" / "config.pbtxt"
    original = config.read_text()
    try:
        assert client.infer("changing", {"x": np.array([1], np.int32)})["y"].dtype == np.int32
        config.write_text(original.replace("TYPE_INT32", "TYPE_FP32"))
        assert server.load("changing")
        # The cached metadata refuses this one; only the server knows that it is right now.
        assert client.infer("changing", {"x": np.array([1.5], np.float32)})["y"].tolist() == [1.5]
        config.write_text(original)
        assert server.load("changing")
        # The cached metadata allows this one; the server complains, and the message is about its new interface.
        with pytest.raises(InvalidInput, match="is INT32; seen: an array of float32"):
            client.infer("changing", {"x": np.array([1.5], np.float32)})
        assert client.metadata("changing").inputs[0].datatype == "INT32"
    finally:
        config.write_text(original)
        server.load("changing")


def test_an_unloaded_model_is_not_ready_until_it_is_loaded_again(
    client: Client, server: RunningServer
) -> None:
    inputs = {"x": np.array([1], np.int32)}
    client.infer("changing", inputs)
    server.unload("changing")
    try:
        with pytest.raises(ModelNotReady):
            client.infer("changing", inputs)
        assert not client.is_ready("changing")
        loading = threading.Thread(target=server.load, args=("changing",))
        loading.start()
        client.wait_ready("changing", timeout_s=30)
        loading.join()
    finally:
        server.load("changing")
    assert client.infer("changing", inputs)["y"].tolist() == [1]


def test_why_a_model_did_not_load_is_in_every_answer_about_it(client: Client, server: RunningServer) -> None:
    assert not server.load("broken")
    try:
        (status,) = [status for status in client.models() if status.name == "broken"]
        assert status.state == "UNAVAILABLE"
        assert "the weights are missing" in status.reason
        assert not client.is_ready("broken")
        for ask in (lambda: client.infer("broken", {}), lambda: client.wait_ready("broken", timeout_s=0.3)):
            with pytest.raises(ModelNotReady, match=r"not ready: broken version 1 .*the weights are missing"):
                ask()
        with pytest.raises(ModelNotReady, match=r"the server at .* is not ready after 0\.3 s"):
            client.wait_ready(timeout_s=0.3)
    finally:
        # A server is not ready again before the model that failed was loaded; unloading it is not enough.
        weights = server.repository / "broken" / "1" / "weights"
        weights.touch()
        assert server.load("broken")
        weights.unlink()
    client.wait_ready(timeout_s=10)
    server.unload("broken")


def test_the_repository_index_lists_models_by_name(client: Client) -> None:
    statuses = {status.name: status for status in client.models()}
    assert list(statuses) == sorted(statuses)
    assert (statuses["echo"].version, statuses["echo"].state, statuses["echo"].reason) == ("1", "READY", "")
    assert (statuses["broken"].state, statuses["broken"].reason) in {
        ("UNAVAILABLE", "never loaded"),
        ("UNAVAILABLE", "unloaded"),
    }


def test_metadata_tells_batch_size_and_optional_inputs(client: Client) -> None:
    metadata = client.metadata("llm")
    assert metadata.max_batch_size == 4
    assert all(tensor.optional for tensor in metadata.inputs)
    required = [tensor.name for tensor in client.metadata("bls").inputs if not tensor.optional]
    assert required == ["text_input", "max_tokens"]
    stop_words = metadata.input("stop_words")
    assert stop_words is not None
    assert (stop_words.datatype, stop_words.shape) == ("BYTES", (-1, -1))


def test_statistics_count_requests_and_executions(client: Client) -> None:
    (before,) = settled(lambda: client.statistics("echo"))
    client.infer("echo", {"in_FP32": np.zeros((3, 1), np.float32)}, outputs=["out_FP32"])
    (after,) = settled(lambda: client.statistics("echo"))
    assert after.inference_count - before.inference_count == 3
    assert after.execution_count - before.execution_count == 1
    assert after.success.count - before.success.count == 1
    assert after.compute_infer.total_s > before.compute_infer.total_s
    assert 3 in {batch.batch_size for batch in after.batches}


def test_both_protocols_say_the_same_about_a_server(server: RunningServer) -> None:
    with Client(server.url("grpc")) as over_grpc, Client(server.url("http")) as over_http:
        assert over_grpc.models() == over_http.models()
        for model in ("echo", "gated", "llm", "pair", "streaming"):
            assert over_grpc.metadata(model) == over_http.metadata(model)
            assert over_grpc.config(model) == over_http.config(model)
            assert settled(partial(over_grpc.statistics, model)) == over_http.statistics(model)


def test_a_closed_client_says_so(server: RunningServer) -> None:
    for protocol in ("grpc", "http"):
        with Client(server.url(protocol)) as short_lived:
            short_lived.wait_ready()
        with pytest.raises(InvalidInput, match="is closed"):
            short_lived.models()
        short_lived.close()
