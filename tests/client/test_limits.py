"""Rate limits: what waits, for how long, in which order, and what is given back."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from enginesmith_client import AsyncClient, Client, InvalidInput, Overloaded, RateLimit
from enginesmith_client._limits import Ticket, tokens_of_reply, tokens_of_request
from enginesmith_client._messages import InferReply, InferRequest, WireTensor
from enginesmith_client.testing import FakeServer


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def request_of(*tensors: WireTensor) -> InferRequest:
    return InferRequest("m", "", "", tensors, (), {})


def text(name: str, *texts: str) -> WireTensor:
    encoded = [one.encode() for one in texts]
    data = b"".join(len(one).to_bytes(4, "little") + one for one in encoded)
    return WireTensor(name, "BYTES", (len(texts), 1), data)


def count(name: str, *values: int) -> WireTensor:
    return WireTensor(name, "INT32", (len(values), 1), np.array(values, np.int32).tobytes())


def enter_all(limit: RateLimit, costs: list[float]) -> list[Ticket]:
    return [limit.enter(cost, remaining_s=1e6) for cost in costs]


def test_a_burst_goes_at_once_and_the_next_request_waits_for_its_share_of_a_second() -> None:
    clock = Clock()
    limit = RateLimit(4.0, burst_requests=2, clock=clock)
    tickets = enter_all(limit, [0, 0, 0])
    assert [ticket.admitted for ticket in tickets] == [True, True, False]
    assert limit.poll(tickets[2]) == pytest.approx(0.25)
    clock.now_s += 0.25
    assert limit.poll(tickets[2]) == 0
    assert tickets[2].admitted


def test_the_scarcer_of_requests_and_tokens_decides() -> None:
    clock = Clock()
    limit = RateLimit(1000.0, 10.0, burst_tokens=10, clock=clock)
    first, second = enter_all(limit, [10, 5])
    assert first.admitted
    assert limit.poll(second) == pytest.approx(0.5)


def test_nobody_overtakes_even_when_there_is_room_for_the_smaller_one() -> None:
    clock = Clock()
    limit = RateLimit(None, 10.0, burst_tokens=10, clock=clock)
    _, large, small = enter_all(limit, [10, 10, 1])
    clock.now_s += 0.5
    assert limit.poll(small) == float("inf")
    assert limit.poll(large) == pytest.approx(0.5)
    clock.now_s += 0.5
    assert limit.poll(large) == 0
    assert small.signal._event.is_set()
    assert limit.poll(small) == pytest.approx(0.1)


def test_who_cannot_be_in_time_is_refused_at_once_and_takes_no_place() -> None:
    clock = Clock()
    limit = RateLimit(1.0, clock=clock)
    enter_all(limit, [0, 0])
    with pytest.raises(Overloaded, match=r"no room within 1\.5 s") as caught:
        limit.enter(0, remaining_s=1.5)
    assert caught.value.retry_after_s == pytest.approx(2.0)
    assert limit.poll(limit.enter(0, remaining_s=2.5)) == float("inf")


def test_who_leaves_the_queue_makes_room_for_those_behind() -> None:
    clock = Clock()
    limit = RateLimit(None, 10.0, burst_tokens=10, clock=clock)
    _, leaving, waiting = enter_all(limit, [10, 100, 5])
    limit.poll(waiting)
    limit.leave(leaving)
    assert waiting.signal._event.is_set()
    assert limit.poll(waiting) == pytest.approx(0.5)


def test_an_estimate_is_settled_by_the_real_count_in_both_directions() -> None:
    clock = Clock()
    limit = RateLimit(None, 10.0, burst_tokens=100, clock=clock)
    first, waiting = enter_all(limit, [100, 60])
    assert limit.poll(waiting) == pytest.approx(6.0)
    limit.settle(first, 20)
    assert waiting.signal._event.is_set()
    assert limit.poll(waiting) == 0
    limit.settle(waiting, 90)
    assert limit.poll(limit.enter(10, remaining_s=60)) == pytest.approx(2.0)


def test_a_request_of_more_than_the_burst_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    clock = Clock()
    limit = RateLimit(None, 10.0, burst_tokens=10, clock=clock)
    assert limit.enter(30, remaining_s=0.0).admitted
    assert limit.poll(limit.enter(10, remaining_s=60)) == pytest.approx(3.0)


def test_a_clock_that_jumps_gives_at_most_the_burst_and_takes_nothing() -> None:
    clock = Clock()
    limit = RateLimit(10.0, burst_requests=2, clock=clock)
    assert all(ticket.admitted for ticket in enter_all(limit, [0, 0]))
    clock.now_s -= 1e6
    waiting = limit.enter(0, remaining_s=1.0)
    assert limit.poll(waiting) == pytest.approx(0.1)
    clock.now_s += 1e9
    assert limit.poll(waiting) == 0
    assert [ticket.admitted for ticket in enter_all(limit, [0, 0])] == [True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"requests_per_s": 0},
        {"requests_per_s": float("nan")},
        {"tokens_per_s": float("inf")},
        {"requests_per_s": 1, "burst_requests": 0.5},
        {"requests_per_s": 1, "burst_tokens": 10},
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        RateLimit(**wrong)


def test_tokens_are_estimated_from_the_prompt_and_max_tokens() -> None:
    def tokens(*tensors: WireTensor) -> float:
        return tokens_of_request(request_of(*tensors), default_max_tokens=50)

    assert tokens(text("text_input", "x" * 40), count("max_tokens", 16)) == 26
    assert tokens(text("messages", "x" * 40)) == 60
    assert tokens(text("TEXT", "x" * 40, "y" * 40)) == 20
    assert tokens(text("text_input", "x" * 40, "y" * 40), count("max_tokens", 16, 8)) == 44
    assert tokens(count("input_ids", 5, 6, 7)) == 3
    assert tokens(count("temperature", 5)) == 0


def test_tokens_are_counted_only_where_the_answer_gives_both_counts() -> None:
    both = InferReply("m", "1", "", (count("num_input_tokens", 3), count("num_output_tokens", 4)))
    one = InferReply("m", "1", "", (count("num_output_tokens", 4),))
    assert tokens_of_reply(both) == 7
    assert tokens_of_reply(one) is None


def test_one_limit_is_shared_by_threads_tasks_and_clients() -> None:
    server = FakeServer()
    server.add_llm("llm", "a b c")
    limit = RateLimit(1e-6, burst_requests=12)

    def ask(client: Client) -> bool:
        try:
            client.generate("llm", "hi", timeout_s=5)
        except Overloaded:
            return False
        return True

    async def ask_async(client: AsyncClient) -> bool:
        try:
            await client.generate("llm", "hi", timeout_s=5)
        except Overloaded:
            return False
        return True

    async def tasks() -> list[bool]:
        async with server.async_client(limit=limit) as client:
            return list(await asyncio.gather(*(ask_async(client) for _ in range(8))))

    with server.client(limit=limit) as one, server.client(limit=limit) as two, ThreadPoolExecutor(4) as pool:
        in_tasks = pool.submit(asyncio.run, tasks())
        in_threads = list(pool.map(ask, [one, two] * 4))
        assert sum(in_threads) + sum(in_tasks.result()) == 12
    assert len(server.requests) == 12


def test_the_counts_of_an_answer_settle_the_estimate_of_a_client() -> None:
    server = FakeServer()
    server.add_llm("llm", "a b c")
    limit = RateLimit(None, 1e-6, burst_tokens=100)
    with server.client(limit=limit) as client:
        for _ in range(4):
            client.generate("llm", "hi", max_tokens=80, timeout_s=5)
        with client.stream("llm", "hi", max_tokens=80, timeout_s=5) as stream:
            assert "".join(piece.text for piece in stream) == "a b c"
        client.generate("llm", "hi", max_tokens=70, timeout_s=5)


def test_a_request_that_no_server_took_costs_no_tokens() -> None:
    server = FakeServer()
    server.add_llm("llm", "a b c")
    limit = RateLimit(None, 1e-6, burst_tokens=100)
    with server.client(limit=limit) as client:
        server.overload("llm", times=9)
        for _ in range(3):
            with pytest.raises(Overloaded, match="queue"):
                client.generate("llm", "hi", max_tokens=90, timeout_s=5)
        client.generate("llm", "hi", max_tokens=90, timeout_s=5)


def test_threads_that_wait_are_served_in_the_order_in_which_they_came() -> None:
    limit = RateLimit(200.0, burst_requests=1)
    server = FakeServer()
    server.add_llm("llm", "a")
    with server.client(limit=limit) as client:
        client.metadata("llm")
        client.generate("llm", "first")
        threads = []
        for number in range(6):
            thread = threading.Thread(target=client.generate, args=("llm", str(number)))
            thread.start()
            threads.append(thread)
            # The next one comes when this one has its place, or has gone through already.
            while len(server.requests) + len(limit._waiting) < number + 2:
                time.sleep(0.001)
        for thread in threads:
            thread.join()
    prompts = [request.inputs["text_input"].item().decode() for request in server.requests]
    assert prompts == ["first", *map(str, range(6))]


def test_a_task_that_is_cancelled_while_it_waits_leaves_the_queue() -> None:
    server = FakeServer()
    server.add_llm("llm", "a")
    limit = RateLimit(0.001, burst_requests=1)

    async def scenario() -> None:
        async with server.async_client(limit=limit) as client:
            await client.generate("llm", "hi")
            waiting = asyncio.create_task(client.generate("llm", "hi", timeout_s=5000))
            while not limit._waiting:
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not limit._waiting

    asyncio.run(scenario())
