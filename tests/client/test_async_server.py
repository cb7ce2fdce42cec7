"""The asynchronous client against a real tritonserver, where it differs from the synchronous one."""

import asyncio
import gc
import inspect
import json
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_models import RunningServer, await_content

from enginesmith_client import (
    AsyncClient,
    AsyncTextStream,
    Cancelled,
    ChatTemplate,
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    ServerError,
)

pytestmark = pytest.mark.server

Ask = Callable[[AsyncClient], Coroutine[Any, Any, Any]]


@pytest.fixture(params=["grpc", "http"])
def ask(request: pytest.FixtureRequest, server: RunningServer) -> Callable[[Ask], Any]:
    """Runs a coroutine function with a client in an event loop of its own."""
    if "silent" in request.node.name and request.param == "http":
        pytest.skip("Triton notices a closed HTTP connection once it has begun to answer")

    def run(question: Ask) -> Any:
        async def main() -> Any:
            async with AsyncClient(server.url(request.param), timeout_s=30) as client:
                return await question(client)

        return asyncio.run(main())

    return run


async def awaited(mark: Path, content: str) -> None:
    await asyncio.to_thread(await_content, mark, content)


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def signatures(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(kind, callable)
            if not name.startswith("_")
        }

    assert signatures(AsyncClient) == signatures(Client)
    # The defaults of frozen values are compared by value; the constructors have the same arguments too.
    constructors = [list(inspect.signature(kind).parameters) for kind in (Client, AsyncClient)]
    assert constructors[0] == constructors[1]


def test_every_method_answers_as_that_of_the_other_client(ask: Callable[[Ask], Any], client: Client) -> None:
    inputs = {name: np.full((1, 2), 2, np.float32) for name in "ab"}
    messages = [{"role": "user", "content": "hi"}]

    async def question(other: AsyncClient) -> None:
        await other.wait_ready("llm")
        assert await other.is_ready("llm")
        assert (await other.infer("pair", inputs))["sum"].tolist() == [[4.0, 4.0]]
        assert (await other.generate("llm", "hi", seed=3)).text == client.generate("llm", "hi", seed=3).text
        assert (await other.chat("llm", messages)).text == client.chat("llm", messages).text
        template = ChatTemplate("{{ messages[0]['content'] }}!")
        assert (await other.chat("plain_llm", messages, template=template)).text == "hi!"
        assert await other.metadata("llm") == client.metadata("llm")
        assert await other.config("llm") == client.config("llm")
        assert {status.name for status in await other.models()} == {status.name for status in client.models()}
        assert (await other.statistics("pair"))[0].name == "pair"
        np.testing.assert_array_equal(
            await other.embed("sentences", ["a", "b"]), client.embed("sentences", ["a", "b"])
        )
        assert await other.classify("moods", ["Stop!"]) == client.classify("moods", ["Stop!"])
        assert await other.rerank("relevance-text", "sea", ["bread", "the sea"]) == client.rerank(
            "relevance-text", "sea", ["bread", "the sea"]
        )
        with pytest.raises(ModelNotReady, match="did you mean 'llm'"):
            await other.generate("lmm", "hi")
        with pytest.raises(InvalidInput, match="is FP32; seen"):
            await other.infer("pair", {**inputs, "b": np.zeros((1, 2))})
        with pytest.raises(ServerError):
            await other.generate("llm", "raise:INTERNAL")

    ask(question)


def test_the_pieces_make_up_the_answer(ask: Callable[[Ask], Any]) -> None:
    async def question(client: AsyncClient) -> None:
        async with client.stream("llm", "hi", max_tokens=9) as stream:
            text = "".join([delta.text async for delta in stream])
        assert stream.generation.text == text
        assert stream.generation.finish_reason == "length"
        with pytest.raises(InvalidInput, match="read to its end already"):
            [delta async for delta in stream]

        stream = client.stream_chat("llm", [{"role": "user", "content": "hi"}])
        assert list(json.loads("".join([delta.text async for delta in stream]))) == ["messages"]

        inputs = {"text_input": np.array([["hi"]], np.object_), "max_tokens": np.array([[2]], np.int32)}
        answers = [answer["text_output"].item() async for answer in client.infer_stream("bls", inputs)]
        assert answers == [b"hione two "]

    ask(question)


