"""The fake server against tritonserver: the same models on both, the same calls, and equal results and errors."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
import pytest
from served_models import RunningServer, settled

from enginesmith_client import AsyncClient, Client, InvalidInput, TritonClientError
from enginesmith_client.testing import FakeServer

pytestmark = pytest.mark.server

Arrays = Mapping[str, np.ndarray]
FAKE_URL = "grpc://fake-server:8001"
ONES = np.ones((3, 2), np.float32)
PUNCTUATED = ["x!.", "why?", "no. no. no.", "", "ö!"]


def sum_and_difference(inputs: Arrays) -> Arrays:
    return {"sum": inputs["a"] + inputs["b"], "difference": inputs["a"] - inputs["b"]}


def lengths(inputs: Arrays) -> Arrays:
    texts = inputs["TEXT"][:, 0]
    if max(map(len, texts)) > 40:
        raise InvalidInput("a text is longer than 40 bytes")
    return {"embedding": np.array([[len(one), one.count(b"e"), len(texts)] for one in texts], np.float32)}


def moods(inputs: Arrays) -> Arrays:
    rows = [[one.count(mark) for mark in (b".", b"!", b"?")] for one in inputs["TEXT"][:, 0]]
    return {"logits": np.array(rows, np.float32)}


def common_words(inputs: Arrays) -> Arrays:
    pairs = zip(inputs["TEXT"][:, 0], inputs["TEXT_PAIR"][:, 0], strict=True)
    return {"score": np.array([[len({*one.split()} & {*other.split()})] for one, other in pairs], np.float32)}


def failing(inputs: Arrays) -> Arrays:
    if inputs["code"][0] == b"exception":
        raise ValueError("the model's own trouble")
    raise InvalidInput("asked to fail")


def repeating(inputs: Arrays) -> Iterator[Arrays]:
    for number in range(int(inputs["count"][0, 0]) if "count" in inputs else 1):
        yield {
            "text_output": inputs["text_input"],
            "number": np.array([[number]], np.int32),
            "large": np.array([[2**64 - 1]], np.uint64),
            "done": np.array([[number % 2 == 0]]),
            "scores": np.array([[0.1]], np.float32),
        }


def echoing(inputs: Arrays) -> Arrays:
    return {name.replace("in_", "out_"): array for name, array in inputs.items()}


def as_json(inputs: Arrays) -> Iterator[Arrays]:
    arrived = {
        name: [value.decode() if isinstance(value, bytes) else value.item() for value in array[0]]
        for name, array in inputs.items()
        if name not in ("stream", "exclude_input_in_output")
    }
    text = json.dumps(arrived, ensure_ascii=False)
    reason = "length" if "max_tokens" in inputs else "stop"
    size = 16 if "stream" in inputs and inputs["stream"].any() else len(text)
    for end in range(size, len(text) + size, size):
        yield {
            "text_output": np.array([[text[end - size : end].encode()]], np.object_),
            "finish_reason": np.array([[(reason if end >= len(text) else "").encode()]], np.object_),
            "num_input_tokens": np.array([[7]], np.int32),
            "num_output_tokens": np.array([[min(end, len(text))]], np.int32),
        }


ANSWERS: dict[str, Callable[[Arrays], Any]] = {
    "pair": sum_and_difference,
    "sentences-text": lengths,
    "moods-text": moods,
    "relevance-text": common_words,
    "raises": failing,
    "pieces": repeating,
    "echo": echoing,
    "llm": as_json,
    "plain_llm": lambda inputs: {"text_output": inputs["text_input"]},
    "sentences": lambda inputs: {"embedding": np.zeros((len(inputs["input_ids"]), 3), np.float32)},
}
LABELS = {"moods-text": {"logits": ["calm", "loud", "curious"]}}


@pytest.fixture(scope="module")
def real(server: RunningServer) -> Iterator[Client]:
    with Client(server.url("grpc"), timeout_s=30) as client:
        client.load("pieces")
        yield client


@pytest.fixture(scope="module")
def fake_server(real: Client, server: RunningServer) -> FakeServer:
    """The interface of every model is the real one's; what it answers is written here."""
    fake = FakeServer(url=FAKE_URL)
    labels_file = server.repository / "moods" / "labels.txt"
    LABELS["moods-text"]["logits"] = labels_file.read_text(encoding="utf-8").split("\n")
    for model, answer in ANSWERS.items():
        fake.add_signature(real.metadata(model), answer, labels=LABELS.get(model))
    return fake


