"""Streams of a decoupled model over every transport, with a real tritonserver at the other end."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from served_models import RunningServer
from transports import KINDS, Driver, await_mark, forwarding, pieces

from enginesmith_client import (
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
)
from enginesmith_client._codec import array_from_bytes
from enginesmith_client._errors import Cancelled
from enginesmith_client._messages import InferReply, InferRequest

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def target(server: RunningServer) -> RunningServer:
    assert server.load("pieces")
    return server


@pytest.fixture(scope="module", params=KINDS)
def driver(request: pytest.FixtureRequest, target: RunningServer) -> Iterator[Driver]:
    with Driver(request.param, target.url(request.param.split("-")[0])) as made:
        yield made


@pytest.fixture(scope="module")
def request_of_one(target: RunningServer) -> InferRequest:
    with Driver("http", target.url("http")) as made:
        return made.request("pieces", pieces())


def arrays(reply: InferReply) -> dict[str, list[object]]:
    return {
        tensor.name: array_from_bytes(tensor.data, tensor.datatype, tensor.shape).tolist()
        for tensor in reply.outputs
    }


@pytest.mark.parametrize("then", ["end", "final"])
def test_pieces_come_in_order_and_end_with_the_last(driver: Driver, then: str) -> None:
    stream = driver.open(driver.request("pieces", pieces(b"ab", count=3, then=then), request_id="r7"))
    replies = stream.rest()
    assert [arrays(reply)["number"] for reply in replies] == [[[0]], [[1]], [[2]]]
    assert (replies[0].model, replies[0].version, replies[0].id) == ("pieces", "1", "r7")
    assert stream.receive() is None


def test_an_answer_may_have_no_pieces(driver: Driver) -> None:
    assert driver.open(driver.request("pieces", pieces(count=0))).rest() == []


def test_pieces_have_the_same_types_shapes_and_bits_over_every_transport(driver: Driver) -> None:
    words = np.array([[b"\xff\xfe", b"a\0b", 'schön \u2028 \\ "'.encode(), b""]], np.object_)
    inputs = {**pieces(b"strange"), "stop_words": words, "temperature": np.array([[0.1]], np.float32)}
    (reply,) = driver.open(driver.request("pieces", inputs)).rest()
    assert {tensor.name: (tensor.datatype, tensor.shape) for tensor in reply.outputs} == {
        "text_output": ("BYTES", (1, 5)),
        "number": ("INT32", (1, 1)),
        "large": ("UINT64", (1, 1)),
        "done": ("BOOL", (1, 1)),
        "scores": ("FP32", (1, 3)),
    }
    values = arrays(reply)
    assert values["text_output"] == [[b"strange", *words[0]]]
    assert values["large"] == [[2**64 - 1]]
    np.testing.assert_array_equal(values["scores"], np.array([[np.nan, np.inf, 0.1]], np.float32))


def test_only_the_outputs_that_were_asked_for_come(driver: Driver) -> None:
    (reply,) = driver.open(driver.request("pieces", pieces(), outputs=["number"])).rest()
    assert [tensor.name for tensor in reply.outputs] == ["number"]


def test_a_text_of_10_mb_goes_there_and_back(driver: Driver) -> None:
    text = b"0123456789" * 1_000_000
    (reply,) = driver.open(driver.request("pieces", pieces(text), outputs=["text_output"])).rest()
    assert arrays(reply)["text_output"] == [[text]]


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("INVALID_ARG", InvalidInput),
        ("UNAVAILABLE", Overloaded),
        ("CANCELLED", Cancelled),
        ("INTERNAL", ServerError),
    ],
)
def test_an_error_that_the_model_names_is_told_apart_whenever_it_comes(
    driver: Driver, code: str, error: type[Exception], count: int
) -> None:
    request = driver.request("pieces", pieces(count=count, then=code))
    with pytest.raises(error, match="asked to fail") as caught:
        driver.open(request).rest()
    assert code not in str(caught.value)


def test_any_other_error_of_a_model_is_a_server_error_but_before_the_first_piece_over_http(
    driver: Driver,
) -> None:
    for count in (0, 1):
        error = InvalidInput if driver.protocol == "http" and not count else ServerError
        with pytest.raises(error, match="asked to fail"):
            driver.open(driver.request("pieces", pieces(count=count, then="UNSUPPORTED"))).rest()


def test_requests_that_triton_refuses_itself_are_invalid(driver: Driver) -> None:
    request = driver.request("pieces", pieces())
    wrong = request.inputs[1]
    bad = type(request)(
        **{**vars(request), "inputs": (request.inputs[0], type(wrong)("nope", "INT32", (1, 1), wrong.data))}
    )
    if driver.protocol == "grpc":
        with pytest.raises(InvalidInput, match="unexpected inference input 'nope'"):
            driver.open(bad).rest()
    unknown = type(request)(**{**vars(request), "model": "nobody"})
    with pytest.raises(ModelNotReady, match="does not serve model 'nobody'"):
        driver.open(unknown).rest()


@pytest.mark.parametrize("count", [0, 1])
def test_closing_a_stream_ends_the_request_on_the_server(driver: Driver, count: int, tmp_path: Path) -> None:
    if driver.protocol == "http" and count == 0:
        pytest.skip("Triton notices a closed HTTP connection once it has begun to answer")
    mark = tmp_path / "mark"
    stream = driver.open(driver.request("pieces", pieces(count=count, then="wait", mark=mark)))
    if count:
        assert stream.receive() is not None
    await_mark(mark, "waiting")
    stream.close()
    await_mark(mark, "cancelled")
    assert stream.receive() is None
    stream.close()


def test_a_deadline_in_mid_stream_ends_the_call_and_the_request(driver: Driver, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    stream = driver.open(driver.request("pieces", pieces(count=1, then="wait", mark=mark)), timeout_s=0.5)
    assert stream.receive() is not None
    with pytest.raises(DeadlineExceeded):
        stream.receive()
    await_mark(mark, "cancelled")


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_breaks_in_mid_stream_is_an_error(
    kind: str, target: RunningServer, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    url = target.url(kind.split("-")[0]).split("//")[1]
    with forwarding(url) as between, Driver(kind, between.url) as driver:
        stream = driver.open(driver.request("pieces", pieces(count=1, then="wait", mark=mark)))
        assert stream.receive() is not None
        between.cut()
        with pytest.raises(ConnectError) as caught:
            stream.receive()
        assert not caught.value.unsent
    await_mark(mark, "cancelled")


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_accepts_and_never_answers_cannot_hold_a_stream(
    kind: str, request_of_one: InferRequest
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with Driver(kind, url) as waiting, pytest.raises(DeadlineExceeded):
            waiting.open(request_of_one, timeout_s=0.2).rest()


@pytest.mark.parametrize("kind", ["http", "http-async"])
@pytest.mark.parametrize(
    "answer",
    [
        b'20\r\ndata: {"model_name": "pieces"',
        b"5\r\ndata:\r\n0\r\n\r\n",
        b"",
        b"zz\r\n",
    ],
)
def test_an_http_stream_that_ends_half_way_is_an_error(
    kind: str, answer: bytes, request_of_one: InferRequest
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(head + answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with Driver(kind, f"127.0.0.1:{listening.getsockname()[1]}") as asking, pytest.raises(ConnectError):
            asking.open(request_of_one, timeout_s=10).rest()
        thread.join()


@pytest.mark.parametrize("kind", ["grpc", "grpc-async"])
@pytest.mark.parametrize("connections", [1, 3])
def test_streams_go_to_the_least_busy_connection(
    kind: str, connections: int, target: RunningServer, tmp_path: Path
) -> None:
    with (
        forwarding(target.grpc_url) as between,
        Driver(kind, between.url, connections=connections) as driver,
    ):
        marks = [tmp_path / str(number) for number in range(3)]
        request = [driver.request("pieces", pieces(count=1, then="wait", mark=mark)) for mark in marks]
        streams = [driver.open(one) for one in request]
        for stream in streams:
            assert stream.receive() is not None
        assert between.connections == connections
        for stream in streams:
            stream.close()
        for mark in marks:
            await_mark(mark, "cancelled")


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_many_streams_of_many_threads_run_at_once(kind: str, target: RunningServer) -> None:
    together = threading.Barrier(16)
    with Driver(kind, target.url(kind)) as driver, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> list[object]:
            stream = driver.open(request[number])
            first = stream.receive()
            together.wait(timeout=30)
            assert first is not None
            return [arrays(reply)["text_output"] for reply in (first, *stream.rest())]

        request = [driver.request("pieces", pieces(str(number).encode(), count=4)) for number in range(16)]
        assert list(pool.map(ask, range(16))) == [[[[str(number).encode()]]] * 4 for number in range(16)]


def test_http_says_what_it_cannot_carry_to_a_decoupled_model(driver: Driver) -> None:
    if driver.protocol == "grpc":
        assert driver.open(driver.request("pieces", pieces(), parameters={"priority": 1})).rest()
        return
    with pytest.raises(InvalidInput, match="no priority for decoupled models over HTTP"):
        driver.open(driver.request("pieces", pieces(), parameters={"priority": 1}))
    two = {name: np.repeat(array, 2, axis=0) for name, array in pieces().items()}
    with pytest.raises(InvalidInput, match=r"has shape \[2, 1\]"):
        driver.open(driver.request("pieces", two))
