"""Verdicts about figures whose truth is known, from saved runs and from rounds."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from perf_models import PerfServer
from recorded_runs import CLOSED, RecordedRuns, example_in, figures, saved_run, stream_figures, void_check

from enginesmith_client.perf._errors import ProfileError, ResultsError
from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._profile import MeasurePart, OpenLoad, Profile
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Check, SavedRun
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.compare._bootstrap import PairedRatio
from enginesmith_client.perf.compare._comparison import (
    COMPARISON_FILE,
    CompareOptions,
    Comparison,
    load_comparison,
    save_comparison,
)
from enginesmith_client.perf.compare._live import compare_live, random_order
from enginesmith_client.perf.compare._saved import compare_saved
from enginesmith_client.perf.compare._verdicts import Values, judged, metrics_of, overall, rounds_hint

A, B = Target("a"), Target("b")
QUICK = CompareOptions(resamples=2000)
Noise = Callable[[np.random.Generator], tuple[float, float]]


def rounds_of(*, slowdown: float = 1.0, spread: float = 0.01, seed: int = 1) -> RecordedRuns:
    """A server whose model b takes ``slowdown`` times as long; every run is off by a random factor."""
    rng = np.random.default_rng(seed)

    def measured(target: Target, profile: Profile) -> Figures:
        slower = slowdown if target.model == "b" else 1.0
        slower *= float(np.exp(rng.normal(0, spread)))
        return figures(p50_ms=10 * slower, requests_per_s=400 / slower)

    return RecordedRuns(measured)


def live(
    tmp_path: Path, run: RecordedRuns, *, profile: Profile = CLOSED, rounds: int = 12, **options: Any
) -> Comparison:
    return compare_live(
        A, B, profile, directory=tmp_path, rounds=rounds, options=replace(QUICK, **options), run=run
    )


@pytest.mark.parametrize(
    ("slowdown", "verdict", "exit_code"), [(1.0, "same", 0), (1.06, "worse", 1), (0.94, "better", 0)]
)
def test_rounds_side_by_side_tell_slower_faster_and_same(
    tmp_path: Path, slowdown: float, verdict: str, exit_code: int
) -> None:
    found = live(tmp_path, rounds_of(slowdown=slowdown))
    assert (found.verdict, found.exit_code) == (verdict, exit_code)
    assert found.not_worse == (verdict != "worse")
    throughput = next(metric for metric in found.metrics if metric.name == "requests_per_s")
    assert throughput.low < 1 / slowdown < throughput.high
    assert throughput.ratio == pytest.approx(throughput.b / throughput.a)


def test_noise_that_hides_the_difference_is_inconclusive_with_the_rounds_that_would_decide(
    tmp_path: Path,
) -> None:
    found = live(tmp_path, rounds_of(slowdown=1.03, spread=0.05))
    assert (found.verdict, found.exit_code) == ("inconclusive", 5)
    assert "rounds instead of 12" in found.hint or "minimum effect" in found.hint


def test_a_difference_within_the_minimum_effect_is_same_although_it_is_certain(tmp_path: Path) -> None:
    found = live(tmp_path, rounds_of(slowdown=1.01, spread=0.001))
    assert found.verdict == "same"
    assert all(metric.low > 1 for metric in found.metrics if metric.name == "latency_ms.p50")


def test_the_minimum_effect_decides_what_same_means(tmp_path: Path) -> None:
    assert live(tmp_path / "2", rounds_of(slowdown=1.03, spread=0.001)).verdict == "worse"
    assert (
        live(tmp_path / "5", rounds_of(slowdown=1.03, spread=0.001), min_effect_percent=5.0).verdict == "same"
    )


def test_a_comparison_on_disk_is_the_one_that_was_returned(tmp_path: Path) -> None:
    found = live(tmp_path, rounds_of())
    assert load_comparison(tmp_path) == found
    document = json.loads((tmp_path / COMPARISON_FILE).read_text())
    assert document["format"] == "enginesmith-bench-comparison"
    assert len(document["metrics"][0]["values_a"]) == 12


def test_half_of_the_rounds_begin_with_b_in_an_order_left_to_chance(tmp_path: Path) -> None:
    run = rounds_of()
    found = live(tmp_path, run)
    assert sorted(found.order) == ["ab"] * 6 + ["ba"] * 6
    assert random_order(12, seed=0) != random_order(12, seed=1)
    made = [model for model, name in run.asked if name.startswith("round")]
    assert made == [side for pair in found.order for side in pair]
    assert [name for _, name in run.asked][:2] == ["warmup-a", "warmup-b"]


def test_both_runs_of_a_round_get_the_same_requests_and_every_round_others(tmp_path: Path) -> None:
    run = rounds_of()
    live(tmp_path, run)
    seeds = [profile.seed for profile in run.profiles[2:]]
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 12


def test_a_round_is_one_window_of_the_length_asked_for(tmp_path: Path) -> None:
    run = rounds_of()
    compare_live(A, B, CLOSED, directory=tmp_path, rounds=6, round_s=1.5, options=QUICK, run=run)
    assert {(one.measure.window_s, one.measure.windows) for one in run.profiles} == {(1.5, 1)}


def test_drift_of_the_machine_meets_both_sides(tmp_path: Path) -> None:
    run = rounds_of(spread=0.002)
    undisturbed = run.figures_of

    def drifting(target: Target, profile: Profile) -> Figures:
        slower = 1.01 ** len(run.asked)
        found = undisturbed(target, profile)
        assert isinstance(found, Figures)
        return figures(p50_ms=slower * 10, requests_per_s=found.requests_per_s / slower)

    run.figures_of = drifting
    assert live(tmp_path, run).verdict in ("same", "inconclusive")


def test_a_capacity_of_a_sets_the_rate_of_both(tmp_path: Path) -> None:
    run = RecordedRuns(
        lambda target, profile: figures(offered_per_s=160.0),
        lambda target, profile: {
            "workload": {"kind": "tensors", "capacity_per_s": 200.0 if target.model == "a" else 90.0}
        },
    )
    open_loop = Profile(load=OpenLoad(loop="open", capacity_factor=0.8))
    found = live(tmp_path, run, profile=open_loop)
    loads = [profile.load for profile in run.profiles[1:]]
    assert {load.rate_per_s for load in loads if isinstance(load, OpenLoad)} == {160.0}
    assert {metric.name: metric.role for metric in found.metrics}["requests_per_s"] == "informational"


def test_an_interrupted_comparison_measures_only_what_is_missing(tmp_path: Path) -> None:
    steady = rounds_of()
    interrupted = RecordedRuns(
        lambda target, profile: KeyboardInterrupt() if len(interrupted.asked) == 8 else figures()
    )
    with pytest.raises(KeyboardInterrupt):
        live(tmp_path, interrupted)
    assert not (tmp_path / COMPARISON_FILE).exists()
    found = live(tmp_path, steady)
    # Two warm-ups and two whole rounds were there; the third, half done, is measured again on both sides.
    assert [name[:8] for _, name in steady.asked][:2] == ["round-03", "round-03"]
    assert len(steady.asked) == 2 * 10
    assert len(found.metrics[0].values_a) == 12


def test_a_partial_run_that_a_person_interrupted_ends_the_comparison(tmp_path: Path) -> None:
    run = RecordedRuns(
        lambda target, profile: figures(),
        lambda target, profile: (
            {"status": "partial", "ended_because": "interrupted"} if len(run.asked) > 4 else {}
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        live(tmp_path, run)


def test_a_finished_comparison_is_not_measured_again_and_takes_no_more_rounds(tmp_path: Path) -> None:
    found = live(tmp_path, rounds_of())
    again = rounds_of()
    assert live(tmp_path, again) == found
    assert again.asked == []
    with pytest.raises(ResultsError, match="other order") as caught:
        live(tmp_path, again, rounds=16)
    assert "after a look" in str(caught.value)


def test_too_few_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="at least 6 rounds; seen: 5"):
        live(tmp_path, rounds_of(), rounds=5)


def test_two_versions_of_a_model_are_not_started_cold(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="unloading one unloads the other"):
        compare_live(
            Target("m", version="1"), Target("m", version="2"), CLOSED.model_copy(update={"start": "cold"}),
            directory=tmp_path, run=rounds_of(),
        )  # fmt: skip


def some_void(count: int) -> RecordedRuns:
    """The first runs of model b are void, after the warm-up."""
    rounds = rounds_of()
    rounds.fields = lambda target, profile: {
        "checks": (void_check(),) if target.model == "b" and 1 <= profile.seed <= count else ()
    }
    return rounds


def test_a_void_round_is_left_out_on_both_sides_and_said(tmp_path: Path) -> None:
    found = live(tmp_path, some_void(2))
    assert found.verdict == "same"
    assert found.left_out == {1: "B: the clock jumped", 2: "B: the clock jumped"}
    assert len(found.metrics[0].values_a) == len(found.metrics[0].values_b) == 10
    assert "left out, round 1: B: the clock jumped" in found.warnings


def test_many_void_rounds_void_the_comparison(tmp_path: Path) -> None:
    found = live(tmp_path, some_void(4))
    assert (found.verdict, found.metrics) == ("inconclusive", ())
    assert "4 of 12 rounds are void; round 1: B: the clock jumped" in found.words


def errors_in(**counts: int) -> RecordedRuns:
    """So many failures in every run of a model."""
    return RecordedRuns(
        lambda target, profile: figures(errors={"server": n} if (n := counts.get(target.model, 0)) else {})
    )


def test_errors_that_only_b_makes_are_worse(tmp_path: Path) -> None:
    found = live(tmp_path, errors_in(b=1))
    assert found.verdict == "worse"
    assert "12 of 4800 requests of B failed (12 server), 0 of 4800 of A" in found.words


@pytest.mark.parametrize(("a", "b", "verdict"), [(10, 11, "same"), (10, 40, "worse"), (10, 0, "same")])
def test_errors_on_both_sides_are_worse_when_chance_does_not_explain_them(
    tmp_path: Path, a: int, b: int, verdict: str
) -> None:
    assert live(tmp_path, errors_in(a=a, b=b)).verdict == verdict


def test_a_model_that_answers_nothing_is_worse_and_not_void(tmp_path: Path) -> None:
    def measured(target: Target, profile: Profile) -> Figures:
        if target.model == "a":
            return figures()
        return replace(figures(errors={"server": 400}, requests_per_s=0.0), latency_ms=None)

    found = live(tmp_path, RecordedRuns(measured))
    assert found.verdict == "worse"
    assert "4800 of 4800 requests of B failed" in found.words


def test_what_rounds_warn_of_is_said_once_for_each_side(tmp_path: Path) -> None:
    run = rounds_of()
    run.fields = lambda target, profile: {
        "checks": (Check("machine-cpu", "warning", f"busy in {profile.seed}"),)
    }
    found = live(tmp_path, run)
    assert found.warnings == ("A, machine-cpu: busy in 1", "B, machine-cpu: busy in 1")


def test_progress_says_which_run_of_how_many(tmp_path: Path) -> None:
    parts = []
    compare_live(
        A, B, CLOSED, directory=tmp_path, rounds=6, options=QUICK, run=rounds_of(),
        on_progress=lambda progress: parts.append(progress.part),
    )  # fmt: skip
    assert parts == [(number, 14) for number in range(1, 15)]


def test_a_longer_tail_is_worse_although_the_median_is_the_same(tmp_path: Path) -> None:
    def measured(target: Target, profile: Profile) -> Figures:
        found = figures()
        assert found.latency_ms is not None
        return replace(found, latency_ms=replace(found.latency_ms, p99=30.0 if target.model == "b" else 16.0))

    found = live(tmp_path, RecordedRuns(measured))
    assert found.verdict == "worse"
    assert found.words.startswith("B is worse: latency p99 87.5% higher")


def test_a_tail_of_too_few_answers_decides_nothing(tmp_path: Path) -> None:
    run = RecordedRuns(lambda target, profile: figures(count=50))
    roles = {metric.name: metric.role for metric in live(tmp_path, run).metrics}
    assert roles["latency_ms.p99"] == "informational"


def test_streams_are_judged_by_tokens_first_token_and_time_per_token(tmp_path: Path) -> None:
    run = RecordedRuns(lambda target, profile: stream_figures(tpot_ms=11.0 if target.model == "b" else 10.0))
    found = live(tmp_path, run)
    primaries = [metric.name for metric in found.metrics if metric.role == "primary"]
    assert primaries == ["output_tokens_per_s", "ttft_ms.p50", "tpot_ms.p50"]
    assert found.verdict == "worse"
    assert (
        found.words
        == "B is worse: time per output token p50 10.0% higher (98.8% interval: 10.0% higher to 10.0% higher)"
    )


def test_better_in_one_and_worse_in_another_is_worse_and_says_both(tmp_path: Path) -> None:
    def measured(target: Target, profile: Profile) -> Figures:
        b = target.model == "b"
        return stream_figures(ttft_ms=80.0 if b else 50.0, tokens_per_s=500.0 if b else 400.0)

    found = live(tmp_path, RecordedRuns(measured))
    assert found.verdict == "worse"
    assert "better, however: output tokens per second" in found.words


# The procedure as a whole, without a clock: thousands of comparisons of made-up rounds.


def verdicts(
    comparisons: int, *, slowdown: float, spread: float, seed: int, heavy: float = 0.0, rounds: int = 12
) -> list[str]:
    """What the procedure says of rounds whose noise is partly shared by the figures, as in a closed loop.

    ``heavy``: the share of runs that something disturbed, by 5% or so.
    """
    rng = np.random.default_rng(seed)
    metrics = [
        metric
        for metric in metrics_of(closed=True, streaming=False, guarded=True)
        if metric.role != "informational"
    ]
    found = []
    for number in range(comparisons):
        shared = rng.normal(0, spread, (2, rounds))
        shared += np.where(rng.random((2, rounds)) < heavy, np.abs(rng.normal(0, 0.05, (2, rounds))), 0.0)
        shared[1] += math.log(slowdown)
        values = []
        for metric, own in zip(metrics, (0.3, 0.3, 3.0), strict=True):
            logs = shared + rng.normal(0, own * spread, (2, rounds))
            a, b = np.exp(-logs if metric.better == "higher" else logs)
            values.append(Values(metric, tuple(a), tuple(b)))
        judgement = judged(values, _paired(number), options=QUICK)
        found.append(overall(judgement, ("same", ""))[0])
    return found


def _paired(seed: int) -> Callable[[Values], PairedRatio]:
    return lambda item: PairedRatio(item.a, item.b, seed=seed, resamples=1000)


@pytest.mark.parametrize("heavy", [0.0, 0.15])
def test_identical_models_are_hardly_ever_called_worse(heavy: float) -> None:
    found = verdicts(400, slowdown=1.0, spread=0.012, seed=1, heavy=heavy)
    assert found.count("worse") + found.count("better") == 0
    assert found.count("same") / len(found) > (0.7 if not heavy else 0.1)


def test_a_slowdown_of_exactly_the_minimum_effect_is_called_worse_no_more_often_than_promised() -> None:
    # The least favourable truth: two and a half percent is what a two-sided confidence of 95% allows.
    found = verdicts(800, slowdown=1.02, spread=0.012, seed=2)
    assert found.count("worse") / len(found) < 0.025 + 3 * math.sqrt(0.025 * 0.975 / len(found))
    assert found.count("better") == 0


def test_a_slowdown_of_five_percent_is_found() -> None:
    found = verdicts(400, slowdown=1.05, spread=0.012, seed=3)
    assert found.count("worse") / len(found) > 0.97
    assert found.count("better") + found.count("same") == 0


def test_more_rounds_find_what_fewer_do_not() -> None:
    few = verdicts(80, slowdown=1.05, spread=0.03, seed=4, rounds=8).count("worse")
    many = verdicts(80, slowdown=1.05, spread=0.03, seed=4, rounds=40).count("worse")
    assert few < 0.6 * many


def test_metrics_that_are_undecided_share_the_doubt_and_decided_ones_give_theirs_back() -> None:
    metrics = metrics_of(closed=True, streaming=True, guarded=False)[:3]
    noise = np.exp(np.random.default_rng(1).normal(0, 0.05, 12))
    slow = tuple(0.5 * noise)
    flat = tuple(noise)
    alike = judged([Values(metric, (1.0,) * 12, flat) for metric in metrics], _paired(1), options=QUICK)
    assert {metric.verdict for metric in alike} == {"inconclusive"}
    assert [metric.confidence for metric in alike] == pytest.approx([1 - 0.05 / 3] * 3)
    values = [
        Values(metrics[0], (1.0,) * 12, slow),
        *(Values(metric, (1.0,) * 12, flat) for metric in metrics[1:]),
    ]
    one_decided = judged(values, _paired(1), options=QUICK)
    assert [metric.confidence for metric in one_decided] == pytest.approx([1 - 0.05 / 3, 0.975, 0.975])


def test_to_be_the_same_each_figure_needs_only_its_own_confidence() -> None:
    metrics = metrics_of(closed=True, streaming=True, guarded=False)[:3]
    noise = tuple(np.exp(0.02 * np.tile([1.0, -1.0], 6)))
    found = judged([Values(metric, (1.0,) * 12, noise) for metric in metrics], _paired(1), options=QUICK)
    assert [(metric.verdict, metric.confidence) for metric in found] == [("same", 0.95)] * 3
    assert overall(found, ("same", ""))[0] == "same"


def test_the_hint_asks_for_as_many_rounds_as_the_interval_must_shrink() -> None:
    metric = metrics_of(closed=True, streaming=False, guarded=False)[0]
    logs = 0.05 * np.tile([1.0, -1.0], 6)
    found = judged([Values(metric, (1.0,) * 12, tuple(np.exp(logs)))], _paired(1), options=QUICK)
    half = math.log(found[0].high)
    assert found[0].verdict == "inconclusive"
    needed = math.ceil(12 * 1.25 * (half / math.log(1.02)) ** 2)
    assert rounds_hint(found, rounds=12, unit="rounds").startswith(f"about {needed} rounds instead of 12")


# Saved runs.


def records(*, service_ms: float, seed: int, open_loop: bool = False) -> list[Record]:
    """One request after the other for four seconds, whose times wander slowly."""
    rng = np.random.default_rng(seed)
    found, at, level = [], 0, 0.0
    while at < 4_000_000_000:
        level = 0.9 * level + rng.normal(0, 0.02)
        ended = at + int(service_ms * 1e6 * math.exp(level))
        found.append(Record(len(found), at, at, ended))
        at = ended
    return found


def measured_run(directory: Path, *, service_ms: float = 10.0, seed: int = 0, **others: Any) -> SavedRun:
    made = records(service_ms=service_ms, seed=seed)
    inside = [record.latency_ns / 1e6 for record in made if record.ended_ns < 4_000_000_000]
    of = figures(p50_ms=float(np.median(inside)), requests_per_s=len(inside) / 4, count=len(inside))
    return saved_run(directory, others.pop("figures", of), records=made, **others)


def test_one_run_of_each_is_compared_through_its_records_and_says_what_it_cannot_see(tmp_path: Path) -> None:
    a = measured_run(tmp_path / "a", seed=1)
    b = measured_run(tmp_path / "b", seed=2, service_ms=12.5)
    found = compare_saved(a, b)
    assert (found.verdict, found.kind) == ("worse", "saved")
    median = next(metric for metric in found.metrics if metric.name == "latency_ms.p50")
    assert median.low < 1.25 < median.high
    assert median.values_b == (b.run.figures.latency_ms.p50,) if b.run.figures.latency_ms else False
    assert "cannot show how runs differ" in found.warnings[0]
    save_comparison(tmp_path, found)
    assert load_comparison(tmp_path) == found


def test_a_run_compared_with_itself_is_not_different(tmp_path: Path) -> None:
    a = measured_run(tmp_path / "a")
    found = compare_saved(a, a)
    assert found.verdict in ("same", "inconclusive")
    assert all(metric.ratio == 1.0 for metric in found.metrics)


def several(tmp_path: Path, name: str, values: Sequence[float]) -> list[SavedRun]:
    return [
        saved_run(tmp_path / f"{name}{number}", figures(p50_ms=10 * value, requests_per_s=100 / value))
        for number, value in enumerate(values)
    ]


def test_several_runs_of_each_are_judged_by_how_runs_differ(tmp_path: Path) -> None:
    noise = [0.99, 1.0, 1.01, 1.0, 0.995, 1.005]
    a = several(tmp_path, "a", noise)
    assert compare_saved(a, several(tmp_path, "b", [1.1 * value for value in noise])).verdict == "worse"
    wild = several(tmp_path, "c", [0.8, 1.3, 1.0, 1.2, 0.9, 1.1])
    assert compare_saved(a, wild).verdict == "inconclusive"


@pytest.mark.parametrize(("count_a", "count_b"), [(1, 4), (3, 3), (4, 2)])
def test_numbers_of_runs_that_say_nothing_are_refused(tmp_path: Path, count_a: int, count_b: int) -> None:
    a, b = several(tmp_path, "a", [1.0] * count_a), several(tmp_path, "b", [1.0] * count_b)
    with pytest.raises(ResultsError, match="one of each, or at least 4 of each"):
        compare_saved(a, b)


def test_runs_that_were_measured_differently_are_refused_and_compared_with_force(tmp_path: Path) -> None:
    a = measured_run(tmp_path / "a")
    other = CLOSED.model_copy(
        update={"load": CLOSED.load.model_copy(update={"concurrency": 8}), "name": "other"}
    )
    b = measured_run(tmp_path / "b", profile=other, machine={"cpu": "another cpu", "cores": 2})
    with pytest.raises(ResultsError, match=r"profile load\.concurrency: 4 and 8") as caught:
        compare_saved(a, b)
    assert "machine.cpu: 'a cpu' and 'another cpu'" in str(caught.value)
    assert "name" not in caught.value.message
    forced = compare_saved(a, b, force=True)
    assert "profile load.concurrency: 4 and 8" in forced.warnings


def test_how_long_was_measured_and_what_was_promised_may_differ(tmp_path: Path) -> None:
    longer = CLOSED.model_copy(update={"measure": MeasurePart(max_s=120.0), "description": "longer"})
    found = compare_saved(measured_run(tmp_path / "a"), measured_run(tmp_path / "b", profile=longer))
    assert found.verdict != "worse"


def test_a_void_run_makes_the_comparison_void(tmp_path: Path) -> None:
    found = compare_saved(
        measured_run(tmp_path / "a"), measured_run(tmp_path / "b", service_ms=20, checks=(void_check(),))
    )
    assert (found.verdict, found.exit_code) == ("inconclusive", 5)
    assert found.words == "Void: B (b) cannot be used: the clock jumped"


def test_a_run_that_ended_early_makes_the_comparison_void(tmp_path: Path) -> None:
    a = measured_run(tmp_path / "a", status="partial", ended_because="server lost")
    assert "ended early: server lost" in compare_saved(a, measured_run(tmp_path / "b")).words


def test_warnings_of_the_runs_are_passed_on(tmp_path: Path) -> None:
    a = measured_run(tmp_path / "a", checks=(Check("machine-cpu", "warning", "the machine was busy"),))
    found = compare_saved(a, measured_run(tmp_path / "b"))
    assert "A, machine-cpu: the machine was busy" in found.warnings


def test_a_comparison_of_another_version_is_refused(tmp_path: Path) -> None:
    live(tmp_path, rounds_of())
    path = tmp_path / COMPARISON_FILE
    path.write_text(path.read_text().replace('"version": 1', '"version": 9', 1))
    with pytest.raises(ResultsError, match="version 9; this program reads"):
        load_comparison(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_effect_percent": 0}, "minimum effect"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": 10}, "resamples"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        CompareOptions(**options)


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live(tmp_path / "bench" / "compare", rounds_of())
    monkeypatch.chdir(tmp_path)
    exec(example_in("bench-compare.md"), {})
    assert "latency p50: 1.0" in capsys.readouterr().out


@pytest.mark.server
def test_one_model_beside_itself_on_a_real_server_is_not_worse(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    target = perf_server.target("steady20")
    # Four in flight are answered two by two: 80 answers a round or so, of which 30 would do.
    found = compare_live(target, target, CLOSED, directory=tmp_path, rounds=8, round_s=0.5)
    assert not found.void
    assert found.verdict != "worse"
    assert {metric.name for metric in found.metrics if metric.role == "primary"} == {
        "requests_per_s",
        "latency_ms.p50",
    }
    assert len(found.metrics[0].values_a) + len(found.left_out) == 8
    assert load_comparison(tmp_path) == found
