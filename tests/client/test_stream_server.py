"""Answers in pieces from a real tritonserver, over both protocols."""

import gc
import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_models import RunningServer, await_content

from enginesmith_client import (
    Cancelled,
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    ServerError,
    TextStream,
)

pytestmark = pytest.mark.server


UNNOTICED = "Triton notices a closed HTTP connection once it has begun to answer"


def text_array(*texts: str) -> Any:
    return np.array([texts], np.object_)


def test_the_pieces_make_up_the_answer(client: Client) -> None:
    with client.stream("llm", "schöner Satz", max_tokens=50) as stream:
        deltas = list(stream)
        whole = stream.generation
    assert len(deltas) > 2
    assert json.loads("".join(delta.text for delta in deltas))["text_input"] == ["schöner Satz"]
    assert whole.text == "".join(delta.text for delta in deltas)
    assert [delta.output_tokens for delta in deltas] == [
        sum(len(delta.text) for delta in deltas[: count + 1]) for count in range(len(deltas))
    ]
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert (whole.finish_reason, whole.prompt_tokens, whole.output_tokens) == ("length", 7, len(whole.text))
    assert whole.ttft_s is not None
    assert 0 < whole.ttft_s <= whole.latency_s


def test_a_conversation_streams_too(client: Client) -> None:
    stream = client.stream_chat("llm", [{"role": "user", "content": "hi"}])
    assert list(json.loads("".join(delta.text for delta in stream))) == ["messages"]


def test_log_probabilities_come_with_their_pieces(client: Client) -> None:
    deltas = list(client.stream("llm", "hi", logprobs=True))
    for delta in deltas:
        assert delta.logprobs is not None
        assert b"".join(one.token for one in delta.logprobs).decode() == delta.text


@pytest.mark.parametrize(
    ("model", "texts", "counts"),
    [("bls", ["one ", "two ", "three"], [1, 2, 3]), ("plain_llm", ["hi"], [None])],
)
def test_models_of_other_kinds_stream_as_they_can(
    client: Client, model: str, texts: list[str], counts: list[int | None]
) -> None:
    deltas = list(client.stream(model, "hi", max_tokens=5))
    assert [delta.text for delta in deltas] == texts
    assert [delta.output_tokens for delta in deltas] == counts


def test_a_model_of_the_llm_api_streams(client: Client) -> None:
    stream = client.stream("llmapi", "hi")
    assert len(list(stream)) == 2
    assert json.loads(stream.generation.text)["streaming"] == [True]
    assert stream.generation.finish_reason == "stop"


def leave_the_block(stream: TextStream) -> None:
    with stream:
        next(stream)


def close(stream: TextStream) -> None:
    next(stream)
    stream.close()
    stream.close()


def drop(stream: TextStream) -> None:
    next(stream)


@pytest.mark.parametrize("leave", [leave_the_block, close, drop])
def test_a_stream_that_is_left_ends_on_the_server(
    client: Client, tmp_path: Path, leave: Callable[[TextStream], None]
) -> None:
    mark = tmp_path / "mark"
    leave(client.stream("llm", f"wait:{mark}"))
    gc.collect()
    await_content(mark, "cancelled")


