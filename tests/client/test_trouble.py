"""Servers that are stopped, silent, full, half dead or no servers at all: every call ends in time and says why."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from served_models import MODELS, RunningServer

from enginesmith.triton.server import TritonServer
from enginesmith_client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    Retry,
    TritonClientError,
)

ROOT = Path(__file__).parents[2]
PROTOCOLS = ("grpc", "http")
KINDS = ("threads", "tasks")


@dataclass(frozen=True)
class Silent:
    """A TCP server that does to each connection what ``act`` does."""

    act: Callable[[socket.socket], None]

    @contextmanager
    def listening(self) -> Iterator[str]:
        """``host:port``. Connections stay open until the end, unless ``act`` ends them."""
        connections: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                while True:
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        return
                    connections.append(connection)
                    try:
                        self.act(connection)
                    except OSError:
                        continue

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield f"127.0.0.1:{listener.getsockname()[1]}"
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()
                for connection in connections:
                    connection.close()


def nothing(connection: socket.socket) -> None:
    """Accepts and never answers."""


def half_closed(connection: socket.socket) -> None:
    """Ends its own direction at once and keeps the other."""
    connection.shutdown(socket.SHUT_WR)


def reset(connection: socket.socket) -> None:
    """Ends with RST, as a process does that dies with unread bytes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def garbage(connection: socket.socket) -> None:
    """Speaks another protocol, and stays."""
    connection.sendall(b"220 mail.example ESMTP\r\n" * 20)


