"""The served model in a real tritonserver: one response or a stream, and every refusal to the one who earned it."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import VOCAB_SIZE, tiny_checkpoint, write_tokenizer
from engine_cases import lowered
from llm_engines import with_end_tokens
from llm_served import PATIENCE_S, SERVING, Stream, place_model, serving_llm, stream_to

from enginesmith.triton.models.llm_onnxruntime.llm_text import Text
from enginesmith.triton.server import TritonServer
from enginesmith_client.perf.observe._scrape import parse_metrics

pytestmark = pytest.mark.server


WATCHING_MODEL = '''
import threading
from pathlib import Path

import served_model


class Watched:
    """A request and its sender in one; notes which thread sends responses."""

    def __init__(self, watched, log):
        self._watched, self._log = watched, log

    def __getattr__(self, name):
        return getattr(self._watched, name)

    def get_response_sender(self):
        return Watched(self._watched.get_response_sender(), self._log)

    def send(self, *args, **options):
        with self._log.open("a") as log:
            log.write(threading.current_thread().name + "\\n")
        self._watched.send(*args, **options)


class TritonPythonModel(served_model.TritonPythonModel):
    def execute(self, requests):
        log = Path(__file__).with_name("senders.log")
        super().execute([Watched(request, log) for request in requests])
'''


def watch_senders(version: Path) -> None:
    """Have a placed model write the names of the threads that send responses into ``senders.log``."""
    (version / "model.py").rename(version / "served_model.py")
    (version / "model.py").write_text(WATCHING_MODEL)


UNKNOWN = "<|unknown|>"
"""A token that the tokenizer of "narrow" knows and its model does not."""


def add_token(tokenizer: Path, content: str) -> None:
    """Have ``tokenizer.json`` know one more token than the model."""
    document = json.loads(tokenizer.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": VOCAB_SIZE, "content": content, "special": True, **flags})
    tokenizer.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    checkpoint = tiny_checkpoint(directory / "checkpoint")
    engine = with_end_tokens(lowered(checkpoint, directory / "engine"), [])
    repository = directory / "repository"
    place_model(repository, "llm", engine, checkpoint, kv_cache={"reuse_tokens": 64, "tokens_per_block": 8})
    place_model(
        repository, "narrow", engine, checkpoint, max_batch_size=1, max_sequence_length=1024, max_queue_size=1
    )
    add_token(repository / "narrow" / "1" / "tokenizer.json", UNKNOWN)
    place_model(repository, "watched", engine, checkpoint, max_batch_size=1, max_queue_size=1)
    watch_senders(repository / "watched" / "1")
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with serving_llm(repository) as running:
        yield running


@pytest.fixture
def stream(server: TritonServer) -> Iterator[Stream]:
    with stream_to(server.grpc_url) as opened:
        yield opened


def post(server: TritonServer, path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(f"http://{server.http_url}/v2/models/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        content: bytes = response.read()
    return content


def metric(server: TritonServer, name: str, *, model: str) -> float:
    """A metric as Triton shows it."""
    with urllib.request.urlopen(server.metrics_url, timeout=PATIENCE_S) as response:
        lines = response.read().decode().splitlines()
    (line,) = (one for one in lines if one.startswith(f'{name}{{model="{model}",version="1"}}'))
    return float(line.split()[-1])


def wait_for_metric(server: TritonServer, name: str, value: float, *, model: str) -> None:
    """Triton offers no event for its metrics, so they are read until ``name`` is ``value``."""
    end_s = time.monotonic() + PATIENCE_S
    while metric(server, name, model=model) != value:
        assert time.monotonic() < end_s, f"{name} of {model} did not become {value}"


def test_rows_and_requests_are_answered_each_as_alone(stream: Stream) -> None:
    texts = [b"one", b"a rather longer text", b"x", b"yet another", b"five"]
    apart = [stream.ask("llm", [text]) for text in texts]

    for rows in (slice(0, 2), slice(3, 5)):
        together = stream.ask("llm", texts[rows])
        for row, expected in enumerate(apart[rows]):
            assert together.text(row) == expected.text()
            for name in ("num_input_tokens", "num_output_tokens"):
                assert together.number(name, row) == expected.number(name)


def test_streamed_pieces_are_the_one_response_in_parts(stream: Stream) -> None:
    whole = stream.ask("llm", [b"some text"], max_tokens=12, exclude_input_in_output=True)
    stream.send("llm", [b"some text"], max_tokens=12, stream=True)
    pieces = stream.all()

    assert len(pieces) > 3
    assert "".join(piece.text() for piece in pieces) == whole.text()
    assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
    counts = [piece.number("num_output_tokens") for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == whole.number("num_output_tokens") == 12
    assert {piece.number("num_input_tokens") for piece in pieces} == {whole.number("num_input_tokens")}


def test_answer_begins_with_the_text_unless_that_is_excluded(stream: Stream) -> None:
    with_input = stream.ask("llm", [b"text"])
    without = stream.ask("llm", [b"text"], exclude_input_in_output=True)
    assert with_input.text() == "text" + without.text()


def test_parameters_left_out_have_the_packages_defaults(stream: Stream) -> None:
    assert stream.ask("llm", [b"text"]).number("num_output_tokens") == SERVING["default_max_tokens"]
    assert stream.ask("llm", [b"text"], max_tokens=2).number("num_output_tokens") == 2


def test_messages_are_written_with_the_models_own_template(stream: Stream) -> None:
    chat = stream.ask("llm", [b"Hi"], apply_chat_template=True)
    messages = stream.ask("llm", None, messages=b'[{"role": "user", "content": "Hi"}]')
    written = stream.ask(
        "llm", [b"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"], exclude_input_in_output=True
    )
    assert chat.text() == messages.text() == written.text()
    assert chat.number("num_input_tokens") == written.number("num_input_tokens")


def test_log_probabilities_come_with_the_bytes_of_their_tokens(stream: Stream) -> None:
    asked = {"max_tokens": 10, "return_log_probs": True, "exclude_input_in_output": True}
    whole = stream.ask("llm", [b"text"], **asked)
    stream.send("llm", [b"text"], stream=True, **asked)
    pieces = stream.all()

    logprobs = whole.tensors["output_log_probs"]
    assert logprobs.shape == (1, 1, 10)
    assert whole.tensors["cum_log_probs"][0, 0] == pytest.approx(logprobs.sum(), rel=1e-5)
    tokens = b"".join(whole.tensors["output_tokens"][0])
    assert tokens.decode(errors="replace") == whole.text()
    streamed = np.concatenate([piece.tensors["output_log_probs"][0, 0] for piece in pieces])
    np.testing.assert_allclose(streamed, logprobs[0, 0], rtol=1e-5)
    assert b"".join(token for piece in pieces for token in piece.tensors["output_tokens"][0]) == tokens


def test_performance_metrics_tell_reuse_and_times_in_order(stream: Stream) -> None:
    shared = "the same beginning of a prompt, "
    stream.ask("llm", [f"{shared}one".encode()])
    reply = stream.ask("llm", [f"{shared}two".encode()], return_perf_metrics=True)

    reused, new, total = (
        reply.number(f"kv_cache_{name}_blocks") for name in ("reused", "alloc_new", "alloc_total")
    )
    assert reused >= 1
    assert reused + new == total
    times = [
        reply.number(f"{name}_time_ns")
        for name in ("arrival", "first_scheduled", "first_token", "last_token")
    ]
    assert times == sorted(times)


def test_stop_words_end_the_answer_before_themselves(stream: Stream) -> None:
    asked = {"max_tokens": 30, "exclude_input_in_output": True}
    free = stream.ask("llm", [b"text"], **asked).text()
    stop = free[4:7]

    reply = stream.ask("llm", [b"text"], stop_words=[b"never there", stop.encode()], **asked)

    assert reply.text() == free[: free.index(stop)]
    assert reply.finish_reason == "stop"
    assert reply.number("num_output_tokens") < 30


def test_end_id_ends_the_answer_and_min_tokens_puts_it_off(stream: Stream, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = Text(tmp_path)
    free = stream.ask("llm", [b"text"], max_tokens=20, return_log_probs=True).tensors["output_tokens"][0]
    place = next(place for place in range(2, 20) if free[place] not in free[:place])
    end_id = next(token for token in range(VOCAB_SIZE) if text.token_bytes(token) == free[place])

    ended = stream.ask("llm", [b"text"], max_tokens=20, end_id=end_id)
    late = stream.ask("llm", [b"text"], max_tokens=20, end_id=end_id, min_tokens=20)

    assert (ended.finish_reason, ended.number("num_output_tokens")) == ("stop", place + 1)
    assert (late.finish_reason, late.number("num_output_tokens")) == ("length", 20)


@pytest.mark.parametrize(
    ("text", "inputs", "message"),
    [
        (b"", {}, "text_input is empty: the prompt has no tokens"),
        (b"\xff\xfe", {}, "text_input is not valid UTF-8: invalid start byte at byte 0"),
        (b"word " * 45, {}, "tokens; this model accepts at most 40"),
        (b"x" * 10_000_000, {}, "text_input has 10000000 characters, more than the 40 tokens"),
        (b"Hi", {"temperature": -1.0}, "temperature is -1.0; allowed: from 0"),
        (b"Hi", {"max_tokens": 0}, "max_tokens is 0; allowed: at least 1"),
        (b"Hi", {"presence_penalty": float("nan")}, "presence_penalty is nan; allowed: from -100 to 100"),
        (b"Hi", {"beam_width": 2}, "beam_width is 2; allowed: 1"),
        (b"Hi", {"end_id": 512}, "end_id is 512; allowed: -1 (none) to 511"),
        (b"Hi", {"stop_words": [b"\xff"]}, "stop_words is not valid UTF-8"),
        (b"Hi", {"messages": b"[]"}, "give one of text_input and messages; seen: text_input and messages"),
        (None, {"max_tokens": 3}, "give one of text_input and messages; seen: none"),
        (None, {"messages": b"{"}, "messages is not JSON"),
        (None, {"messages": b"[]"}, "messages must be a list with at least one"),
        (None, {"messages": b"[3]"}, "messages[0] is int; allowed: an object"),
        (None, {"messages": b'[{"role": "user"}]'}, "messages[0].content is NoneType; allowed: a string"),
    ],
)
def test_bad_request_gets_its_own_error_and_the_others_their_answers(
    text: bytes | None, inputs: dict[str, Any], message: str, stream: Stream
) -> None:
    bad = stream.ask("llm", None if text is None else [text], **inputs)
    assert message in bad.error
    assert stream.ask("llm", [b"good"]).error == ""


def test_token_that_only_the_tokenizer_knows_hurts_no_other_request(
    server: TritonServer, stream: Stream
) -> None:
    with stream_to(server.grpc_url) as other:
        other.send("narrow", [b"text"], max_tokens=300, stream=True)
        other.receive()
        refused = stream.ask("narrow", [f"a {UNKNOWN}".encode()], max_tokens=2)
        ended = stream.ask("narrow", [b"text"], max_tokens=2, min_tokens=1, end_id=VOCAB_SIZE)
        last = other.all()[-1]
    banned = stream.ask("narrow", [b"text"], max_tokens=2, bad_words=[UNKNOWN.encode()])

    assert refused.error == (
        "[INVALID_ARG] text_input holds '<|unknown|>', token 512 of the tokenizer; the model has tokens up to 511"
    )
    assert ended.error == "[INVALID_ARG] end_id is 512; allowed: -1 (none) to 511"
    assert (last.error, last.finish_reason) == ("", "length")
    assert banned.error == ""


def test_rows_cannot_be_streamed(stream: Stream) -> None:
    assert (
        "the request has 2 rows; with stream it may have one"
        in stream.ask("llm", [b"a", b"b"], stream=True).error
    )


def test_text_with_nul_and_lone_replacement_characters_is_text(stream: Stream) -> None:
    assert stream.ask("llm", ["a\0b \ufffd \U0001f600".encode()]).error == ""


def test_generate_and_generate_stream_answer_over_http(server: TritonServer, stream: Stream) -> None:
    expected = stream.ask("llm", [b"text"], exclude_input_in_output=True)
    body = {"text_input": "text", "exclude_input_in_output": True}

    whole = json.loads(post(server, "llm/generate", body))
    events = post(server, "llm/generate_stream", {**body, "stream": True}).decode().split("\n\n")

    assert whole["text_output"] == expected.text()
    assert whole["finish_reason"] == "length"
    pieces = [json.loads(event.removeprefix("data: ")) for event in events if event]
    assert len(pieces) > 1
    assert "".join(piece["text_output"] for piece in pieces) == expected.text()


def test_client_that_leaves_frees_its_slot(server: TritonServer) -> None:
    before = metric(server, "enginesmith_llm_output_tokens_total", model="narrow")
    leaving = Stream(server.grpc_url)
    leaving.send("narrow", [b"text"], max_tokens=1000, stream=True)
    for _ in range(3):
        assert not leaving.receive().final
    leaving.cancel()

    wait_for_metric(server, "enginesmith_llm_running", 0, model="narrow")

    assert metric(server, "enginesmith_llm_output_tokens_total", model="narrow") - before < 500


def test_client_that_leaves_is_not_waited_for_without_a_stream_of_pieces(server: TritonServer) -> None:
    leaving = Stream(server.grpc_url)
    before = metric(server, "enginesmith_llm_output_tokens_total", model="narrow")
    leaving.send("narrow", [b"text"], max_tokens=1000)
    wait_for_metric(server, "enginesmith_llm_running", 1, model="narrow")
    leaving.cancel()
    wait_for_metric(server, "enginesmith_llm_running", 0, model="narrow")
    assert metric(server, "enginesmith_llm_output_tokens_total", model="narrow") - before < 1000


def test_full_queue_refuses_at_once(server: TritonServer, stream: Stream) -> None:
    holding = Stream(server.grpc_url)
    holding.send("narrow", [b"text"], max_tokens=1000, stream=True)
    holding.receive()
    holding.send("narrow", [b"text"], max_tokens=1)
    wait_for_metric(server, "enginesmith_llm_waiting", 1, model="narrow")

    refused = stream.ask("narrow", [b"text"])

    holding.cancel()
    for name in ("waiting", "running"):
        wait_for_metric(server, f"enginesmith_llm_{name}", 0, model="narrow")
    assert refused.error == "[UNAVAILABLE] the queue is full: 1 requests wait, at most 1 may; try again later"
    assert stream.ask("narrow", [b"text"]).error == ""


def test_refusal_is_sent_by_the_thread_that_asks_senders(repository: Path, stream: Stream) -> None:
    """tritonserver dies of SIGSEGV when a sender is asked whether it is cancelled while its final response is sent."""
    for _ in range(6):
        stream.send("watched", [b"text"], max_tokens=50)
    replies = [stream.all()[-1] for _ in range(6)]

    assert any("the queue is full" in reply.error for reply in replies)
    log = repository / "watched" / "1" / "senders.log"
    assert set(log.read_text().splitlines()) == {"responses"}


def test_request_ends_at_its_own_timeout(stream: Stream) -> None:
    stream.send("narrow", [b"text"], max_tokens=1000, stream=True, timeout_us=50_000)
    last = stream.all()[-1]
    assert last.error.startswith("[DEADLINE_EXCEEDED] the request's timeout of 0.05 s has passed after")


def test_metrics_count_tokens_and_slots(server: TritonServer, stream: Stream) -> None:
    names = [f"enginesmith_llm_{name}_tokens_total" for name in ("prompt", "output", "reused")]
    wait_for_metric(server, "enginesmith_llm_running", 0, model="llm")
    before = [metric(server, name, model="llm") for name in names]
    reply = stream.ask("llm", [b"a text that was never seen"], max_tokens=5)
    prompt_tokens = reply.number("num_input_tokens")
    wait_for_metric(server, names[1], before[1] + 5, model="llm")
    assert metric(server, names[0], model="llm") == before[0] + prompt_tokens
    assert metric(server, names[2], model="llm") <= before[2] + prompt_tokens
    assert metric(server, "enginesmith_llm_slots", model="llm") == SERVING["max_batch_size"]


def test_metrics_tell_which_batches_were_formed_and_the_memory_of_the_cache(
    server: TritonServer, stream: Stream
) -> None:
    def seen() -> dict[str, float]:
        with urllib.request.urlopen(server.metrics_url, timeout=PATIENCE_S) as response:
            return parse_metrics(response.read(), ["narrow"])

    alone = 'enginesmith_llm_steps_total{batch_size="1"}'
    wait_for_metric(server, "enginesmith_llm_running", 0, model="narrow")
    # Steps are shown a little later; those of requests before may still come.
    stream.ask("narrow", [b"text"], max_tokens=2)
    before = seen().get(alone, 0.0)
    # The first token comes of the prompt, and each other one of a step.
    stream.ask("narrow", [b"text"], max_tokens=40)
    end_s = time.monotonic() + PATIENCE_S
    while seen().get(alone, 0.0) < before + 39:
        assert time.monotonic() < end_s, "the steps were never shown"
    assert 0 <= seen()["enginesmith_llm_kv_used_bytes"] <= seen()["enginesmith_llm_kv_total_bytes"]
    assert seen()["enginesmith_llm_kv_total_bytes"] > 0
