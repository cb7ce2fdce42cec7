"""A server that stands still for a second in every ten: the open loop shows it, the closed loop hides it."""

import asyncio

import numpy as np
import pytest
from loads import closed, constant, loaded, profile
from perf_models import PerfServer

from enginesmith_client.perf._records import Record
from enginesmith_client.perf.load._loops import Loop

pytestmark = pytest.mark.server
SECONDS = 30.0


def p99_ms(loop: Loop, records: list[Record], *, by_end: bool) -> float:
    window = loop.window
    moments = [(record.ended_ns if by_end else record.due_ns, record) for record in records]
    measured = [record for at_ns, record in moments if window.start_ns <= at_ns < window.end_ns]
    assert all(record.ok for record in measured)
    return float(np.percentile([record.latency_ns for record in measured], 99)) / 1e6


def test_only_the_open_loop_shows_a_server_that_stalls(perf_server: PerfServer) -> None:
    whole = {"window_s": SECONDS, "max_s": SECONDS}

    async def both() -> tuple[tuple[Loop, list[Record]], tuple[Loop, list[Record]]]:
        target = perf_server.target("stalling")
        return await asyncio.gather(
            loaded(target, profile(constant(40), **whole)), loaded(target, profile(closed(1), **whole))
        )

    opened, shut = asyncio.run(both())
    assert p99_ms(*opened, by_end=False) >= 850
    # A tenth of what users wait is not in it: while the server stood still, nobody asked.
    assert p99_ms(*shut, by_end=True) < 200
    assert max(record.latency_ns for record in shut[1]) > 850e6
