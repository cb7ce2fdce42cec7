"""What a client sends again, how often, and what it never does."""

import asyncio
import itertools
import threading
from collections.abc import Iterator

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
    Retry,
    ServerError,
    TensorMetadata,
    TritonClientError,
)
from enginesmith_client._retries import RetryBudget, is_safe, pause_s
from enginesmith_client.testing import FakeServer

AT_ONCE = Retry(backoff_s=0.0)
UNSENT = ConnectError("refused", unsent=True)
BROKEN = ConnectError("reset")
VALUES = [TensorMetadata("x", "FP32", (1,))]


@pytest.fixture
def server() -> FakeServer:
    fake = FakeServer()
    fake.add_llm("llm", "a b c")
    fake.add_model("same", lambda arrays: {"x": arrays["x"]}, inputs=VALUES, outputs=VALUES)
    return fake


def ask(client: Client, timeout_s: float = 30.0) -> None:
    client.infer("same", {"x": np.ones(1, np.float32)}, timeout_s=timeout_s)


def inferences(server: FakeServer) -> int:
    return len(server.requests)


@pytest.mark.parametrize(
    ("error", "repeatable", "served", "safe"),
    [
        (UNSENT, False, False, True),
        (BROKEN, False, True, False),
        (BROKEN, True, False, True),
        (Overloaded("full"), False, False, True),
        (ModelNotReady("gone"), False, True, True),
        (ModelNotReady("unknown"), True, False, False),
        (ServerError("raised"), False, True, False),
        (ServerError("raised"), True, True, True),
        (DeadlineExceeded("late"), True, True, False),
        (InvalidInput("wrong"), True, True, False),
        (Cancelled("ended"), True, True, False),
    ],
)
def test_only_what_cannot_run_twice_or_may_do_so_is_sent_again(
    error: TritonClientError, repeatable: bool, served: bool, safe: bool
) -> None:
    assert is_safe(error, repeatable=repeatable, served=served) is safe


def test_pauses_double_up_to_the_longest_and_are_drawn_from_the_whole_range() -> None:
    retry = Retry(backoff_s=0.1, max_backoff_s=0.5)
    longest = [pause_s(retry, UNSENT, retries=number, draw=lambda: 0.0) for number in range(5)]
    assert longest == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    assert pause_s(retry, UNSENT, retries=3, draw=lambda: 0.75) == pytest.approx(0.125)
    steady = Retry(backoff_s=0.1, jitter=0.0)
    assert pause_s(steady, UNSENT, retries=0, draw=lambda: 0.9) == pytest.approx(0.1)
    assert pause_s(steady, UNSENT, retries=10**6) == 2.0


def test_a_hint_of_the_server_is_the_least_that_is_waited() -> None:
    retry = Retry(backoff_s=0.1)
    assert pause_s(retry, Overloaded("full", retry_after_s=3.0), retries=0) == 3.0
    steady = Retry(backoff_s=0.1, jitter=0.0)
    assert pause_s(steady, Overloaded("full", retry_after_s=0.01), retries=0) == pytest.approx(0.1)


def test_a_budget_allows_a_burst_and_then_a_share_of_the_requests() -> None:
    budget = RetryBudget(Retry(budget_burst=2, budget_share=0.25))
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(4):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"backoff_s": -1},
        {"max_backoff_s": float("inf")},
        {"jitter": 2},
        {"budget_share": float("nan")},
        {"errors": (DeadlineExceeded,)},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="Retry"):
        Retry(**wrong)  # type: ignore[arg-type]


def test_a_full_queue_is_tried_again_and_the_last_error_says_how_often(server: FakeServer) -> None:
    with server.client(retry=AT_ONCE) as client:
        server.overload("same", times=2)
        ask(client)
        server.overload("same", times=3)
        with pytest.raises(Overloaded, match=r"\(tried 3 times\)") as caught:
            ask(client)
    assert caught.value.attempts == 3


