"""The generator against a real tritonserver: what it measures, when it ends, and what it keeps when things go wrong."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loads import closed, constant, load, loaded, profile
from perf_models import PerfServer, tensor_request, text_request

from enginesmith.triton.server import TritonServer
from enginesmith_client import InvalidInput
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._progress import Progress
from enginesmith_client.perf._records import Record, read_records
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._loops import Loop
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts
from enginesmith_client.perf.load._wire import Wire

pytestmark = pytest.mark.server
NS = 1_000_000_000
Start = Callable[..., AbstractContextManager[TritonServer]]


def test_a_closed_loop_keeps_so_many_requests_in_flight(perf_server: PerfServer) -> None:
    loop, records = load(perf_server.target("steady20"), profile(closed(4)))
    assert (loop.status, loop.window.start_ns < loop.window.end_ns) == ("complete", True)
    assert [record.number for record in records] == list(range(len(records)))
    assert all(record.ok and record.due_ns == record.sent_ns for record in records)
    assert min(record.latency_ns for record in records) >= 20e6
    edges = [(record.sent_ns, 1) for record in records] + [(record.ended_ns, -1) for record in records]
    assert max(np.cumsum([step for _, step in sorted(edges)])) == 4


def test_an_open_loop_sends_when_requests_are_due_whatever_the_server_does(perf_server: PerfServer) -> None:
    # A request takes 20 ms at the least, so without overlap 15 would be answered.
    loop, records = load(perf_server.target("steady20"), profile(constant(200)))
    due_ns = [record.due_ns for record in records]
    assert np.diff(due_ns).tolist() == [5_000_000] * (len(records) - 1)
    assert len(records) >= 60
    assert all(record.ok and record.sent_ns >= record.due_ns for record in records)
    assert loop.window == loop.window.__class__(
        loop.window.start_ns, loop.window.end_ns, True, loop.window.note
    )


def test_latency_counts_from_when_the_request_was_due_and_not_from_when_it_was_sent(
    perf_server: PerfServer,
) -> None:
    burst = {"loop": "open", "arrivals": {"kind": "burst", "size": 200}, "rate_per_s": 1000}
    _, records = load(perf_server.target("tiny"), profile(burst))
    first = [record for record in records if record.due_ns == records[0].due_ns]
    lags_ns = [record.lag_ns for record in first]
    assert len(first) == 200
    assert lags_ns == sorted(lags_ns)
    assert lags_ns[0] < lags_ns[-1]
    assert all(record.latency_ns == record.ended_ns - record.due_ns for record in first)


def test_a_stream_has_a_time_for_each_token_and_counts_from_the_server(perf_server: PerfServer) -> None:
    _, records = load(
        perf_server.target("tokens"), profile(closed(2)), request=text_request("one two three", tokens=6)
    )
    for record in records:
        assert (record.outcome, record.prompt_tokens, record.output_tokens) == ("ok", 3, 6)
        assert len(record.piece_ns) == 6
        assert record.ttft_ns is not None
        assert record.ttft_ns >= 2e6
        assert list(record.piece_ns) == sorted(record.piece_ns)
        assert record.piece_ns[-1] == record.ended_ns


def test_a_stream_that_does_not_count_counts_as_many_tokens_as_it_has_pieces(perf_server: PerfServer) -> None:
    request = text_request("one", tokens=5)
    silent = Prepared(request.message, streaming=True, prompt_tokens=40)
    summed = Prepared(
        request.message, streaming=True, counts=TokenCounts(None, "num_output_tokens", counts_pieces=True)
    )
    whole = Prepared(request.message, streaming=True, counts=TokenCounts(pieces_are_tokens=False))
    for prepared, tokens in ((silent, 5), (summed, 1 + 2 + 3 + 4 + 5), (whole, None)):
        _, records = load(perf_server.target("tokens"), profile(closed(1)), request=prepared)
        assert {record.output_tokens for record in records} == {tokens}
        assert {record.prompt_tokens for record in records} == {prepared.prompt_tokens}


def test_a_stream_that_fails_in_the_middle_keeps_its_pieces(perf_server: PerfServer) -> None:
    wanted = profile(closed(1), max_requests=3)
    _, records = load(perf_server.target("tokens"), wanted, request=text_request("fail", tokens=6))
    assert {(record.outcome, len(record.piece_ns)) for record in records} == {("invalid", 1)}
    assert "asked to fail" in records[0].error


def test_windows_that_agree_end_the_run(perf_server: PerfServer) -> None:
    wanted = profile(closed(2), window_s=0.4, windows=3, max_s=20, stability_percent=50, warmup_s=0.2)
    loop, _ = load(perf_server.target("steady20"), wanted)
    assert loop.ended_because.startswith("steady: 3 windows of 0.4 s agreed within ")
    assert loop.window.steady
    assert loop.window.end_ns - loop.window.start_ns == 1.2 * NS
    assert loop.window.start_ns >= 0.2 * NS
    assert 0 < loop.client_cpu_s < 1.2 * (os.cpu_count() or 1)
    assert abs(loop.wall_vs_monotonic_s) < 0.1


def test_max_s_ends_a_run_that_is_not_steady(perf_server: PerfServer) -> None:
    wanted = profile(closed(1), window_s=0.1, windows=3, stability_percent=1e-9)
    loop, _ = load(perf_server.target("steady20"), wanted)
    assert (loop.status, loop.ended_because) == ("complete", "max_s: 0.3 s were measured")
    assert not loop.window.steady
    assert loop.window.end_ns - loop.window.start_ns == 3 * NS // 10


@pytest.mark.parametrize(("wanted", "by_end"), [(closed(3), True), (constant(100), False)])
def test_max_requests_are_measured_and_no_more(
    perf_server: PerfServer, wanted: dict[str, Any], by_end: bool
) -> None:
    loop, records = load(
        perf_server.target("steady20"), profile(wanted, max_s=20, window_s=20, max_requests=10)
    )
    assert loop.ended_because == "max_requests: 10 requests were measured"
    moments = [record.ended_ns if by_end else record.due_ns for record in records]
    measured = [at_ns for at_ns in moments if loop.window.start_ns <= at_ns < loop.window.end_ns]
    # Answers of a batch come in the same moment, and a window ends between moments.
    assert sum(at_ns < max(measured) for at_ns in measured) < 10 <= len(measured)
    assert all(record.ok for record in records)


def test_the_warm_up_waits_for_answers(perf_server: PerfServer) -> None:
    loop, records = load(
        perf_server.target("steady20"), profile(closed(1), warmup_requests=5, max_requests=1, max_s=20)
    )
    assert sum(record.ended_ns < loop.window.start_ns for record in records) >= 5


def test_a_cold_start_is_measured_from_its_first_request(perf_server: PerfServer) -> None:
    wanted = profile(closed(1), start="cold", warmup_s=5, window_s=0.2, max_s=10, stability_percent=100)
    loop, records = load(perf_server.target("steady20"), wanted)
    assert loop.window.start_ns <= records[0].sent_ns
    assert loop.window.steady


def test_a_trace_is_replayed_whole(perf_server: PerfServer, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(f'{{"at_s": {at_s}}}\n' for at_s in (0.0, 0.1, 0.1, 0.3)))
    wanted = profile(
        {"loop": "open", "arrivals": {"kind": "trace", "file": str(file)}}, window_s=0.05, max_s=9
    )
    loop, records = load(perf_server.target("tiny"), wanted)
    assert loop.ended_because == "the trace is over"
    start_ns = records[0].due_ns
    assert [record.due_ns - start_ns for record in records] == [0, NS // 10, NS // 10, 3 * NS // 10]
    assert all(loop.window.start_ns <= record.due_ns < loop.window.end_ns for record in records)


def test_a_trace_that_is_missing_is_an_error_before_anything_is_sent(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    arrivals = {"kind": "trace", "file": str(tmp_path / "none.jsonl")}
    with pytest.raises(ProfileError, match="cannot be read"):
        load(perf_server.target("tiny"), profile({"loop": "open", "arrivals": arrivals}))


def test_progress_is_told_through_all_phases(perf_server: PerfServer) -> None:
    told: list[Progress] = []
    wanted = profile(closed(2), warmup_s=0.3, drain_s=5)
    load(perf_server.target("steady20"), wanted, on_progress=told.append)
    phases = [progress.phase for progress in told]
    assert list(dict.fromkeys(phases)) == ["warming up", "measuring", "draining", "done"]
    last = told[-1]
    assert (last.title, last.failed, last.in_flight) == ("a test", 0, 0)
    assert last.p50_ms is not None
    assert last.p50_ms >= 20


def test_an_unknown_model_ends_the_run_with_every_request_recorded(perf_server: PerfServer) -> None:
    wanted = profile(closed(4), max_s=60, window_s=60)
    loop, records = load(perf_server.target("nothing"), wanted, request=tensor_request("nothing"))
    assert (loop.status, loop.window.steady) == ("partial", False)
    assert loop.ended_because.startswith("server lost: the last ")
    assert "(not_ready)" in loop.ended_because
    assert {record.outcome for record in records} == {"not_ready"}
    # Each of the four waits longer after each failure, up to 0.1 s; without that it would be thousands.
    assert 20 <= len(records) <= 200


def test_a_server_that_is_killed_leaves_a_partial_run(own_server: Start) -> None:
    with own_server("tiny") as server:
        target = Target("tiny", f"grpc://{server.grpc_url}")
        asked: set[str] = set()

        def kill_after(name: str) -> Callable[[Progress], None]:
            def look(progress: Progress) -> None:
                if progress.answered >= 10:
                    asked.add(name)
                if asked == {"closed", "open"}:
                    asked.add("killed")
                    os.kill(server.pid, signal.SIGKILL)

            return look

        async def both() -> list[tuple[Loop, list[Record]]]:
            return await asyncio.gather(
                *[
                    loaded(target, profile(wanted, max_s=60, window_s=60), on_progress=kill_after(name))
                    for name, wanted in (("closed", closed(2)), ("open", constant(50)))
                ]
            )

        runs = asyncio.run(both())
    for loop, records in runs:
        assert loop.status == "partial"
        assert "server lost" in loop.ended_because
        assert "(connect)" in loop.ended_because
        assert sum(record.ok for record in records) >= 10
        assert not records[-1].ok
        assert loop.window.end_ns >= records[0].ended_ns


def test_a_server_that_is_not_there_ends_the_run() -> None:
    target = Target("tiny", "grpc://127.0.0.1:1")
    loop, records = load(target, profile(constant(50), timeout_s=0.3, max_s=60, window_s=60))
    assert (loop.status, {record.outcome for record in records}) == ("partial", {"connect"})


def test_requests_that_take_too_long_are_deadlines(perf_server: PerfServer) -> None:
    wanted = profile(closed(2), timeout_s=0.01, max_requests=4)
    _, records = load(perf_server.target("steady20"), wanted)
    assert {record.outcome for record in records} == {"deadline"}
    assert all(record.latency_ns >= 9e6 for record in records)


def test_more_waiting_answers_than_allowed_end_the_run(perf_server: PerfServer) -> None:
    wanted = profile(constant(400, max_in_flight=3), max_s=60, window_s=60)
    loop, records = load(perf_server.target("steady20"), wanted)
    assert loop.status == "partial"
    assert loop.ended_because.startswith("server lost: more than max_in_flight=3 requests")
    # Their answers came all the same, and were waited for.
    assert all(record.ok for record in records)


def test_answers_that_do_not_come_in_time_after_the_end_are_recorded_as_such(perf_server: PerfServer) -> None:
    for wanted in (closed(2), constant(50)):
        loop, records = load(
            perf_server.target("tokens"),
            profile(wanted, drain_s=0.05),
            request=text_request("one", tokens=2000),
        )
        assert loop.status == "complete"
        assert {record.outcome for record in records} == {"cancelled"}
        assert records[0].error == "no answer 0.05 s after the load ended"


@pytest.mark.parametrize("wanted", [closed(2), constant(50)])
def test_an_interrupt_ends_the_waiting_for_the_last_answers(
    perf_server: PerfServer, wanted: dict[str, Any]
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.phase == "draining":
            signal.raise_signal(signal.SIGINT)

    loop, records = load(
        perf_server.target("tokens"),
        profile(wanted, drain_s=600, timeout_s=600),
        request=text_request("one", tokens=200_000),
        on_progress=interrupt,
    )
    assert (loop.status, loop.ended_because) == (
        "partial",
        "interrupted while the last answers were waited for",
    )
    assert {record.outcome for record in records} == {"cancelled"}


@pytest.mark.parametrize("wanted", [closed(2), constant(50)])
def test_a_run_that_is_stopped_keeps_what_it_has(perf_server: PerfServer, wanted: dict[str, Any]) -> None:
    async def stopped() -> tuple[Any, list[Record]]:
        stop = asyncio.Event()

        def tell(progress: Progress) -> None:
            if progress.answered >= 5:
                stop.set()

        return await loaded(
            perf_server.target("steady20"),
            profile(wanted, max_s=60, window_s=60),
            on_progress=tell,
            stop=stop,
        )

    loop, records = asyncio.run(stopped())
    assert (loop.status, loop.ended_because) == ("partial", "interrupted")
    assert sum(record.ok for record in records) >= 5


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from loads import constant, load, profile
from enginesmith_client.perf._records import RecordWriter
from enginesmith_client.perf._target import Target

with RecordWriter(Path({file!r})) as writer:
    loop, _ = load(
        Target("steady20", {url!r}),
        profile(constant(50), max_s=60, window_s=60),
        write=writer.write,
        on_progress=lambda progress: print(progress.answered, flush=True),
    )
print(loop.status, loop.ended_because)
"""