def test_an_error_of_the_reader_ends_the_request_on_the_server(client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def fail() -> None:
        with client.stream("llm", f"wait:{mark}") as stream:
            next(stream)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    await_content(mark, "cancelled")


@pytest.mark.parametrize("prompt", ["wait", "silent"])
def test_a_stream_that_another_thread_closes_raises_in_its_reader(
    client: Client, tmp_path: Path, prompt: str
) -> None:
    if prompt == "silent" and client.url.startswith("http"):
        pytest.skip(UNNOTICED)
    mark = tmp_path / "mark"
    stream = client.stream("llm", f"{prompt}:{mark}")
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(list, stream)
        await_content(mark, "waiting")
        stream.close()
        assert isinstance(reader.exception(timeout=20), Cancelled)
    await_content(mark, "cancelled")


def test_a_stream_is_over_at_its_deadline_and_ends_on_the_server(client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    stream = client.stream("llm", f"wait:{mark}", timeout_s=0.5)
    assert next(stream).text == "one "
    with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        next(stream)
    await_content(mark, "cancelled")


def test_a_closed_stream_says_so(client: Client) -> None:
    never_read = client.stream("llm", "hi")
    never_read.close()
    left = client.stream("llm", "hi")
    next(left)
    left.close()
    for stream in (never_read, left):
        with pytest.raises(Cancelled, match="closed before its end"):
            next(stream)
        with pytest.raises(InvalidInput, match="known only after the last piece"):
            _ = stream.generation


def test_a_stream_is_read_once(client: Client) -> None:
    stream = client.stream("llm", "hi")
    first = next(stream)
    assert [first, *stream]
    assert next(stream, None) is None
    with pytest.raises(InvalidInput, match=r"read to its end already\n.*\.generation"):
        list(stream)
    stream.close()
    assert stream.generation.text


def test_two_threads_cannot_read_one_stream(client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    stream = client.stream("llm", f"wait:{mark}")
    next(stream)
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(next, stream) for _ in range(2)]
        (refused,), (waiting,) = wait(readers, timeout=20, return_when=FIRST_COMPLETED)
        assert "being read already" in str(refused.exception())
        stream.close()
        assert isinstance(waiting.exception(timeout=20), Cancelled)


def test_an_error_in_the_middle_comes_after_the_pieces_before_it(client: Client) -> None:
    stream = client.stream("llm", "raise late:INTERNAL")
    assert next(stream).text == "one "
    with pytest.raises(ServerError, match="asked to fail"):
        next(stream)
    with pytest.raises(Cancelled):
        next(stream)


def test_nothing_is_sent_before_the_first_piece_is_asked_for(client: Client) -> None:
    unknown = client.stream("lmm", "hi")
    wrong = client.stream("llm", "\ud800")
    with pytest.raises(ModelNotReady, match="did you mean 'llm'"):
        next(unknown)
    with pytest.raises(InvalidInput, match="the prompt cannot be sent"):
        next(wrong)


def test_many_streams_run_at_once(client: Client) -> None:
    streams = [client.stream("llm", f"prompt {number}") for number in range(8)]
    firsts = [next(stream) for stream in streams]
    texts = [
        first.text + "".join(delta.text for delta in stream)
        for first, stream in zip(firsts, streams, strict=True)
    ]
    assert [json.loads(text)["text_input"] for text in texts] == [[f"prompt {number}"] for number in range(8)]


def test_a_decoupled_model_answers_infer_stream_as_often_as_it_does(client: Client) -> None:
    inputs = {"text_input": text_array("hi"), "max_tokens": np.array([[3]], np.int32)}
    inputs["stream"] = np.array([[True]])
    with client.infer_stream("bls", inputs, outputs=["text_output"], request_id="r7") as results:
        answers = list(results)
    assert [answer["text_output"].item() for answer in answers] == [b"one ", b"two ", b"three"]
    assert {answer.model for answer in answers} == {"bls"}


def test_a_model_that_answers_once_does_so_to_infer_stream(client: Client) -> None:
    inputs = {name: np.full((1, 2), 2, np.float32) for name in "ab"}
    (answer,) = client.infer_stream("pair", inputs)
    assert answer["sum"].tolist() == [[4.0, 4.0]]


def test_a_decoupled_model_may_answer_nothing(client: Client) -> None:
    assert list(client.infer_stream("streaming", {"text_input": np.array(["hi"], np.object_)})) == []


def test_a_decoupled_model_that_was_reloaded_with_other_inputs_is_asked_anew(
    client: Client, server: RunningServer
) -> None:
    with Client(server.url("grpc")) as operator:
        original = dict(operator.config("bls"))
        inputs = [
            {**tensor, "data_type": "TYPE_FP64"} if tensor["name"] == "temperature" else tensor
            for tensor in original["input"]
        ]
        try:
            assert client.generate("bls", "hi", max_tokens=1, temperature=0.5).text == "one "
            operator.load("bls", config={**original, "input": inputs})
            assert len(list(client.stream("bls", "hi", max_tokens=3, temperature=0.5))) == 3
        finally:
            operator.load("bls", config=original)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": np.array([["hi"]])}, "needs inputs that were not given: max_tokens"),
        ({"text_inputs": text_array("hi")}, "did you mean 'text_input'"),
        ({"text_input": text_array("hi"), "max_tokens": np.array([[3.0]])}, "is INT32; seen"),
        ({"text_input": text_array("hi"), "max_tokens": np.array([3], np.int32)}, "has shape"),
        (
            {"text_input": np.array([["\ud800"]], np.object_), "max_tokens": np.array([[3]], np.int32)},
            "not valid Unicode",
        ),
    ],
)
def test_wrong_inputs_of_a_decoupled_model_are_refused_here(
    client: Client, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        next(client.infer_stream("bls", inputs))