def test_a_hint_beyond_the_deadline_ends_the_call_at_once(server: FakeServer) -> None:
    with server.client(retry=AT_ONCE) as client:
        for hint_s in (3600.0, float("inf")):
            server.overload("same", retry_after_s=hint_s)
            with pytest.raises(Overloaded) as caught:
                ask(client, timeout_s=60)
            assert (caught.value.attempts, caught.value.retry_after_s) == (1, hint_s)


def test_an_inference_that_may_have_run_is_sent_once_unless_it_is_idempotent(server: FakeServer) -> None:
    with server.client(retry=AT_ONCE) as client:
        server.fail("same", ConnectError("reset"))
        with pytest.raises(ConnectError, match="reset"):
            ask(client)
    assert inferences(server) == 1
    with server.client(retry=Retry(backoff_s=0, idempotent=True)) as client:
        server.fail("same", ConnectError("reset"), times=2)
        ask(client)
    assert inferences(server) == 4


def test_one_request_may_be_idempotent_where_the_client_says_nothing(server: FakeServer) -> None:
    x = {"x": np.ones(1, np.float32)}
    with server.client(retry=AT_ONCE) as client:
        server.fail("same", ConnectError("reset"))
        client.infer("same", x, idempotent=True)
    assert inferences(server) == 2
    with server.client(retry=Retry(backoff_s=0, idempotent=True)) as client:
        server.fail("same", ConnectError("reset"))
        with pytest.raises(ConnectError, match="reset"):
            client.infer("same", x, idempotent=False)
    assert inferences(server) == 3


def test_a_request_of_a_sequence_is_never_repeated(server: FakeServer) -> None:
    with server.client(retry=Retry(backoff_s=0, idempotent=True)) as client:
        server.fail("same", ConnectError("reset"))
        with pytest.raises(ConnectError):
            client.infer("same", {"x": np.ones(1, np.float32)}, parameters={"sequence_id": 5})
    assert inferences(server) == 1


def test_failures_of_the_model_are_tried_again_only_when_asked_for(server: FakeServer) -> None:
    with server.client(retry=Retry(backoff_s=0, idempotent=True)) as client:
        server.fail("same", ServerError("raised"))
        with pytest.raises(ServerError):
            ask(client)
    every = Retry(backoff_s=0, idempotent=True, errors=(ServerError,))
    with server.client(retry=every) as client:
        server.fail("same", ServerError("raised"), times=2)
        ask(client)
        server.overload("same")
        with pytest.raises(Overloaded):
            ask(client)


def test_a_model_that_changes_is_waited_for_and_an_unknown_one_is_not(server: FakeServer) -> None:
    with server.client(retry=AT_ONCE) as client:
        with pytest.raises(ModelNotReady) as caught:
            client.infer("smae", {})
        ask(client)
        server.fail("same", ModelNotReady("between two versions"), times=2)
        ask(client)
    assert caught.value.attempts == 1


def test_no_attempts_beyond_one_when_that_is_wanted(server: FakeServer) -> None:
    with server.client(retry=Retry(attempts=1)) as client:
        server.overload("same")
        with pytest.raises(Overloaded):
            ask(client)
    assert inferences(server) == 1


def test_an_exhausted_budget_ends_retries_for_all_calls(server: FakeServer) -> None:
    with server.client(retry=Retry(backoff_s=0, budget_burst=3, budget_share=0.0)) as client:
        server.overload("same", times=100)
        tries = []
        for _ in range(3):
            with pytest.raises(Overloaded) as caught:
                ask(client)
            tries.append(caught.value.attempts)
    assert tries == [3, 2, 1]


