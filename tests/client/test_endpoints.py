"""Several servers: which one gets a request, which are left alone, and how they come back."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from enginesmith_client import (
    AsyncClient,
    Client,
    ConnectError,
    DeadlineExceeded,
    ModelNotReady,
    Overloaded,
    Retry,
    TensorMetadata,
    TritonClientError,
)
from enginesmith_client._address import address_from_url
from enginesmith_client._calls import Calls
from enginesmith_client._dispatch import Dispatcher
from enginesmith_client._endpoints import AVOIDANCE_S, EJECTION_S, TIMEOUTS, Endpoint, Endpoints
from enginesmith_client.testing import FakeServer
from enginesmith_client.testing._transports import AsyncFakeTransport, FakeTransport

VALUES = [TensorMetadata("x", "FP32", (1,))]
DOWN = ConnectError("refused", unsent=True)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def endpoints_of(clock: Clock, names: str = "abc") -> Endpoints:
    return Endpoints(list(names), list(names), clock=clock)


def taken(endpoints: Endpoints, times: int, *, model: str = "m", tried: Sequence[Endpoint] = ()) -> str:
    return "".join(endpoints.take(model, tried=tried).name for _ in range(times))


def fake_servers(count: int) -> list[FakeServer]:
    servers = [FakeServer(url=f"grpc://server-{number}:1") for number in range(count)]
    for server in servers:
        server.add_model("same", lambda arrays: {"x": arrays["x"]}, inputs=VALUES, outputs=VALUES)
        server.add_llm("llm", "a b c")
    return servers


def client_of(servers: Sequence[FakeServer], retry: Retry = Retry(backoff_s=0.0)) -> Client:
    transports = [FakeTransport(server._backend) for server in servers]
    client = servers[0].client()
    client._calls = Calls(Dispatcher(addresses_of(servers), transports, retry=retry), 30.0)
    return client


def async_client_of(servers: Sequence[FakeServer]) -> AsyncClient:
    transports = [AsyncFakeTransport(server._backend) for server in servers]
    client = servers[0].async_client()
    client._calls = Calls(Dispatcher(addresses_of(servers), transports, retry=Retry(backoff_s=0.0)), 30.0)
    return client


def addresses_of(servers: Sequence[FakeServer]) -> list:
    return [address_from_url(server._backend.address) for server in servers]


def endpoints_in(client: Client | AsyncClient) -> Endpoints:
    return client._calls.dispatcher._endpoints


def ask(client: Client, **options: object) -> None:
    client.infer("same", {"x": np.ones(1, np.float32)}, **options)


def counts(servers: Sequence[FakeServer]) -> list[int]:
    return [len(server.requests) for server in servers]


def test_the_least_busy_server_is_chosen_and_equals_take_turns() -> None:
    endpoints = endpoints_of(Clock())
    assert sorted(taken(endpoints, 3)) == ["a", "b", "c"]
    endpoints.release(endpoints.all[1])
    assert taken(endpoints, 1) == "b"
    for endpoint in endpoints.all:
        endpoints.release(endpoint)
    one_after_the_other = []
    for _ in range(6):
        endpoint = endpoints.take("m")
        one_after_the_other.append(endpoint.name)
        endpoints.release(endpoint)
    assert sorted(one_after_the_other) == ["a", "a", "b", "b", "c", "c"]


def test_a_server_that_is_down_is_left_alone_for_longer_and_longer() -> None:
    clock = Clock()
    endpoints = endpoints_of(clock, "ab")
    down = endpoints.all[0]
    for failure in range(4):
        endpoints.failed(down, "m", DOWN)
        endpoints.failed(down, "m", DOWN)  # Of a request that was on its way at the same time: counts once.
        assert taken(endpoints, 3) == "bbb"
        clock.now_s += EJECTION_S * 2**failure - 0.001
        assert endpoints.due() is None
        clock.now_s += 0.002
        assert endpoints.due() is down
        endpoints.probed(down, alive=None)
    assert endpoints.due() is down
    assert endpoints.due() is None, "one call at a time finds out"
    endpoints.probed(down, alive=True)
    assert sorted(taken(endpoints, 10)).count("a") >= 5


def test_when_all_are_down_one_is_tried_nevertheless() -> None:
    endpoints = endpoints_of(Clock(), "ab")
    for endpoint in endpoints.all:
        endpoints.failed(endpoint, "m", DOWN)
    first = endpoints.take("m")
    assert taken(endpoints, 1, tried=[first]) != first.name


def test_the_only_server_is_never_left_alone() -> None:
    endpoints = endpoints_of(Clock(), "a")
    endpoints.failed(endpoints.all[0], "m", DOWN)
    assert endpoints.due() is None
    assert taken(endpoints, 1) == "a"


def test_a_server_without_the_model_is_avoided_for_this_model_only() -> None:
    clock = Clock()
    endpoints = endpoints_of(clock, "ab")
    endpoints.failed(endpoints.all[0], "m", ModelNotReady("unknown"))
    assert taken(endpoints, 2) == "bb"
    assert taken(endpoints, 2, model="other") == "aa"
    clock.now_s += AVOIDANCE_S
    endpoints.release(endpoints.all[0])
    endpoints.release(endpoints.all[0])
    assert taken(endpoints, 1) == "a"


def test_a_server_that_misses_deadlines_has_to_show_that_it_is_alive() -> None:
    endpoints = endpoints_of(Clock(), "ab")
    silent = endpoints.all[0]
    for _ in range(TIMEOUTS - 1):
        endpoints.failed(silent, "m", DeadlineExceeded("late"))
    endpoints.answered(silent, "m")
    for _ in range(TIMEOUTS - 1):
        endpoints.failed(silent, "m", DeadlineExceeded("late"))
    assert endpoints.due() is None
    endpoints.failed(silent, "m", DeadlineExceeded("late"))
    assert endpoints.due() is silent
    endpoints.probed(silent, alive=False)
    assert taken(endpoints, 2) == "bb"


def test_a_dead_server_costs_no_call_and_its_return_is_noticed() -> None:
    servers = fake_servers(2)
    with client_of(servers) as client:
        ask(client)
        servers[0].stop()
        for _ in range(6):
            ask(client)
        assert sum(counts(servers)) == 7
        servers[0].start()
        endpoints_in(client)._clock = lambda: float("inf")
        before = counts(servers)[0]
        for _ in range(4):
            ask(client)
        assert counts(servers)[0] == before + 2


def test_requests_that_may_have_run_do_not_go_to_another_server() -> None:
    servers = fake_servers(2)
    with client_of(servers) as client:
        client.metadata("same")
        for server in servers:
            server.fail("same", ConnectError("reset"))
        with pytest.raises(ConnectError, match="reset"):
            ask(client)
    assert sum(counts(servers)) == 1


def test_a_full_server_passes_the_request_on_within_the_budget() -> None:
    servers = fake_servers(3)
    patient = Retry(backoff_s=3600, max_backoff_s=3600, jitter=0)
    with client_of(servers, patient) as client:
        servers[0].overload("same", times=9)
        servers[1].overload("same", times=9)
        for _ in range(3):
            ask(client)
    with client_of(servers, Retry(attempts=1)) as client:
        for server in servers:
            server.overload("same", times=20)
        with pytest.raises(Overloaded):
            ask(client)


def test_a_model_that_is_not_on_every_server_is_found() -> None:
    servers = fake_servers(3)
    for server in servers[:2]:
        server.set_ready("same", False)
    with client_of(servers, Retry(attempts=1)) as client:
        for _ in range(5):
            ask(client)
        client.generate("llm", "hi")
    assert [len([one for one in server.requests if one.model == "same"]) for server in servers] == [0, 0, 5]


def test_readiness_is_that_of_any_server() -> None:
    servers = fake_servers(2)
    servers[0].stop()
    servers[1].set_ready("same", False)
    with client_of(servers) as client:
        assert client.is_ready()
        assert not client.is_ready("same")
        client.wait_ready("llm", timeout_s=5)
        servers[1].stop()
        with pytest.raises(ConnectError):
            client.is_ready()


def test_loading_and_unloading_reach_every_server() -> None:
    servers = fake_servers(2)
    with client_of(servers) as client:
        client.unload("same")
        assert [server.client().is_ready("same") for server in servers] == [False, False]
        client.load("same")
        assert [server.client().is_ready("same") for server in servers] == [True, True]
        servers[1].stop()
        with pytest.raises(TritonClientError, match="server-1"):
            client.load("same")


def test_a_sequence_stays_on_the_server_that_keeps_its_state() -> None:
    servers = fake_servers(3)
    with client_of(servers) as client:
        for number in (1, 2, 3):
            for step in range(4):
                ask(
                    client,
                    parameters={
                        "sequence_id": number,
                        "sequence_start": step == 0,
                        "sequence_end": step == 3,
                    },
                )
        assert not client._calls.dispatcher._sequences
    of_servers = [{one.parameters["sequence_id"] for one in server.requests} for server in servers]
    assert sorted(number for numbers in of_servers for number in numbers) == [1, 2, 3]


def test_streams_go_on_to_another_server_before_their_first_piece() -> None:
    servers = fake_servers(2)
    with client_of(servers) as client:
        client.metadata("llm")
        servers[0].stop()
        for _ in range(4):
            assert "".join(piece.text for piece in client.stream("llm", "hi")) == "a b c"
    assert counts(servers) == [0, 4]
    assert [endpoint.in_flight for endpoint in endpoints_in(client).all] == [0, 0]


def test_tasks_spread_over_the_servers_and_leave_nothing_counted() -> None:
    servers = fake_servers(2)

    async def scenario() -> None:
        async with async_client_of(servers) as client:
            await asyncio.gather(*(client.generate("llm", "hi") for _ in range(20)))
            servers[1].stop()
            await asyncio.gather(*(client.generate("llm", "hi") for _ in range(20)))
            assert [endpoint.in_flight for endpoint in endpoints_in(client).all] == [0, 0]

    asyncio.run(scenario())
    assert sum(counts(servers)) == 40
    assert counts(servers)[1] in range(5, 16)


def test_threads_leave_nothing_counted() -> None:
    servers = fake_servers(2)
    with client_of(servers) as client:
        threads = [
            threading.Thread(target=lambda: [ask(client) for _ in range(50)], name=str(number))
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        servers[0].stop()
        servers[0].start()
        for thread in threads:
            thread.join()
        assert [endpoint.in_flight for endpoint in endpoints_in(client).all] == [0, 0]
    assert sum(counts(servers)) == 200
