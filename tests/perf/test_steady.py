"""Which windows of a measurement count as steady."""

from collections.abc import Sequence

import pytest

from enginesmith_client.perf._profile import MeasurePart
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf.load._steady import Windows

NS = 1_000_000_000
MS = 1_000_000


def closed_records(per_s: Sequence[int], latency_ms: Sequence[float] | float = 1.0) -> list[Record]:
    """So many answers in each second, evenly spaced."""
    latencies = [latency_ms] * len(per_s) if isinstance(latency_ms, float) else list(latency_ms)
    ends = [
        (second * NS + NS * index // count + 1, latencies[second])
        for second, count in enumerate(per_s)
        for index in range(count)
    ]
    return [
        Record(number, round(end_ns - ms * MS), round(end_ns - ms * MS), end_ns)
        for number, (end_ns, ms) in enumerate(ends)
    ]


def steady(
    records: Sequence[Record],
    seconds: float,
    *,
    closed: bool = True,
    start_ns: int = 0,
    **measure: float,
) -> Window:
    """What is measured of records that end after so many seconds."""
    part = MeasurePart.model_validate({"window_s": 1, "windows": 3, "max_s": 100} | measure)
    windows = Windows(start_ns, part, closed=closed)
    for record in records:
        if not closed:
            windows.was_due(record.due_ns)
        if record.ok:
            windows.answered(record.ended_ns, latency_ns=record.latency_ns)
    end_ns = round(seconds * NS)
    return windows.agreed(end_ns) or windows.whole(end_ns, why="the records end here")


def test_the_first_windows_that_agree_are_measured() -> None:
    window = steady(closed_records([20, 100, 104, 98, 300]), 5)
    assert (window.start_ns, window.end_ns, window.steady) == (NS, 4 * NS, True)
    assert window.note == "3 windows of 1 s agreed within 3.3% (allowed: 10%)"


def test_throughput_that_changes_is_not_steady() -> None:
    window = steady(closed_records([100, 130, 170, 220]), 4)
    assert (window.start_ns, window.end_ns, window.steady) == (0, 4 * NS, False)
    assert "4 windows of 1 s, no 3 of which in a row agreed within 10%" in window.note


def test_latency_that_changes_is_not_steady_even_if_throughput_is() -> None:
    assert not steady(closed_records([100] * 4, [1.0, 1.3, 1.7, 2.2]), 4).steady
    assert steady(closed_records([100] * 4, [1.0, 2.0, 2.1, 2.0]), 4).start_ns == NS


def test_a_window_without_an_answer_is_not_steady() -> None:
    assert not steady(closed_records([0, 0, 0, 0]), 4).steady
    assert not steady([Record(0, 0, 0, NS // 2, "server")], 3).steady


def test_one_answer_more_is_where_the_window_ended() -> None:
    assert steady(closed_records([2, 3, 2]), 3).steady
    assert not steady(closed_records([2, 5, 2]), 3).steady


def test_random_arrivals_do_not_make_an_open_loop_unsteady() -> None:
    records = closed_records([40, 80, 60])
    assert not steady(records, 3).steady
    assert steady(records, 3, closed=False).steady


def test_an_open_loop_that_answers_less_and_less_is_not_steady() -> None:
    unanswered = [Record(1000 + n, 2 * NS + n, 2 * NS + n, 50 * NS, "deadline") for n in range(60)]
    assert not steady([*closed_records([60, 60, 60]), *unanswered], 3, closed=False).steady


def test_a_stall_that_is_rarer_than_the_windows_agree_is_missed_by_short_windows() -> None:
    stalls = [100, 100, 100, 100, 20] * 6
    short = steady(closed_records(stalls), 30)
    assert (short.steady, short.end_ns) == (True, 3 * NS)
    long = steady(closed_records(stalls), 30, window_s=10)
    assert (long.steady, long.end_ns) == (True, 30 * NS)


def test_a_measurement_too_short_for_its_windows_is_judged_by_its_parts() -> None:
    even = steady(closed_records([100] * 2), 1.5, window_s=5)
    assert (even.steady, even.end_ns) == (True, 3 * NS // 2)
    assert "3 parts of 0.5 s agree within 10%" in even.note
    uneven = steady(closed_records([10, 100]), 2, window_s=5)
    assert (uneven.steady, uneven.end_ns) == (False, 2 * NS)
    assert "do not agree" in uneven.note


def test_windows_begin_where_the_measurement_does() -> None:
    window = steady(closed_records([500, 500, 100, 100]), 4, start_ns=2 * NS, windows=2, max_s=10)
    assert (window.start_ns, window.end_ns, window.steady) == (2 * NS, 4 * NS, True)


@pytest.mark.parametrize("windows", [1, 2])
def test_nothing_after_max_s_is_measured(windows: int) -> None:
    window = steady(closed_records([100, 300, 100, 100]), 4, windows=windows, max_s=2)
    assert window.end_ns <= 2 * NS or not window.steady
