"""Every rule of the self-check: a run that breaks it, beside one that is sound."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Check, Window
from enginesmith_client.perf.judge._metrics import figures_of
from enginesmith_client.perf.judge._selfcheck import RULES, checks_of
from enginesmith_client.perf.load._loops import Loop
from enginesmith_client.perf.observe._samples import ModelCounts, Sample

MS = 1_000_000
S = 1000 * MS
DOCUMENT = Path(__file__).parents[2] / "docs" / "bench-selfcheck.md"
WINDOW = Window(2 * S, 12 * S, steady=True)
OPEN = {"loop": "open", "rate_per_s": 20}
CLOSED = {"loop": "closed", "concurrency": 1}


@dataclass(frozen=True)
class Case:
    """A run of 14 s at 20 requests a second of 40 ms each, its window from 2 s to 12 s, with nothing wrong with it."""

    load: dict[str, Any] = field(default_factory=lambda: OPEN)
    profile: dict[str, Any] = field(default_factory=dict)
    per_s: float = 20
    latency_ms: float = 40
    lag_ms: float = 0.1
    window: Window = WINDOW
    change: Callable[[Record], Record] = lambda record: record
    change_sample: Callable[[Sample], Sample | None] = lambda sample: sample
    client_cpu_s: float = 0.1
    wall_moved_s: float = 0.0
    generator: str = "enginesmith"

    def records(self) -> list[Record]:
        due = [round(number * S / self.per_s) for number in range(round(14 * self.per_s))]
        lag, latency = round(self.lag_ms * MS), round(self.latency_ms * MS)
        return [self.change(Record(number, at, at + lag, at + latency)) for number, at in enumerate(due)]

    def samples(self, records: Sequence[Record]) -> list[Sample]:
        changed = [self.change_sample(self._sample(at_s, records)) for at_s in range(15)]
        return [one for one in changed if one is not None]

    def _sample(self, at_s: int, records: Sequence[Record]) -> Sample:
        count = sum(one.ended_ns < at_s * S for one in records)
        return Sample(
            at_ns=at_s * S,
            wall_ahead_s=1e9,
            statistics=ModelCounts(success=count, inferences=count, executions=count, batches={1: count}),
            client_cpu_s=self.client_cpu_s * at_s / 10,
            machine_busy_s=0.6 * at_s,
            machine_total_s=2.0 * at_s,
            swap_in_pages=77,
            server="5 since 1.0",
            server_cpu_s=0.5 * at_s,
            server_rss_bytes=1 << 30,
        )

    def checks(self) -> dict[str, Check]:
        profile = Profile.model_validate({"load": self.load} | self.profile)
        records = self.records()
        samples = self.samples(records)
        figures = figures_of(records, self.window, profile, samples, closed=self.load["loop"] == "closed")
        loop = Loop(0, 0.0, self.window, "complete", "steady", self.client_cpu_s, self.wall_moved_s)
        found = checks_of(
            records,
            self.window,
            figures,
            samples,
            profile,
            loop=loop if self.generator == "enginesmith" else None,
            generator=self.generator,
        )
        return {one.rule: one for one in found}


def after(at_s: float, **fields: object) -> Callable[[Sample], Sample]:
    """Samples from then on with other fields."""

    def change(sample: Sample) -> Sample:
        return dataclasses.replace(sample, **fields) if sample.at_ns >= at_s * S else sample  # type: ignore[arg-type]

    return change


def failing(share: float) -> Callable[[Record], Record]:
    """That share of the records is a failure."""
    every = round(1 / share)
    return lambda one: (
        dataclasses.replace(one, outcome="server", error="out of  memory") if one.number % every == 0 else one
    )


@pytest.mark.parametrize("load", [OPEN, CLOSED])
def test_sound_run_has_nothing_to_say(load: dict[str, Any]) -> None:
    assert Case(load=load).checks() == {}
    assert Case(load=CLOSED, generator="perf_analyzer").checks() == {}


def test_server_that_answers_nothing_voids_the_run_and_its_error_is_told() -> None:
    checks = Case(change=failing(1)).checks()
    assert checks["nothing-answered"].severity == "void"
    assert "not one of 200 requests" in checks["nothing-answered"].words
    assert "server: out of memory" in checks["nothing-answered"].words


def test_window_without_requests_is_void() -> None:
    checks = Case(window=Window(100 * S, 110 * S, steady=True)).checks()
    assert "not one of 0 requests" in checks["nothing-answered"].words


@pytest.mark.parametrize(("lag_ms", "severity"), [(1.9, None), (2.5, "warning"), (5.5, "void")])
def test_late_generator_warns_and_then_voids(lag_ms: float, severity: str | None) -> None:
    check = Case(lag_ms=lag_ms).checks().get("generator-lag")
    assert (check.severity if check else None) == severity
    assert check is None or "99% of the requests were sent up to" in check.words


@pytest.mark.parametrize(("lag_ms", "severity"), [(40, None), (60, "warning"), (110, "void")])
def test_lag_matters_against_the_latency(lag_ms: float, severity: str | None) -> None:
    check = Case(latency_ms=1000, lag_ms=lag_ms).checks().get("generator-lag")
    assert (check.severity if check else None) == severity


def test_generator_that_cannot_keep_the_rate_is_void_even_if_the_server_is_slower() -> None:
    def falling_behind(one: Record) -> Record:
        late_ns = round(0.05 * one.due_ns)
        return dataclasses.replace(one, sent_ns=one.due_ns + late_ns, ended_ns=one.due_ns + 100 * S)

    check = Case(change=falling_behind).checks()["generator-lag"]
    assert check.severity == "void"
    assert "kept 95.2% of the rate" in check.words


def test_closed_loop_has_no_lag() -> None:
    assert "generator-lag" not in Case(load=CLOSED, lag_ms=30).checks()


def test_python_measures_itself_on_a_model_of_a_millisecond_and_says_whom_to_trust() -> None:
    # 700 requests a second of 1.2 ms each, of which 0.35 ms are ours: busy a quarter of the time.
    fast = Case(load=CLOSED, per_s=700, latency_ms=1.2, client_cpu_s=10 * 700 * 0.35e-3)
    check = fast.checks()["client-cpu"]
    assert check.severity == "void"
    assert "Python measures itself" in check.words
    assert "(--generator perf_analyzer), whose figure is the one to trust" in check.words
    assert "client-cpu" not in dataclasses.replace(fast, generator="perf_analyzer").checks()


@pytest.mark.parametrize(
    ("client_s_per_s", "server_s_per_s", "severity"),
    [(0.4, 1.4, "void"), (0.2, 1.6, "warning"), (0.08, 1.8, None), (0.4, 0.9, None)],
)
def test_a_generator_that_takes_scarce_cpu_from_its_server_measures_itself(
    client_s_per_s: float, server_s_per_s: float, severity: str | None
) -> None:
    def busy(sample: Sample) -> Sample:
        at_s = sample.at_ns / S
        both_s_per_s = client_s_per_s + server_s_per_s
        return dataclasses.replace(
            sample, server_cpu_s=server_s_per_s * at_s, machine_busy_s=(both_s_per_s + 0.1) * at_s
        )

    case = Case(
        load={**CLOSED, "concurrency": 16},
        per_s=500,
        latency_ms=30,
        client_cpu_s=10 * client_s_per_s,
        change_sample=busy,
    )
    check = case.checks().get("client-cpu")
    assert (check.severity if check else None) == severity
    assert check is None or "were short of CPU, and it took" in check.words


def test_saturated_client_voids_a_closed_loop_however_slow_the_model() -> None:
    check = Case(load={**CLOSED, "concurrency": 64}, per_s=50, latency_ms=1000, client_cpu_s=8.8).checks()[
        "client-cpu"
    ]
    assert check.severity == "void"
    assert "busy 88% of the time" in check.words


def test_share_of_a_twelfth_warns() -> None:
    check = Case(load=CLOSED, latency_ms=4, client_cpu_s=10 * 20 * 0.4e-3).checks()["client-cpu"]
    assert check.severity == "warning"
    assert "10% of the median latency of 4.00 ms is its own" in check.words


def test_answers_of_a_batch_wait_for_each_other_in_the_client() -> None:
    def batches(sample: Sample) -> Sample:
        count = sample.statistics.success if sample.statistics else 0
        return dataclasses.replace(
            sample,
            statistics=ModelCounts(
                success=count, inferences=count, executions=count // 16, batches={16: count // 16}
            ),
        )

    load = {**CLOSED, "concurrency": 16}
    alone = Case(load=load, per_s=400, latency_ms=40, client_cpu_s=10 * 400 * 0.5e-3)
    assert "client-cpu" not in alone.checks()
    assert dataclasses.replace(alone, change_sample=batches).checks()["client-cpu"].severity == "warning"


def test_work_on_a_stream_goes_on_beside_the_server_so_only_a_piece_counts() -> None:
    def stream(one: Record) -> Record:
        pieces = tuple(one.due_ns + round(part * 20 * MS) for part in range(1, 33))
        return dataclasses.replace(one, ended_ns=pieces[-1], piece_ns=pieces, output_tokens=32)

    # 0.4 ms a piece: 2% of 20 ms, though 12.8 ms of a request, and a third of a core at most.
    streams = Case(
        load={**CLOSED, "concurrency": 4}, per_s=6, change=stream, client_cpu_s=10 * 6 * 32 * 0.4e-3
    )
    assert "client-cpu" not in streams.checks()
    check = dataclasses.replace(streams, client_cpu_s=10 * 6 * 32 * 3e-3).checks()["client-cpu"]
    assert check.severity == "void"
    assert "3.00 ms of CPU on each piece of a stream" in check.words
    assert "median time to the first token of 20.0 ms" in check.words


def test_open_loop_is_not_void_for_its_own_cpu_but_says_that_latencies_are_upper_bounds() -> None:
    check = Case(per_s=700, latency_ms=1.2, client_cpu_s=2.5).checks()["client-cpu"]
    assert check.severity == "warning"
    assert "upper bounds" in check.words


def test_other_processes_on_the_machine_are_told_of() -> None:
    def busy(share: float) -> Callable[[Sample], Sample]:
        return lambda one: dataclasses.replace(one, machine_busy_s=(0.51 + 2 * share) * one.at_ns / S)

    assert "machine-cpu" not in Case(change_sample=busy(0.09)).checks()
    check = Case(change_sample=busy(0.30)).checks()["machine-cpu"]
    assert check.severity == "warning"
    assert "other processes used 30% of this machine's CPUs, server and generator 25%" in check.words


def test_stolen_cpu_is_told_of() -> None:
    stolen = Case(change_sample=lambda one: dataclasses.replace(one, machine_stolen_s=0.1 * one.at_ns / S))
    assert "gave 5% of this machine's CPU time" in stolen.checks()["machine-cpu"].words


def test_full_machine_of_a_generator_whose_server_is_elsewhere_is_told_of() -> None:
    def remote(share: float) -> Callable[[Sample], Sample]:
        return lambda one: dataclasses.replace(
            one, server=None, server_cpu_s=None, machine_busy_s=share * one.machine_total_s
        )

    assert "machine-cpu" not in Case(change_sample=remote(0.85)).checks()
    assert "busy at 95%" in Case(change_sample=remote(0.95)).checks()["machine-cpu"].words


def test_clock_that_was_set_warns_and_voids_where_times_come_from_it() -> None:
    assert "clock" not in Case(wall_moved_s=0.4).checks()
    check = Case(wall_moved_s=-3600).checks()["clock"]
    assert (check.severity, "jumped by -3600.0 s" in check.words) == ("warning", True)
    tool = Case(load=CLOSED, generator="perf_analyzer", change_sample=after(5, wall_ahead_s=1e9 + 2))
    assert tool.checks()["clock"].severity == "void"


def test_suspended_machine_voids() -> None:
    check = Case(wall_moved_s=30, change_sample=after(5, suspended_s=30)).checks()["clock"]
    assert check.severity == "void"
    assert "suspended for 30.0 s" in check.words


@pytest.mark.parametrize(("pages", "severity"), [(100, None), (1000, "warning"), (20_000, "void")])
def test_swapping_warns_and_voids(pages: int, severity: str | None) -> None:
    check = Case(change_sample=after(5, swap_in_pages=77 + pages)).checks().get("swapping")
    assert (check.severity if check else None) == severity


def test_swapping_before_the_window_is_nothing_to_it() -> None:
    assert "swapping" not in Case(change_sample=after(1, swap_in_pages=77 + 20_000)).checks()


def test_fewer_than_thirty_answers_void() -> None:
    assert "samples" not in Case(per_s=3).checks()
    check = Case(per_s=2.9).checks()["samples"]
    assert check.severity == "void"
    assert "only 29 answers" in check.words
    assert Case(per_s=2.9, profile={"start": "cold"}).checks()["samples"].severity == "warning"


def test_slo_needs_a_hundred_answers() -> None:
    slo = {"slo": {"p99_latency_ms": 100}}
    assert "samples" not in Case(profile=slo).checks()
    check = Case(per_s=9, profile=slo).checks()["samples"]
    assert (check.severity, "90 answers have none" in check.words) == ("warning", True)
    assert "samples" not in Case(per_s=9).checks()


def test_unsteady_window_warns_with_its_own_note() -> None:
    check = Case(window=dataclasses.replace(WINDOW, steady=False, note="throughput fell")).checks()[
        "unstable"
    ]
    assert check.severity == "warning"
    assert "did not become steady: throughput fell." in check.words


def test_load_beyond_the_capacity_piles_up() -> None:
    def slower_and_slower(one: Record) -> Record:
        # Answers at 80% of the rate.
        return dataclasses.replace(one, ended_ns=round(one.due_ns * 1.25) + 40 * MS)

    check = Case(change=slower_and_slower).checks()["backlog"]
    assert check.severity == "warning"
    assert "requests piled up" in check.words
    assert "20/s came and 16/s were answered" in check.words


def test_stalls_and_bursts_that_are_worked_off_are_no_backlog() -> None:
    def stalling(one: Record) -> Record:
        # The server stands still in the last second of the window.
        until_ns = 12 * S + 200 * MS
        stalled = 11 * S <= one.due_ns < until_ns
        return dataclasses.replace(one, ended_ns=until_ns if stalled else one.ended_ns)

    assert "backlog" not in Case(change=stalling).checks()


def test_failures_are_counted_by_kind_with_the_first_of_them() -> None:
    check = Case(change=failing(0.1)).checks()["errors"]
    assert check.severity == "warning"
    assert "20 of 200 requests failed (10%: 20 server)" in check.words
    assert "The first: server: out of memory" in check.words


def test_pieces_of_several_tokens_are_told_of() -> None:
    def pieces(tokens: int) -> Callable[[Record], Record]:
        return lambda one: dataclasses.replace(
            one, piece_ns=(one.due_ns + MS, one.ended_ns), output_tokens=tokens
        )

    assert "pieces" not in Case(change=pieces(2)).checks()
    assert "held 1.5 tokens" in Case(change=pieces(3)).checks()["pieces"].words


def test_another_process_of_the_server_voids() -> None:
    check = Case(change_sample=after(6, server="9 since 2.0")).checks()["server-restarted"]
    assert check.severity == "void"
    assert "from 6.0 s on" in check.words


def test_statistics_that_begin_anew_void_also_where_no_process_is_seen() -> None:
    def reloaded(one: Sample) -> Sample:
        count = one.at_ns // S * 3
        begun = dataclasses.replace(one, server=None, server_cpu_s=None)
        return (
            dataclasses.replace(begun, statistics=ModelCounts(success=count)) if one.at_ns >= 6 * S else begun
        )

    check = Case(change_sample=reloaded).checks()["server-restarted"]
    assert check.severity == "void"
    assert "began anew before 6.0 s" in check.words


def test_server_that_died_within_the_window_voids_and_at_its_end_warns() -> None:
    gone = {"server": None, "server_cpu_s": None, "statistics": None}
    check = Case(change_sample=after(6, **gone)).checks()["server-restarted"]
    assert (check.severity, "ended before 6.0 s" in check.words) == ("void", True)
    assert Case(change_sample=after(12, **gone)).checks()["server-restarted"].severity == "warning"
    assert "server-restarted" not in Case(change_sample=after(14, **gone)).checks()


def test_server_without_statistics_is_told_of() -> None:
    checks = Case(change_sample=lambda one: dataclasses.replace(one, statistics=None)).checks()
    assert checks["server-not-seen"].severity == "warning"
    assert "server-not-seen" in Case(change_sample=lambda _: None).checks()


@pytest.mark.parametrize(
    ("factor", "words"), [(1.3, "others use it"), (0.6, "another server or version"), (1.01, None)]
)
def test_counts_of_server_and_client_are_compared(factor: float, words: str | None) -> None:
    def counted(one: Sample) -> Sample:
        assert one.statistics is not None
        return dataclasses.replace(
            one, statistics=ModelCounts(success=round(factor * one.statistics.success))
        )

    check = Case(change_sample=counted).checks().get("counts-differ")
    assert (check is None) == (words is None)
    assert words is None or (check is not None and words in check.words)
    tool = Case(load=CLOSED, change_sample=counted, generator="perf_analyzer")
    assert "counts-differ" not in tool.checks()


def test_requests_that_failed_here_may_have_been_answered_there() -> None:
    def server_saw_all(one: Sample) -> Sample:
        return dataclasses.replace(one, statistics=ModelCounts(success=20 * one.at_ns // S))

    checks = Case(change=failing(0.2), change_sample=server_saw_all).checks()
    assert "counts-differ" not in checks


def test_answers_that_the_server_sent_and_the_client_had_not_read_are_not_of_others() -> None:
    def read_late(one: Record) -> Record:
        return dataclasses.replace(one, ended_ns=one.ended_ns + 5 * S)

    def counted_in_time(one: Sample) -> Sample:
        return dataclasses.replace(one, statistics=ModelCounts(success=20 * one.at_ns // S))

    assert "counts-differ" not in Case(change=read_late, change_sample=counted_in_time).checks()


def test_answers_of_the_response_cache_are_told_of() -> None:
    def cached(one: Sample) -> Sample:
        assert one.statistics is not None
        count = one.statistics.success
        return dataclasses.replace(one, statistics=dataclasses.replace(one.statistics, cache_hits=count // 2))

    check = Case(change_sample=cached).checks()["response-cache"]
    assert "answered 50% of the requests, and only 64 different ones" in check.words


def test_what_voids_comes_first() -> None:
    checks = Case(change=failing(0.1), lag_ms=30).checks()
    assert list(checks) == ["generator-lag", "errors"]


def test_every_rule_is_explained() -> None:
    explained = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in RULES if f"## `{name}`" not in explained] == []
