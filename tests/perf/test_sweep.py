"""Ladders, knees and limits, on servers whose curve is known."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from perf_models import PerfServer
from recorded_runs import CLOSED, RecordedRuns, example_in, figures, load_of, void_check

from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError
from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._profile import (
    ClosedLoad,
    MeasurePart,
    OpenLoad,
    Profile,
    SloPart,
    TraceArrivals,
)
from enginesmith_client.perf._run_files import SloVerdict
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.many._knee import LoadPoint, knee_of
from enginesmith_client.perf.many._ladder import Ladder, ladder_from_text
from enginesmith_client.perf.many._sweep import SWEEP_FILE, Sweep, load_sweep, sweep

TARGET = Target("m")
SERVICE_MS = 10.0
BATCH = 8
WITH_SLO = CLOSED.model_copy(update={"slo": SloPart(p99_latency_ms=50.0)})


def batching_server(profile: Profile) -> tuple[float, float]:
    """Requests per second and latency: up to 8 requests are worked on at once, the others wait."""
    load = load_of(profile)
    if isinstance(profile.load, ClosedLoad):
        latency_ms = SERVICE_MS * max(1.0, load / BATCH)
        return load / latency_ms * 1000, latency_ms
    capacity = BATCH / SERVICE_MS * 1000
    if load >= capacity:
        return capacity, 2000.0
    return load, SERVICE_MS / (1 - load / capacity)


def verdict_on(limit: float | None, measured: float) -> tuple[SloVerdict, ...]:
    return () if limit is None else (SloVerdict("p99_latency_ms", limit, measured, measured <= limit),)


def server(
    curve: Callable[[Profile], tuple[float, float]] = batching_server, *, void_from: float = math.inf
) -> RecordedRuns:
    def measured(target: Target, profile: Profile) -> Figures:
        per_s, p50_ms = curve(profile)
        offered = None if isinstance(profile.load, ClosedLoad) else load_of(profile)
        kept = verdict_on(profile.slo.p99_latency_ms, 1.6 * p50_ms)
        good = None if not kept else per_s if kept[0].met else 0.0
        return figures(p50_ms=p50_ms, requests_per_s=per_s, offered_per_s=offered, good_per_s=good)

    def fields(target: Target, profile: Profile) -> dict[str, Any]:
        void = load_of(profile) >= void_from
        return {
            "checks": (void_check("the generator is too slow"),) if void else (),
            "slo": verdict_on(profile.slo.p99_latency_ms, 1.6 * curve(profile)[1]),
        }

    return RecordedRuns(measured, fields)


def swept(tmp_path: Path, text: str, run: RecordedRuns | None = None, profile: Profile = CLOSED) -> Sweep:
    return sweep(TARGET, profile, ladder_from_text(text), directory=tmp_path, run=run or server())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("concurrency=1,2,4", (1, 2, 4)),
        ("concurrency=1..16", (1, 2, 4, 8, 16)),
        ("concurrency=3..20", (3, 6, 12, 20)),
        ("concurrency=4..4", (4,)),
        ("rate=0.5,20", (0.5, 20)),
        ("rate=auto", ()),
    ],
)
def test_a_ladder_is_read_from_the_command_line(text: str, values: tuple[float, ...]) -> None:
    found = ladder_from_text(text)
    assert (found.axis, found.values) == (text.partition("=")[0], values)


@pytest.mark.parametrize(
    "text",
    ["", "auto", "threads=1,2", "concurrency=", "concurrency=a", "concurrency=1.5", "concurrency=0", "rate=-1",
     "rate=5..1", "rate=nan", "rate=inf", "concurrency=2,2", "concurrency=1..inf", "concurrency=nan",
     "concurrency=1,inf", "rate=1e-300..1e300"],
)  # fmt: skip
def test_what_is_no_ladder_is_refused(text: str) -> None:
    with pytest.raises(ProfileError):
        ladder_from_text(text)


def test_given_loads_are_measured_in_their_order_and_shown_in_theirs(tmp_path: Path) -> None:
    run = server()
    found = swept(tmp_path, "concurrency=8,1,4", run)
    assert [name for _, name in run.asked] == ["concurrency-8", "concurrency-1", "concurrency-4"]
    assert [point.load for point in found.points] == [1, 4, 8]
    assert found.points[0].throughput_per_s == pytest.approx(100)


def test_an_automatic_ladder_doubles_until_the_throughput_no_longer_grows(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=auto")
    assert [point.load for point in found.points] == [1, 2, 4, 8, 16]
    assert found.status == "complete"
    assert "no SLO was given, so no load is too high" in found.words


def test_an_automatic_ladder_closes_in_on_the_slo(tmp_path: Path) -> None:
    # p99 is 16 ms up to 8 in flight, then 2 ms for each: 25 keep 50 ms.
    forever = server(
        lambda profile: (100 * load_of(profile) ** 0.8, SERVICE_MS * max(1.0, load_of(profile) / BATCH))
    )
    found = swept(tmp_path, "concurrency=auto", forever, WITH_SLO)
    assert found.highest_within_slo is not None
    assert 23 <= found.highest_within_slo.load <= 25
    assert found.highest_within_slo.slo_met
    assert len(found.points) <= 10
    assert found.words[0].startswith("highest load within the SLO: 2")
    assert "p99_latency_ms is" in found.words[0]


def test_the_best_goodput_is_the_most_requests_within_the_slo(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=4,16,64", profile=WITH_SLO)
    assert found.best_goodput is not None
    assert (found.best_goodput.load, found.best_goodput.good_per_s) == (16, pytest.approx(800))


def test_an_automatic_rate_begins_at_what_one_request_at_a_time_reaches(tmp_path: Path) -> None:
    run = server()
    found = swept(tmp_path, "rate=auto", run, WITH_SLO)
    assert run.asked[0] == ("m", "probe")
    assert found.points[0].load == 50
    # p99 = 16 / (1 - rate / 800) keeps 50 ms up to 544 per second.
    assert found.highest_within_slo is not None
    assert 544 / 1.1 <= found.highest_within_slo.load <= 544


def test_without_an_slo_the_limit_of_a_rate_is_what_the_server_keeps_up_with(tmp_path: Path) -> None:
    found = swept(tmp_path, "rate=auto")
    assert found.highest_within_slo is not None
    assert 760 / 1.1 <= found.highest_within_slo.load <= 800 / 0.95
    assert "highest load within the offered rate" in found.words[0]
    assert "the server answered 800 of" in found.words[0]


def test_a_first_rate_that_is_too_high_is_gone_below(tmp_path: Path) -> None:
    ladder = Ladder("rate", start=10_000.0)
    found = sweep(TARGET, WITH_SLO, ladder, directory=tmp_path, run=server())
    assert found.highest_within_slo is not None
    assert 544 / 1.1 <= found.highest_within_slo.load <= 544


def test_an_impossible_slo_is_said_with_what_was_measured(tmp_path: Path) -> None:
    strict = CLOSED.model_copy(update={"slo": SloPart(p99_latency_ms=5.0)})
    found = swept(tmp_path, "concurrency=auto", profile=strict)
    assert [point.load for point in found.points] == [1]
    assert found.words[0] == "SLO impossible: even at 1 at a time p99_latency_ms is 16 where 5 is allowed"
    assert found.highest_within_slo is None


def test_a_ladder_that_ends_below_the_limit_says_so(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1,2,4", profile=WITH_SLO)
    assert found.highest_within_slo is not None
    assert found.highest_within_slo.load == 4
    assert "the limit was not found and is higher" in found.words[0]


def test_a_limit_that_a_higher_load_contradicts_is_doubted(tmp_path: Path) -> None:
    odd = server(lambda profile: (100.0, 40.0 if load_of(profile) == 4 else 10.0))
    found = swept(tmp_path, "concurrency=2,4,8", odd, WITH_SLO)
    assert found.highest_within_slo is not None
    assert found.highest_within_slo.load == 2
    assert "kept again at 8 at a time, so measure longer" in found.words[0]


def test_void_points_are_not_used_and_are_said(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1,2,4,64", server(void_from=64), WITH_SLO)
    assert found.highest_within_slo is not None
    assert found.highest_within_slo.load == 4
    assert "not used: 64 at a time: the generator is too slow" in found.words
    assert found.knee is not None
    assert found.knee.load == 4


def test_an_automatic_ladder_ends_at_a_void_point(tmp_path: Path) -> None:
    found = swept(tmp_path, "rate=auto", server(void_from=300), WITH_SLO)
    assert [point.load for point in found.points] == [50, 100, 200, 400]
    assert found.points[-1].void


def test_a_load_at_which_nothing_is_answered_is_a_point_that_is_not_used(tmp_path: Path) -> None:
    fine = server()
    run = RecordedRuns(
        lambda target, profile: (
            MeasurementError("not one of 90 requests was answered")
            if load_of(profile) > 4
            else fine.figures_of(target, profile)
        )
    )
    found = swept(tmp_path, "concurrency=1,2,4,8", run)
    assert "not used: 8 at a time: not one of 90 requests was answered" in found.words


def test_no_usable_point_is_said(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1,2", server(void_from=1))
    assert found.words[0] == "nothing was found: no point can be used"


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    fine = server()
    run = RecordedRuns(
        lambda target, profile: (
            KeyboardInterrupt() if load_of(profile) == 8 else fine.figures_of(target, profile)
        )
    )
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, "concurrency=auto", run)
    kept = load_sweep(tmp_path)
    assert (kept.status, [point.load for point in kept.points]) == ("partial", [1, 2, 4])
    again = server()
    found = swept(tmp_path, "concurrency=auto", again)
    assert [name for _, name in again.asked] == ["concurrency-8", "concurrency-16"]
    assert found.status == "complete"


@pytest.mark.parametrize(
    ("target", "profile", "text", "words"),
    [
        (Target("other"), CLOSED, "concurrency=1,2", "another model"),
        (TARGET, WITH_SLO, "concurrency=1,2", "another profile"),
        (TARGET, CLOSED, "rate=5", "another axis"),
    ],
)
def test_a_directory_holds_one_sweep(
    tmp_path: Path, target: Target, profile: Profile, text: str, words: str
) -> None:
    found = swept(tmp_path, "concurrency=1")
    with pytest.raises(ResultsError, match=f"holds a sweep with {words}"):
        sweep(target, profile, ladder_from_text(text), directory=tmp_path, run=server())
    assert load_sweep(tmp_path) == found


def test_a_sweep_on_disk_is_the_one_that_was_returned(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1..32", profile=WITH_SLO)
    assert load_sweep(tmp_path) == found


def test_a_sweep_of_another_version_is_refused(tmp_path: Path) -> None:
    swept(tmp_path, "concurrency=1,2")
    path = tmp_path / SWEEP_FILE
    path.write_text(path.read_text().replace('"version": 1', '"version": 0', 1))
    with pytest.raises(ResultsError, match="version 0; this program reads"):
        load_sweep(tmp_path)


def test_a_trace_cannot_be_swept_over_rates(tmp_path: Path) -> None:
    trace = Profile(load=OpenLoad(loop="open", arrivals=TraceArrivals(kind="trace", file=Path("t.jsonl"))))
    with pytest.raises(ProfileError, match="a trace has its own rate"):
        swept(tmp_path, "rate=1,2", profile=trace)


def test_what_the_profile_says_of_arrivals_and_generator_is_kept(tmp_path: Path) -> None:
    by_tool = CLOSED.model_copy(update={"load": ClosedLoad(concurrency=1, generator="perf_analyzer")})
    run = server()
    swept(tmp_path / "closed", "concurrency=2", run, by_tool)
    constant = OpenLoad.model_validate(
        {"loop": "open", "arrivals": {"kind": "constant"}, "capacity_factor": 0.5, "max_in_flight": 9}
    )
    swept(tmp_path / "open", "rate=20", run, CLOSED.model_copy(update={"load": constant}))
    closed, opened = (profile.load for profile in run.profiles)
    assert isinstance(closed, ClosedLoad)
    assert (closed.generator, closed.concurrency) == ("perf_analyzer", 2)
    assert isinstance(opened, OpenLoad)
    assert (opened.arrivals.kind, opened.rate_per_s, opened.max_in_flight) == ("constant", 20, 9)


def test_progress_says_which_point_of_how_many(tmp_path: Path) -> None:
    parts = []
    sweep(
        TARGET, CLOSED, ladder_from_text("concurrency=1,2,4"), directory=tmp_path, run=server(),
        on_progress=lambda progress: parts.append(progress.part),
    )  # fmt: skip
    assert parts == [(1, 3), (2, 3), (3, 3)]


def test_the_knee_is_where_throughput_over_latency_is_highest(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1..64")
    assert found.knee is not None
    assert (found.knee.load, found.knee.reached) == (8, True)
    assert found.words[1].startswith("knee (highest throughput / latency): 8 at a time, 800 requests/s")


def test_the_knee_of_an_mm1_queue_is_at_half_of_its_capacity() -> None:
    # Kleinrock: power x (1 - x) of an M/M/1 queue is highest at a utilization of one half.
    points = [LoadPoint(rate, rate, 1000 / (100 - rate)) for rate in range(5, 100, 5)]
    knee = knee_of(points)
    assert knee is not None
    assert knee.load == 50


def test_a_knee_at_the_end_of_the_ladder_is_not_called_reached(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1,2,4,8")
    assert found.knee is not None
    assert not found.knee.reached
    assert "the knee was not reached" in found.words[1]


def test_two_points_have_no_knee(tmp_path: Path) -> None:
    found = swept(tmp_path, "concurrency=1,2")
    assert found.knee is None
    assert "no knee: that needs 3 usable points" in found.words


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(tmp_path / "bench" / "sweep", "concurrency=1,2,4", profile=WITH_SLO)
    monkeypatch.chdir(tmp_path)
    exec(example_in("bench-sweep.md"), {})
    assert "4 at a time 400.0 16.0 True" in capsys.readouterr().out


@pytest.mark.server
def test_a_sweep_of_a_real_server_finds_that_a_batching_model_takes_more_at_once(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    measure = MeasurePart(window_s=0.5, windows=1, max_s=1.0, warmup_s=0.1)
    profile = CLOSED.model_copy(update={"measure": measure})
    ladder = ladder_from_text("concurrency=2,8")
    found = sweep(perf_server.target("steady20"), profile, ladder, directory=tmp_path)
    two, eight = found.points
    assert found.model_version == "1"
    assert eight.throughput_per_s > 1.5 * two.throughput_per_s
    assert sweep(perf_server.target("steady20"), profile, ladder, directory=tmp_path).points == found.points
