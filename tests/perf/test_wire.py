"""What the generator reads of answers, and its timer."""

import asyncio
import os
import sys
import time
from typing import Any

import grpc
import numpy as np
import pytest
from grpc.framework.foundation import logging_pool
from loads import closed, constant, load, profile
from perf_models import PerfServer, tensor_request
from tritonclient.grpc import service_pb2

from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts
from enginesmith_client.perf.load._timer import Timer
from enginesmith_client.perf.load._wire import Answer, Wire

MS = 1_000_000


def counted_request(count: int) -> Prepared:
    """For ``tiny``, which returns the bits that it gets: the answer's first four bytes are ``count``."""
    message = service_pb2.ModelInferRequest.FromString(tensor_request().message)
    message.raw_input_contents[0] = np.array([count, 0, 0, 0], np.int32).tobytes()
    return Prepared(message.SerializeToString(), counts=TokenCounts("nothing", "out"), prompt_tokens=3)


@pytest.mark.server
def test_tokens_are_counted_by_the_outputs_of_an_answer_that_is_whole(perf_server: PerfServer) -> None:
    _, records = load(perf_server.target("tiny"), profile(closed(1)), request=counted_request(1234))
    assert {(record.outcome, record.output_tokens) for record in records} == {("ok", 1234)}
    # The model has no output with that name, so what was intended stands.
    assert {record.prompt_tokens for record in records} == {3}


@pytest.mark.server
def test_an_answer_has_the_moments_at_which_it_went_and_came(perf_server: PerfServer) -> None:
    async def asked() -> tuple[int, Answer, int]:
        wire = Wire(perf_server.target("steady20"), timeout_s=20, headers={"x-run": "1"})
        try:
            assert await wire.connect(timeout_s=20)
            before_ns = time.monotonic_ns()
            answer = await wire.send(tensor_request("steady20"))
            return before_ns, answer, time.monotonic_ns()
        finally:
            await wire.close()

    before_ns, answer, after_ns = asyncio.run(asked())
    assert before_ns <= answer.sent_ns <= answer.ended_ns - 20 * MS
    assert answer.ended_ns <= after_ns


@pytest.mark.server
def test_a_wire_that_is_closed_answers_that_it_was_cancelled(perf_server: PerfServer) -> None:
    async def asked() -> Answer:
        wire = Wire(perf_server.target("tiny"), timeout_s=20, headers={})
        await wire.close()
        return await wire.send(tensor_request())

    assert asyncio.run(asked()).outcome == "cancelled"


class _Unreadable(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers with an error whose words are not UTF-8."""

    def service(self, call: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda requests, _: iter([b"\x0a\x02\xff\xfe"]))


@pytest.mark.parametrize("wanted", [closed(1), constant(50)])
def test_an_answer_that_cannot_be_read_is_a_failed_request(wanted: dict[str, Any]) -> None:
    with logging_pool.pool(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers([_Unreadable()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            target = Target("tiny", f"grpc://127.0.0.1:{port}")
            _, records = load(target, profile(wanted), request=Prepared(b"", streaming=True))
        finally:
            server.stop(grace=None).wait()
    assert {record.outcome for record in records} == {"server"}
    assert "the answer cannot be read" in records[0].error


def test_a_server_that_does_not_accept_connections_is_not_waited_for_without_an_end() -> None:
    async def reached() -> bool:
        wire = Wire(Target("tiny", "grpc://127.0.0.1:1"), timeout_s=1, headers={})
        try:
            return await wire.connect(timeout_s=0.05)
        finally:
            await wire.close()

    assert not asyncio.run(reached())


@pytest.mark.parametrize("platform", ["linux", "without timerfd"])
def test_the_timer_never_wakes_early_and_does_not_wait_for_the_past(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    async def waited() -> None:
        timer = Timer()
        try:
            for delay_ns in (0, -5 * MS, 3 * MS, 300_000, 10 * MS):
                at_ns = time.monotonic_ns() + delay_ns
                await timer.until(at_ns)
                assert time.monotonic_ns() >= at_ns
        finally:
            timer.close()

    asyncio.run(waited())


def test_a_timer_gives_its_file_back() -> None:
    async def used() -> tuple[int, int]:
        before = len(os.listdir("/proc/self/fd"))
        timer = Timer()
        await timer.until(time.monotonic_ns() + MS)
        timer.close()
        timer.close()
        return before, len(os.listdir("/proc/self/fd"))

    before, after = asyncio.run(used())
    assert before == after
