"""When a load is looked at again: right when its warm-up, a window or the measurement can be over."""

from loads import closed, profile

from enginesmith_client.perf.load._measured import SETTLE_NS, Measured

MS = 1_000_000


def test_it_is_looked_at_when_the_warm_up_or_the_next_window_ends() -> None:
    measured = Measured(profile(closed(1), warmup_s=1, window_s=2, windows=2, max_s=5), 500 * MS)
    assert measured.decides_ns == 1500 * MS + SETTLE_NS
    measured.advance(1600 * MS, answered=1)
    seen = []
    for second in (1, 2, 4):
        measured.advance(1600 * MS + second * 1000 * MS + SETTLE_NS, answered=1)
        seen.append(measured.decides_ns - SETTLE_NS)
    assert seen == [3600 * MS, 5600 * MS, 6600 * MS], "the last window is cut by max_s"


def test_a_window_that_agrees_ends_the_load_when_it_is_looked_at() -> None:
    measured = Measured(profile(closed(1), window_s=2, windows=1, max_s=9), 0)
    measured.ended(MS, latency_ns=MS, ok=True)
    assert measured.advance(measured.decides_ns - 1, answered=1) is None
    assert measured.advance(measured.decides_ns, answered=1) is not None


def test_the_windows_of_a_trace_decide_nothing() -> None:
    trace = {"loop": "open", "arrivals": {"kind": "trace", "file": "trace.csv"}}
    measured = Measured(profile(trace, window_s=2, windows=1, max_s=9), 0)
    assert measured.decides_ns == 9000 * MS + SETTLE_NS
