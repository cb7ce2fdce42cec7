"""Unloading a model that has streamed, on a server of its own: one stream that was cut off would be enough to spoil it."""

import asyncio
import shutil
from collections.abc import Iterator

import pytest
from served_models import MODELS

from enginesmith.triton.server import TritonServer
from enginesmith_client import AsyncClient, Client

pytestmark = pytest.mark.server

ROUNDS = 3
STREAMS = 4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    repository = tmp_path_factory.mktemp("unloading") / "repository"
    shutil.copytree(MODELS / "llm", repository / "llm")
    with TritonServer(repository, model_control="explicit", load_models=["llm"]) as running:
        running.wait_ready()
        yield f"grpc://{running.grpc_url}"


# tritonserver 2.51 often never finishes unloading a decoupled model if a stream was cancelled when all but its status had
# come, and so a client must neither cancel one nor close its connection before that.
def test_a_model_that_streamed_can_be_unloaded(url: str) -> None:
    for _ in range(ROUNDS):
        with Client(url, timeout_s=30) as client:
            for _ in range(STREAMS):
                client.generate("llm", "hi")
        with Client(url, timeout_s=30) as client:
            client.unload("llm")
            assert not client.is_ready("llm")
            client.load("llm")


def test_a_model_that_streamed_to_tasks_can_be_unloaded(url: str) -> None:
    async def stream_and_unload() -> bool:
        async with AsyncClient(url, timeout_s=30) as client:
            for _ in range(STREAMS):
                await client.generate("llm", "hi")
        async with AsyncClient(url, timeout_s=30) as client:
            await client.unload("llm")
            ready = await client.is_ready("llm")
            await client.load("llm")
            return ready

    assert [asyncio.run(stream_and_unload()) for _ in range(ROUNDS)] == [False] * ROUNDS