CALLS: dict[str, Callable[[Client], Any]] = {
    "infer": lambda client: client.infer("pair", {"a": ONES, "b": ONES}, request_id="request 7"),
    "one output": lambda client: client.infer("pair", {"a": ONES, "b": ONES}, outputs=["sum"], version="1"),
    "bytes": lambda client: client.infer(
        "echo", {"in_STRING": np.array([[b"\xff\0", "ö".encode()]], np.object_)}, outputs=["out_STRING"]
    ),
    "bfloat16": lambda client: client.infer(
        "echo", {"in_BF16": np.array([[1.5, np.inf]], np.float32)}, outputs=["out_BF16"]
    ),
    "an unknown model": lambda client: client.infer("nope", {"a": ONES}),
    "an unknown version": lambda client: client.metadata("pair", version="9"),
    "statistics of an unknown model": lambda client: client.statistics("nope"),
    "statistics of an unknown version": lambda client: client.statistics("pair", version="9"),
    "a missing input": lambda client: client.infer("pair", {"a": ONES}),
    "an unknown input": lambda client: client.infer("pair", {"a": ONES, "b": ONES, "c": ONES}),
    "another dtype": lambda client: client.infer("pair", {"a": ONES.astype(np.float64), "b": ONES}),
    "another shape": lambda client: client.infer("pair", {"a": ONES[:, :1], "b": ONES}),
    "too many rows": lambda client: client.infer("sentences", {"input_ids": np.ones((5, 2), np.int64)}),
    "an unknown output": lambda client: client.infer("pair", {"a": ONES, "b": ONES}, outputs=["product"]),
    "a model's exception": lambda client: client.infer("raises", {"code": np.array(["exception"])}),
    "a model's refusal": lambda client: client.infer("raises", {"code": np.array(["INVALID_ARG"])}),
    "metadata": lambda client: client.metadata("echo"),
    "metadata of an ensemble": lambda client: client.metadata("moods-text"),
    "readiness": lambda client: [client.is_ready(), client.is_ready("pair"), client.is_ready("nope")],
    "readiness of versions": lambda client: [client.is_ready("pair", version=one) for one in ("1", "9")],
    "embed in several requests": lambda client: client.embed("sentences-text", ["e" * n for n in range(9)]),
    "embed by the name of the encoder": lambda client: client.embed("sentences", ["here"]),
    "embed refused": lambda client: client.embed("sentences-text", ["long " * 20]),
    "classify": lambda client: client.classify("moods-text", PUNCTUATED),
    "rerank": lambda client: client.rerank("relevance-text", "a b c", ["x", "a b", "c", "a b c"]),
    "the wrong task": lambda client: client.classify("sentences-text", ["x"]),
    "generate": lambda client: client.generate("llm", "Hi"),
    "generate with options": lambda client: json.loads(
        client.generate("llm", "Hi", max_tokens=5, stop=["a"], seed=3, top_p=0.5).text
    ),
    "a stream of what generate gives": lambda client: [plain(one) for one in client.stream("llm", "Hi")],
    "chat": lambda client: client.chat("llm", MESSAGES),
    "a stream of a chat": lambda client: [plain(one) for one in client.stream_chat("llm", MESSAGES)],
    "chat with a model that cannot": lambda client: client.chat("plain_llm", MESSAGES),
    "generate with the least": lambda client: client.generate("plain_llm", "echo"),
    "an option that is not there": lambda client: client.generate("plain_llm", "echo", seed=1),
    "generate with a model that does not": lambda client: client.generate("pair", "echo"),
    "a stream of results": lambda client: list(client.infer_stream("pieces", PIECES)),
    "a stream of no results": lambda client: list(
        client.infer_stream("pieces", {**PIECES, "count": np.array([[0]], np.int32)})
    ),
    "a stream of an unknown model": lambda client: list(client.infer_stream("nope", PIECES)),
    "a stream of text": lambda client: [asdict(delta) for delta in client.stream("pieces", "word")],
    "unloading of an unknown model": lambda client: client.unload("nope"),
    "loading of an unknown model": lambda client: client.load("nope"),
}
MESSAGES = [{"role": "user", "content": "Grüße"}]
PIECES = {"text_input": np.array([["word"]], np.object_), "count": np.array([[3]], np.int32)}


def outcome(call: Callable[[Client], Any], client: Client) -> Any:
    """What a caller sees, without what differs from one server to the next: address, models, paths and times."""
    try:
        return plain(call(client))
    except TritonClientError as error:
        message, hint = (
            re.sub(r"\n\nAt:\n.*", "", one or "", flags=re.DOTALL).replace(client.url, "<server>")
            for one in (error.message, error.hint)
        )
        return type(error), message, re.sub(r"ready models:.*", "<models>", hint)


def plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(one) for name, one in asdict(value).items() if not name.endswith("_s")}
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", CALLS)
def test_a_call_ends_on_the_fake_server_as_on_a_real_one(
    name: str, real: Client, fake_server: FakeServer
) -> None:
    assert outcome(CALLS[name], fake_server.client()) == outcome(CALLS[name], real)


def test_the_metadata_that_a_fake_server_gives_is_what_it_was_made_of(
    real: Client, fake_server: FakeServer
) -> None:
    client = fake_server.client()
    for model in ANSWERS:
        assert client.metadata(model) == real.metadata(model)


def test_statistics_count_alike(real: Client, fake_server: FakeServer) -> None:
    def counts(client: Client) -> list[int]:
        def now() -> tuple[int, int, int]:
            (one,) = client.statistics("sentences-text")
            return one.inference_count, one.execution_count, one.success.count

        before = settled(now)
        client.infer("sentences-text", {"TEXT": np.array([["a"], ["b"]], np.object_)})
        client.infer("sentences-text", {"TEXT": np.array([["a"]], np.object_)})
        return [after - then for after, then in zip(settled(now), before, strict=True)]

    assert counts(fake_server.client()) == counts(real) == [3, 2, 2]


def test_unloading_and_loading_are_seen_alike(real: Client, fake_server: FakeServer) -> None:
    def sequence(client: Client) -> list[Any]:
        seen = []
        for step in (client.unload, client.load):
            step("plain_llm")
            client.wait_ready("plain_llm") if step == client.load else None
            seen.append(outcome(lambda one: one.generate("plain_llm", "echo"), client))
            states = [one for one in client.models() if one.name == "plain_llm"]
            seen.append([(one.version, one.state) for one in states if one.state != "UNLOADING"])
        return seen

    on_fake, on_real = sequence(fake_server.client()), sequence(real)
    assert on_fake[0][:2] == on_real[0][:2]
    assert on_fake[2:] == on_real[2:]


def test_a_model_that_was_loaded_with_another_configuration_refuses_what_the_client_knew(
    real: Client, fake_server: FakeServer
) -> None:
    def after_the_change(client: Client) -> Any:
        arrays = {"in_INT32": np.ones((1, 1), np.int32)}
        client.infer("echo", arrays)
        config = {**client.config("echo"), "max_batch_size": 2}
        client.load("echo", config=config)
        try:
            return client.metadata("echo").max_batch_size, outcome(
                lambda one: one.infer("echo", {"in_INT32": np.ones((3, 1), np.int32)}), client
            )
        finally:
            client.load("echo", config={**config, "max_batch_size": 8})

    assert after_the_change(fake_server.client()) == after_the_change(real)


def test_a_configuration_that_a_client_gave_stays_until_the_model_is_unloaded(
    real: Client, fake_server: FakeServer
) -> None:
    def batch_sizes(client: Client) -> list[int]:
        client.load("sentences", config={**client.config("sentences"), "max_batch_size": 2})
        seen = [client.metadata("sentences").max_batch_size]
        client.load("sentences")
        seen.append(client.metadata("sentences").max_batch_size)
        client.unload("sentences")
        client.load("sentences")
        return [*seen, client.metadata("sentences").max_batch_size]

    assert batch_sizes(fake_server.client()) == batch_sizes(real) == [2, 2, 4]


def test_the_asynchronous_client_sees_what_the_other_does(
    server: RunningServer, fake_server: FakeServer
) -> None:
    async def calls(client: AsyncClient) -> list[Any]:
        async with client:
            embeddings = await client.embed("sentences-text", ["a", "b c", "e"] * 3)
            pieces = [plain(one) async for one in results(client)]
            try:
                await client.infer("nope", {"a": ONES})
            except TritonClientError as error:
                return [plain(embeddings), pieces, type(error)]
        raise AssertionError("a model that is not there answered")

    def results(client: AsyncClient) -> AsyncIterator[Any]:
        return client.infer_stream("pieces", PIECES)

    on_real = asyncio.run(calls_of(lambda: AsyncClient(server.url("grpc"), timeout_s=30), calls))
    on_fake = asyncio.run(calls_of(fake_server.async_client, calls))
    assert on_fake == on_real


async def calls_of(make: Callable[[], AsyncClient], calls: Callable[[AsyncClient], Any]) -> list[Any]:
    return list(await calls(make()))