def attempt(kind: str, url: str, ask: Callable[[Client | AsyncClient], object], timeout_s: float) -> object:
    """What ``ask`` gets or raises, from a client of its own for threads or tasks."""
    retry = Retry(attempts=2, backoff_s=0.001)

    async def in_a_task() -> object:
        async with AsyncClient(url, timeout_s=timeout_s, retry=retry) as client:
            answer = ask(client)
            assert isinstance(answer, Awaitable)
            return await answer

    if kind == "tasks":
        return asyncio.run(in_a_task())
    with Client(url, timeout_s=timeout_s, retry=retry) as client:
        return ask(client)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("act", "errors"),
    [
        (nothing, (DeadlineExceeded,)),
        (half_closed, (ConnectError,)),
        (reset, (ConnectError,)),
        # gRPC keeps trying to make a connection of it, with pauses that grow; so it can be either.
        (garbage, (ConnectError, DeadlineExceeded)),
    ],
)
def test_what_is_no_server_ends_every_call_in_time(
    act: Callable[[socket.socket], None], errors: tuple[type[Exception], ...], protocol: str, kind: str
) -> None:
    with Silent(act).listening() as address, pytest.raises(errors):
        attempt(kind, f"{protocol}://{address}", lambda client: client.metadata("m"), timeout_s=0.5)


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of these tests alone, because they stop and kill it."""
    repository = tmp_path_factory.mktemp("trouble") / "repository"
    for model in ("gated", "echo", "pieces"):
        shutil.copytree(MODELS / model, repository / model)
    with TritonServer(repository) as server:
        server.wait_ready()
        yield server


def url_of(server: TritonServer, protocol: str) -> str:
    return f"{protocol}://{server.grpc_url if protocol == 'grpc' else server.http_url}"


def echo(client: Client, **options: float) -> list[float]:
    values = client.infer("echo", {"in_FP32": np.ones((1, 1), np.float32)}, **options)
    return list(values["out_FP32"].ravel())


def pass_gate(client: Client, gate: Path, **options: float) -> None:
    client.infer("gated", {"gate": np.array([[str(gate)]], np.object_)}, **options)


def wait_for(path: Path, call: Future[None]) -> None:
    """Return when the server has made ``path`` for ``call``, which must not end before."""
    while not path.exists():
        assert not call.done(), call.exception()
        time.sleep(0.002)


@pytest.mark.server
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_stands_still_ends_calls_at_their_deadline_and_serves_on(
    protocol: str, doomed: TritonServer
) -> None:
    with Client(url_of(doomed, protocol), timeout_s=30) as client:
        assert echo(client) == [1]
        os.kill(doomed.pid, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineExceeded):
                echo(client, timeout_s=0.3)
        finally:
            os.kill(doomed.pid, signal.SIGCONT)
        assert echo(client) == [1]


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_full_queue_is_overloaded(protocol: str, kind: str, doomed: TritonServer, tmp_path: Path) -> None:
    gates = [tmp_path / str(number) for number in range(3)]
    url = url_of(doomed, protocol)
    with Client(url, timeout_s=30) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(pass_gate, client, gates[0])
        wait_for(gates[0].with_suffix(".entered"), first)
        second = pool.submit(pass_gate, client, gates[1])
        # Whether the second is in the queue cannot be seen from outside; the one that finds it full shows it.
        refused = None
        while refused is None:
            try:
                attempt(
                    kind,
                    url,
                    lambda asking: asking.infer("gated", {"gate": np.array([[str(gates[2])]], np.object_)}),
                    timeout_s=0.5,
                )
            except Overloaded as error:
                refused = error
            except DeadlineExceeded:
                continue
            finally:
                gates[2].touch()
        gates[0].touch()
        gates[1].touch()
        first.result()
        # The probe above may have had the place of the second, which then was refused in its stead.
        assert isinstance(second.exception(), (Overloaded, type(None)))
    assert refused.attempts == 2
    assert "maximum queue size" in refused.message.lower()


@pytest.mark.server
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_closing_ends_calls_that_are_on_their_way(
    protocol: str, doomed: TritonServer, tmp_path: Path
) -> None:
    client = Client(url_of(doomed, protocol), timeout_s=30)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(pass_gate, client, tmp_path / "gate")
        wait_for(tmp_path / "gate.entered", call)
        client.close(drain_s=0.01)
        assert isinstance(call.exception(timeout=30), Cancelled)
        (tmp_path / "gate").touch()
    with pytest.raises(InvalidInput, match="closed"):
        client.is_ready()
    client.close()


@pytest.mark.server
def test_closing_waits_for_what_ends_in_time(doomed: TritonServer, tmp_path: Path) -> None:
    client = Client(url_of(doomed, "grpc"), timeout_s=30)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(pass_gate, client, tmp_path / "gate")
        wait_for(tmp_path / "gate.entered", call)
        closing = pool.submit(client.close, drain_s=60)
        (tmp_path / "gate").touch()
        call.result()
        closing.result()


@pytest.mark.server
def test_tasks_that_are_cancelled_end_their_stream_on_the_server(
    doomed: TritonServer, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    inputs = {
        "text_input": np.array([["hi"]], np.object_),
        "then": np.array([["wait"]], np.object_),
        "mark": np.array([[str(mark)]], np.object_),
    }

    async def scenario() -> None:
        async with AsyncClient(url_of(doomed, "grpc"), timeout_s=30) as client:

            async def read() -> None:
                async for _ in client.infer_stream("pieces", inputs):
                    pass

            reading = asyncio.create_task(read())
            while not mark.exists() or mark.read_text() != "waiting":
                await asyncio.sleep(0.001)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            while mark.read_text() != "cancelled":
                await asyncio.sleep(0.001)
            await client.close(drain_s=3600)  # Nothing is left to wait for.

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.server
def test_a_server_that_dies_while_it_stands_still_breaks_the_calls(
    doomed: TritonServer, tmp_path: Path
) -> None:
    clients = [Client(url_of(doomed, protocol), timeout_s=30) for protocol in PROTOCOLS]
    with ThreadPoolExecutor(2) as pool:
        for client in clients:
            assert echo(client) == [1]
        gates = [tmp_path / protocol for protocol in PROTOCOLS]
        running = [pool.submit(pass_gate, client, gate) for client, gate in zip(clients, gates, strict=True)]
        while not any(gate.with_suffix(".entered").exists() for gate in gates):
            assert not any(call.done() for call in running)
            time.sleep(0.002)
        os.kill(doomed.pid, signal.SIGSTOP)
        os.kill(doomed.pid, signal.SIGKILL)
        for call, gate in zip(running, gates, strict=True):
            error = call.exception(timeout=60)
            assert isinstance(error, ConnectError)
            # The model has one place: the other call may not even have been sent.
            assert not (gate.with_suffix(".entered").exists() and error.unsent)
    for client in clients:
        with pytest.raises(TritonClientError) as caught:
            echo(client)
        assert isinstance(caught.value, ConnectError)
        client.close()


@pytest.mark.server
def test_every_request_through_a_server_that_is_killed_twice_has_one_outcome() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "resilience.py"), "--quick"]
    chosen = ["--only", "threads, http", "tasks, grpc", "threads, grpc, idempotent"]
    run = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert [bar["name"] for bar in outcome["bars"] if not bar["met"]] == []
    for name, found in outcome["figures"]["scenarios"].items():
        assert found["answered"] + sum(found["failed"].values()) == found["requests"] == 600, name
        assert found["answered"] > 400, name
    assert len(outcome["figures"]["restarts_s"]) == 6


@pytest.mark.server
def test_the_examples_of_the_page_on_limits_run(server: RunningServer) -> None:
    page = (ROOT / "docs" / "client-limits.md").read_text(encoding="utf-8")
    namespace: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        here = example.replace("127.0.0.1:8001", server.grpc_url)
        here = here.replace("smollm2-135m-int4-awq", "llm").replace("minilm-l6-int8", "sentences")
        exec(compile(here, "docs/client-limits.md", "exec"), namespace)
    assert namespace["refused"] == 1