def test_a_stream_is_opened_again_only_before_its_first_piece(server: FakeServer) -> None:
    with server.client(retry=Retry(backoff_s=0, idempotent=True)) as client:
        server.overload("llm", times=2)
        assert "".join(piece.text for piece in client.stream("llm", "hi")) == "a b c"
        server.break_stream("llm", after=0)
        assert "".join(piece.text for piece in client.stream("llm", "hi")) == "a b c"
        before = inferences(server)
        server.break_stream("llm", after=1)
        pieces = []
        with pytest.raises(ConnectError, match="scripted to break"):
            pieces += [piece.text for piece in client.stream("llm", "hi")]
        assert inferences(server) == before + 1


def test_tasks_are_served_by_the_same_rules(server: FakeServer) -> None:
    async def scenario() -> None:
        async with server.async_client(retry=AT_ONCE) as client:
            server.overload("llm", times=2)
            assert (await client.generate("llm", "hi")).text == "a b c"
            server.overload("llm", times=2)
            assert "".join([piece.text async for piece in client.stream("llm", "hi")]) == "a b c"
            server.overload("llm", times=3)
            with pytest.raises(Overloaded, match=r"\(tried 3 times\)"):
                await client.generate("llm", "hi")

    asyncio.run(scenario())


@pytest.fixture
def gate(server: FakeServer) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The model ``held`` sets the first event when it has a request, and answers when the second is set."""
    entered, opened = threading.Event(), threading.Event()

    def answer(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        entered.set()
        assert opened.wait(30)
        return {"x": arrays["x"]}

    server.add_model("held", answer, inputs=VALUES, outputs=VALUES)
    yield entered, opened
    opened.set()


def test_closing_waits_for_running_calls_and_refuses_new_ones(
    server: FakeServer, gate: tuple[threading.Event, threading.Event]
) -> None:
    entered, opened = gate
    client = server.client()
    answers: list[object] = []
    call = threading.Thread(
        target=lambda: answers.append(client.infer("held", {"x": np.ones(1, np.float32)}))
    )
    call.start()
    assert entered.wait(30)
    closing = threading.Thread(target=client.close, kwargs={"drain_s": 60})
    closing.start()
    while not client._calls.closed:
        pass
    with pytest.raises(InvalidInput, match="is closed"):
        client.is_ready()
    assert closing.is_alive()
    opened.set()
    call.join()
    closing.join()
    assert len(answers) == 1


def test_a_call_between_two_attempts_is_cancelled_when_its_client_closes(server: FakeServer) -> None:
    client = server.client(retry=Retry(attempts=5))
    server.overload("same", times=5, retry_after_s=600)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            ask(client, timeout_s=6000)
        except TritonClientError as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while not client._calls.dispatcher.running._pauses:
        pass
    client.close(drain_s=0.01)
    thread.join(30)
    assert [type(failure) for failure in failures] == [Cancelled]


def test_tasks_drain_in_the_same_way(server: FakeServer) -> None:
    async def scenario() -> None:
        client = server.async_client(retry=Retry(attempts=5))
        server.overload("llm", times=1, retry_after_s=0.05)
        finishing = asyncio.create_task(client.generate("llm", "hi"))
        while not client._calls.dispatcher.running._pauses:
            await asyncio.sleep(0)
        await client.close(drain_s=30)
        assert (await finishing).text == "a b c"

        client = server.async_client(retry=Retry(attempts=5))
        server.overload("llm", times=1, retry_after_s=50)
        waiting = asyncio.create_task(client.generate("llm", "hi"))
        while not client._calls.dispatcher.running._pauses:
            await asyncio.sleep(0)
        await client.close(drain_s=0.01)
        with pytest.raises(Cancelled, match="closed while the call was running"):
            await waiting

    asyncio.run(scenario())


def test_a_stream_that_is_left_does_not_hold_up_closing(server: FakeServer) -> None:
    client = server.client()
    with client.stream("llm", "hi") as stream:
        assert next(iter(stream)).text
    for piece in itertools.islice(client.stream("llm", "hi"), 1):
        assert piece.text
    assert client._calls.dispatcher.running._running == 0
    client.close(drain_s=3600)