def test_ctrl_c_ends_a_run_and_its_records_are_kept(perf_server: PerfServer, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    code = INTERRUPTED.format(
        tests=str(Path(__file__).parent), file=str(file), url=perf_server.target("tiny").url
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 5:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert rest.splitlines()[-1] == "partial interrupted"
    assert sum(record.ok for record in read_records(file)) >= 5


def test_a_record_that_cannot_be_written_ends_the_run(perf_server: PerfServer) -> None:
    def full(_: Record) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        load(perf_server.target("tiny"), profile(closed(2), max_s=60, window_s=60), write=full)


@pytest.mark.parametrize("count", [1, 4])
def test_a_record_that_cannot_be_written_at_the_end_is_not_passed_over(
    perf_server: PerfServer, count: int
) -> None:
    phases = ["measuring"]

    def full(_: Record) -> None:
        if phases[-1] == "draining":
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        load(
            perf_server.target("tokens"),
            profile(closed(count)),
            request=text_request("one", tokens=400),
            write=full,
            on_progress=lambda progress: phases.append(progress.phase),
        )


def test_the_interpreter_is_as_before_when_the_last_of_several_runs_is_over(perf_server: PerfServer) -> None:
    def state() -> tuple[Any, ...]:
        return gc.isenabled(), sys.getswitchinterval(), signal.getsignal(signal.SIGINT), gc.get_freeze_count()

    seen: list[bool] = []

    async def two() -> tuple[Any, ...]:
        inside = state()
        await asyncio.gather(
            *[
                loaded(
                    perf_server.target("tiny"),
                    profile(closed(1), max_s=max_s, window_s=max_s),
                    on_progress=lambda _: seen.append(gc.isenabled()),
                )
                for max_s in (0.2, 0.6)
            ]
        )
        assert state() == inside
        return inside

    before = state()
    asyncio.run(two())
    assert not any(seen)
    assert state() == before


def test_a_load_leaves_no_cycles_for_the_collector(perf_server: PerfServer) -> None:
    def collected(seconds: float) -> int:
        load(perf_server.target("tiny"), profile(closed(4), max_s=seconds, window_s=seconds))
        return gc.collect()

    collected(0.2)
    few, many = collected(0.2), collected(1.0)
    # What a run leaves behind does not grow with its requests, of which there are hundreds.
    assert many - few < 100


def test_headers_and_addresses_that_cannot_be_used_are_refused_before_anything_is_sent() -> None:
    async def wire(url: str, headers: dict[str, str]) -> None:
        await Wire(Target("tiny", url), timeout_s=1, headers=headers).close()

    with pytest.raises(InvalidInput, match="header"):
        asyncio.run(wire("grpc://127.0.0.1:1", {"te": "x"}))
    with pytest.raises(InvalidInput, match="contradicts"):
        asyncio.run(wire("http://127.0.0.1:1", {}))


def test_the_profile_is_that_of_the_run(perf_server: PerfServer) -> None:
    wanted = Profile.model_validate(profile(closed(1)).model_dump() | {"seed": 5})
    loop, records = load(perf_server.target("tiny"), wanted)
    assert loop.origin_unix_s > 0
    assert records[0].sent_ns >= loop.window.start_ns
