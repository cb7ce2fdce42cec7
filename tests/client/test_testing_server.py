"""``enginesmith_client.testing``: scripts, faults, records, and what it is made of. What it shares with Triton is in the conformance test."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from enginesmith_client import (
    Cancelled,
    Client,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
)
from enginesmith_client.testing import Answer, FakeServer, Prompt, TensorMetadata

X = np.ones((2, 3), np.float32)
FP32_ROWS = (-1, 3)


@pytest.fixture
def server() -> FakeServer:
    server = FakeServer()
    server.add_model(
        "double",
        lambda inputs: {"y": inputs["x"] * 2},
        inputs=[TensorMetadata("x", "FP32", FP32_ROWS)],
        outputs=[TensorMetadata("y", "FP32", FP32_ROWS)],
        max_batch_size=4,
    )
    server.add_llm("llm", "one two three four five")
    return server


def test_a_model_is_a_function_of_arrays_and_its_requests_are_recorded(server: FakeServer) -> None:
    result = server.client().infer("double", {"x": X}, request_id="r1", parameters={"tenant": "a"})
    np.testing.assert_array_equal(result["y"], X * 2)
    (request,) = server.requests
    assert (request.model, request.id, request.parameters["tenant"]) == ("double", "r1", "a")
    np.testing.assert_array_equal(request.inputs["x"], X)
    assert request.ended
    assert not request.cancelled


def test_what_the_client_refuses_never_reaches_the_server(server: FakeServer) -> None:
    with pytest.raises(InvalidInput, match="must be a numpy array"):
        server.client().infer("double", {"x": [1.0]})  # type: ignore[dict-item]
    assert server.requests == []
    assert [type(one).__name__ for one in server.operations] == ["ReadMetadata", "ReadConfig"]


def test_statistics_count_rows_executions_failures_and_virtual_time(server: FakeServer) -> None:
    client = server.client()
    server.set_latency("double", 0.5)
    client.infer("double", {"x": X})
    client.infer("double", {"x": X[:1]})
    server.fail("double", ServerError("NaN in the scores"))
    with pytest.raises(ServerError, match="NaN in the scores"):
        client.infer("double", {"x": X})
    (seen,) = client.statistics("double")
    assert (seen.inference_count, seen.execution_count, seen.fail.count) == (3, 2, 1)
    assert seen.compute_infer.mean_s == server.clock_s / 2 == 0.5
    assert [batch.batch_size for batch in seen.batches] == [1, 2]


def test_a_latency_beyond_the_deadline_ends_the_call_without_waiting(server: FakeServer) -> None:
    client = server.client(timeout_s=30)
    server.set_latency("double", 1e6)
    with pytest.raises(DeadlineExceeded, match="within 30 s"):
        client.infer("double", {"x": X})
    assert 29 < server.clock_s <= 30


def test_latencies_of_a_stream_add_up_against_its_deadline(server: FakeServer) -> None:
    server.set_latency("llm", 10.0)
    pieces = []
    with pytest.raises(DeadlineExceeded):
        pieces += [delta.text for delta in _noting(server.client().stream("llm", "x", timeout_s=35), pieces)]
    assert pieces == ["one", " two", " three"]


def _noting(stream: Iterator, pieces: list[str]) -> Iterator:
    for delta in stream:
        pieces.append(delta.text)
        yield delta


def test_an_overloaded_model_has_a_full_queue_so_many_times(server: FakeServer) -> None:
    with server.client() as client:
        server.overload("double", times=50, retry_after_s=1e6)
        with pytest.raises(Overloaded, match="Exceeds maximum queue size") as caught:
            client.infer("double", {"x": X})
        assert caught.value.retry_after_s == 1e6
        server.overload("llm", times=1)
        assert client.generate("llm", "x", timeout_s=20).text.endswith("five")


def test_a_stopped_server_is_not_reached_and_comes_back_as_it_was(server: FakeServer) -> None:
    client = server.client(timeout_s=0.2)
    server.stop()
    with pytest.raises(ConnectError, match="the fake server is stopped") as caught:
        client.infer("double", {"x": X})
    assert caught.value.unsent
    server.start()
    assert client.infer("double", {"x": X})["y"].shape == (2, 3)


def test_readiness_changes_by_script_and_by_the_client(server: FakeServer) -> None:
    client = server.client()
    server.set_ready("double", False, reason="out of memory")
    with pytest.raises(ModelNotReady, match="out of memory"):
        client.infer("double", {"x": X})
    client.load("double")
    assert client.is_ready("double")
    client.unload("double")
    assert [one.reason for one in client.models() if one.name == "double"] == ["unloaded"]
    server.fail_loading("double", "Internal: the weights are missing")
    with pytest.raises(ModelNotReady, match="the weights are missing"):
        client.load("double")
    assert not client.is_ready("double")


def test_a_model_that_is_ready_serves_on_when_it_cannot_be_loaded_again(server: FakeServer) -> None:
    client = server.client()
    server.fail_loading("double", "Internal: the weights are missing")
    with pytest.raises(ModelNotReady, match="the weights are missing"):
        client.load("double")
    assert client.is_ready("double")


def test_a_stream_breaks_after_so_many_pieces(server: FakeServer) -> None:
    server.break_stream("llm", after=2)
    pieces: list[str] = []
    with pytest.raises(ConnectError, match="scripted to break"):
        list(_noting(server.client().stream("llm", "x"), pieces))
    assert pieces == ["one", " two"]
    assert len(list(server.client().stream("llm", "x"))) == 5


def test_a_stream_that_is_closed_early_is_recorded_as_cancelled(server: FakeServer) -> None:
    with server.client().stream("llm", "x") as stream:
        assert next(stream).text == "one"
        assert not server.requests[-1].cancelled
    assert server.requests[-1].cancelled
    assert list(server.client().stream("llm", "x"))[-1].finish_reason == "stop"
    assert not server.requests[-1].cancelled


def test_a_cancelled_task_cancels_its_stream(server: FakeServer) -> None:
    async def read() -> None:
        async with server.async_client() as client:
            first = asyncio.Event()

            async def consume() -> None:
                async for _ in client.stream("llm", "x"):
                    first.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(consume())
            await first.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(read())
    assert server.requests[-1].cancelled


def test_a_language_model_follows_its_script(server: FakeServer) -> None:
    def script(prompt: Prompt) -> Answer:
        roles = [message["role"] for message in prompt.messages]
        return Answer(f"{prompt.text} {roles} {prompt.options.get('seed')}", prompt_tokens=42)

    server.add_llm("scripted", script)
    client = server.client()
    answer = client.chat(
        "scripted", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], seed=7
    )
    assert answer.text == "Hi ['system', 'user'] 7"
    assert (answer.prompt_tokens, answer.finish_reason) == (42, "stop")
    assert client.generate("scripted", "Hello", chat=True).text == "Hello ['user'] None"


def test_several_answers_come_in_turn_and_the_last_one_stays(server: FakeServer) -> None:
    server.add_llm("turns", ["first", Answer(["sec", "ond"], finish_reason="length")])
    client = server.client()
    assert [client.generate("turns", "x").text for _ in range(3)] == ["first", "second", "second"]
    assert client.generate("turns", "x").finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "text", "reason", "tokens"),
    [
        ({}, "one two three four five", "stop", 5),
        ({"max_tokens": 2}, "one two", "length", 2),
        ({"stop": ["ree", "four"]}, "one two th", "stop", 3),
        ({"stop": "nowhere", "max_tokens": 9}, "one two three four five", "stop", 5),
    ],
)
def test_streams_and_whole_answers_end_alike(
    server: FakeServer, options: Mapping, text: str, reason: str, tokens: int
) -> None:
    client = server.client()
    whole = client.generate("llm", "a b c", **options)
    deltas = list(client.stream("llm", "a b c", **options))
    assert whole.text == "".join(delta.text for delta in deltas) == text
    assert whole.finish_reason == deltas[-1].finish_reason == reason
    assert whole.output_tokens == deltas[-1].output_tokens == tokens
    assert whole.prompt_tokens == 3


def test_log_probabilities_come_with_the_tokens(server: FakeServer) -> None:
    server.add_llm("scored", Answer(["a", "b"], logprobs=[-0.25, -2.0]))
    scored = server.client().generate("scored", "x", logprobs=True).logprobs
    assert scored is not None
    assert [(one.token, one.logprob) for one in scored] == [(b"a", -0.25), (b"b", -2.0)]


def test_the_vector_of_a_text_depends_on_it_alone(server: FakeServer) -> None:
    server.add_embedder("encoder", width=5, max_batch_size=2)
    client = server.client()
    vectors = client.embed("encoder", ["a", "b", "a"])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[1], vector_of("b", width=5))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def vector_of(text: str, *, width: int) -> np.ndarray:
    server = FakeServer()
    server.add_embedder("another", width=width)
    return server.client().embed("another", [text])[0]


def test_classes_and_rankings_are_scripted(server: FakeServer) -> None:
    server.add_classifier(
        "mood", lambda text: {"glad" if "!" in text else "calm": 1.0}, labels=["calm", "glad"]
    )
    server.add_reranker("length", lambda query, document: len(document) - len(query))
    client = server.client()
    assert [one.label for one in client.classify("mood", ["a", "b!"])] == ["calm", "glad"]
    assert [one.index for one in client.rerank("length", "q", ["a", "abc", "ab"])] == [1, 2, 0]


def test_a_models_own_errors_arrive_as_what_they_are(server: FakeServer) -> None:
    raised: list[Exception] = [
        InvalidInput("too long"),
        Overloaded("busy", retry_after_s=1e6),
        Cancelled("gone"),
        KeyError("k"),
    ]

    def failing(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        raise raised[0]

    tensor = TensorMetadata("x", "FP32", FP32_ROWS)
    server.add_model("failing", failing, inputs=[tensor], outputs=[tensor])
    client = server.client(timeout_s=5)
    for expected in (InvalidInput, Overloaded, Cancelled, ServerError):
        with pytest.raises(expected):
            client.infer("failing", {"x": X})
        raised.pop(0)


def test_an_assertion_in_a_models_function_fails_the_test_and_not_the_model(server: FakeServer) -> None:
    def checking(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        raise AssertionError("the code under test sent ones")

    tensor = TensorMetadata("x", "FP32", FP32_ROWS)
    server.add_model("checking", checking, inputs=[tensor], outputs=[tensor])
    with pytest.raises(AssertionError, match="sent ones"):
        server.client().infer("checking", {"x": X})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"z": X}, "answers with the output 'z'"),
        ({"y": X.astype(np.float64)}, "float64"),
        ({"y": X[:, :1]}, r"as float32 \[2, 1\]; it was added as FP32 \[-1, 3\]"),
    ],
)
def test_a_fake_that_contradicts_itself_is_a_mistake_of_its_author(
    server: FakeServer, answer: Mapping, message: str
) -> None:
    server.add_model(
        "wrong", lambda inputs: answer, inputs=[TensorMetadata("x", "FP32", FP32_ROWS)],
        outputs=[TensorMetadata("y", "FP32", FP32_ROWS)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        server.client().infer("wrong", {"x": X})


def test_scripts_for_a_model_that_is_not_there_are_refused(server: FakeServer) -> None:
    with pytest.raises(ValueError, match="no model 'dubble'; it has: double, llm"):
        server.overload("dubble")


def test_many_threads_lose_no_request(server: FakeServer) -> None:
    with server.client() as client:

        def work() -> None:
            for _ in range(50):
                client.infer("double", {"x": X})

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.statistics("double")[0].success.count == len(server.requests) == 400


def test_clients_of_one_server_are_closed_apart(server: FakeServer) -> None:
    one, other = server.client(), server.client()
    one.close()
    with pytest.raises(InvalidInput, match="is closed"):
        one.is_ready()
    assert other.is_ready()
    assert isinstance(other, Client)


def test_it_needs_nothing_but_numpy() -> None:
    probe = (
        "import sys; from enginesmith_client.testing import FakeServer; server = FakeServer(); server.add_llm('m');"
        "print(server.client().generate('m', 'x').text);"
        "print({'grpc', 'tritonclient', 'google', 'pytest', 'jinja2', 'aiohttp'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["An answer of a fake model.", "set()"]