def test_streams_of_many_tasks_run_at_once(ask: Callable[[Ask], Any]) -> None:
    async def question(client: AsyncClient) -> None:
        async def one(number: int) -> str:
            return "".join([delta.text async for delta in client.stream("llm", f"prompt {number}")])

        texts = await asyncio.gather(*(one(number) for number in range(16)))
        assert [json.loads(text)["text_input"] for text in texts] == [[f"prompt {n}"] for n in range(16)]

    ask(question)


async def leave_the_block(stream: AsyncTextStream) -> None:
    async with stream:
        await anext(stream)


async def close(stream: AsyncTextStream) -> None:
    await anext(stream)
    await stream.close()
    await stream.close()


async def drop(stream: AsyncTextStream) -> None:
    await anext(stream)


async def cancel_its_task(stream: AsyncTextStream) -> None:
    await anext(stream)

    async def read() -> None:
        await anext(stream)

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [leave_the_block, close, drop, cancel_its_task])
def test_a_stream_that_is_left_ends_on_the_server(
    ask: Callable[[Ask], Any], tmp_path: Path, leave: Callable[[AsyncTextStream], Awaitable[None]]
) -> None:
    mark = tmp_path / "mark"

    async def question(client: AsyncClient) -> None:
        await leave(client.stream("llm", f"wait:{mark}"))
        gc.collect()
        await awaited(mark, "cancelled")

    ask(question)


@pytest.mark.parametrize("prompt", ["wait", "silent"])
def test_a_generation_whose_task_is_cancelled_ends_on_the_server(
    ask: Callable[[Ask], Any], tmp_path: Path, prompt: str
) -> None:
    mark = tmp_path / "mark"

    async def question(client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate("llm", f"{prompt}:{mark}"))
        await awaited(mark, "waiting")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await awaited(mark, "cancelled")

    ask(question)


def test_a_stream_that_another_task_closes_raises_in_its_reader(
    ask: Callable[[Ask], Any], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"

    async def question(client: AsyncClient) -> None:
        stream = client.stream("llm", f"wait:{mark}")
        await anext(stream)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(InvalidInput, match="being read already"):
            await anext(stream)
        await stream.close()
        with pytest.raises(Cancelled):
            await reader
        with pytest.raises(Cancelled, match="closed before its end"):
            await anext(stream)
        await awaited(mark, "cancelled")

    ask(question)


def test_a_stream_is_over_at_its_deadline(ask: Callable[[Ask], Any], tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    async def question(client: AsyncClient) -> None:
        stream = client.stream("llm", f"wait:{mark}", timeout_s=0.5)
        assert (await anext(stream)).text == "one "
        with pytest.raises(DeadlineExceeded):
            await anext(stream)
        await awaited(mark, "cancelled")

    ask(question)


def test_models_are_loaded_and_unloaded(ask: Callable[[Ask], Any]) -> None:
    async def question(client: AsyncClient) -> None:
        await client.unload("changing")
        assert not await client.is_ready("changing")
        await client.load("changing")
        assert await client.is_ready("changing")

    ask(question)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_in_another_event_loop_is_told_so(server: RunningServer, protocol: str) -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    client = AsyncClient(server.url(protocol), timeout_s=30)
    try:
        assert first.run_until_complete(client.is_ready())
        with pytest.raises(InvalidInput, match="used in another event loop"):
            second.run_until_complete(client.is_ready())
        assert first.run_until_complete(client.is_ready())
    finally:
        first.run_until_complete(client.close())
        first.close()
        second.close()
