"""Figures from records and samples, against ones that were worked out by hand, and properties that hold of any."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._profile import PricePart, Profile, SloPart
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf.judge._metrics import (
    NEEDED,
    figures_of,
    is_good,
    population,
    quantiles_ms,
    slo_verdicts,
    tpot_ns,
)
from enginesmith_client.perf.observe._samples import ModelCounts, Sample

MS = 1_000_000


def record(number: int, due_ms: float, latency_ms: float, **others: object) -> Record:
    due_ns = round(due_ms * MS)
    fields = {"sent_ns": due_ns, "ended_ns": due_ns + round(latency_ms * MS)} | others
    return Record(number, due_ns, **fields)  # type: ignore[arg-type]


def stream(number: int, due_ms: float, pieces_ms: Sequence[float], **others: object) -> Record:
    """A stream whose pieces come so long after it was due; it ends with the last."""
    pieces = tuple(round((due_ms + piece) * MS) for piece in pieces_ms)
    tokens = {"output_tokens": len(pieces), "piece_ns": pieces} | others
    return record(number, due_ms, pieces_ms[-1], **tokens)


def figures(
    records: Sequence[Record],
    *,
    start_ms: float = 0,
    end_ms: float = 1000,
    closed: bool = True,
    samples: Sequence[Sample] = (),
    **profile: object,
) -> Figures:
    window = Window(round(start_ms * MS), round(end_ms * MS), steady=True)
    return figures_of(records, window, Profile.model_validate(profile), samples, closed=closed)


@pytest.mark.parametrize(("percent", "name"), [(90, "p90"), (95, "p95"), (99, "p99"), (99.9, "p999")])
def test_percentile_needs_enough_samples(percent: float, name: str) -> None:
    least = NEEDED[percent]
    assert least == round(1 / (1 - percent / 100))
    enough, too_few = quantiles_ms(range(least)), quantiles_ms(range(least - 1))
    assert enough is not None
    assert getattr(enough, name) is not None
    assert too_few is None or getattr(too_few, name) is None


def test_percentiles_are_the_measured_values_that_perf_analyzer_would_name() -> None:
    # Index floor(q (n - 1) + 0.5) of 0..99: 49.5 + 0.5 = 50, 89.1 -> 89, 94.05 -> 94, 98.01 -> 98.
    found = quantiles_ms([value * MS for value in reversed(range(100))])
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99, found.p999) == (50, 89, 94, 98, None)
    assert (found.count, found.mean, found.max) == (100, 49.5, 99)


def test_no_values_have_no_distribution() -> None:
    assert quantiles_ms([]) is None


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
def test_percentiles_rise_are_measured_values_and_do_not_depend_on_order(values: list[int]) -> None:
    found = quantiles_ms(values)
    assert found is not None
    assert found == quantiles_ms(sorted(values))
    told = [one for one in (found.p50, found.p90, found.p95, found.p99, found.p999) if one is not None]
    assert told == sorted(told)
    assert told[-1] <= found.max == max(values) / 1e6
    measured = {value / 1e6 for value in values}
    assert measured.issuperset(told)
    # At least half are not above the median, and half not below.
    assert sum(value / 1e6 <= found.p50 for value in values) * 2 >= len(values)
    assert sum(value / 1e6 >= found.p50 for value in values) * 2 >= len(values)


def test_closed_loop_counts_what_ended_within_the_window() -> None:
    records = [record(0, 80, 10), record(1, 90, 20), record(2, 150, 10), record(3, 195, 10)]
    found = figures(records, start_ms=100, end_ms=200)
    assert [one.number for one in population(records, Window(100 * MS, 200 * MS, True), closed=True)] == [
        1,
        2,
    ]
    assert found.requests == 2
    assert found.requests_per_s == 20
    assert found.offered_per_s is None
    assert found.send_lag_ms is None


def test_open_loop_counts_what_was_due_within_the_window_however_late_it_ended() -> None:
    records = [record(0, 80, 30), record(1, 110, 5), record(2, 190, 500, sent_ns=192 * MS)]
    found = figures(records, start_ms=100, end_ms=200, closed=False)
    assert found.requests == 2
    assert found.offered_per_s == 20
    # Throughput is what ended within it: 0 and 1.
    assert found.requests_per_s == 20
    assert found.latency_ms is not None
    assert found.latency_ms.max == 500
    assert found.send_lag_ms is not None
    assert found.send_lag_ms.max == 2


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    late = record(0, 100, 10, sent_ns=108 * MS)
    found = figures([late], closed=False)
    assert found.latency_ms is not None
    assert found.latency_ms.p50 == 10


def test_failures_are_counted_by_kind_and_have_no_latency() -> None:
    records = [record(0, 0, 10), record(1, 10, 900, outcome="deadline"), record(2, 20, 1, outcome="server")]
    found = figures([*records, record(3, 30, 1, outcome="server")])
    assert dict(found.errors) == {"server": 2, "deadline": 1}
    assert found.requests == 4
    assert found.requests_per_s == 1
    assert found.latency_ms is not None
    assert (found.latency_ms.count, found.latency_ms.max) == (1, 10)


def test_batched_requests_count_their_rows() -> None:
    found = figures([record(0, 0, 10, rows=8), record(1, 10, 10, rows=8)])
    assert (found.requests_per_s, found.rows_per_s) == (2, 16)


def test_streams_have_first_tokens_gaps_and_times_per_token() -> None:
    records = [
        stream(0, 100, [40, 50, 70], prompt_tokens=7),
        stream(1, 300, [20, 30], prompt_tokens=9, sent_ns=305 * MS),
    ]
    found = figures(records, closed=False)
    assert found.ttft_ms is not None
    assert found.itl_ms is not None
    assert found.tpot_ms is not None
    assert (found.ttft_ms.mean, found.ttft_ms.max) == (30, 40)
    # 10 and 20 of the first, 10 of the second; not from the end of one to the beginning of the next.
    assert (found.itl_ms.count, found.itl_ms.max) == (3, 20)
    assert found.itl_ms.mean == pytest.approx(40 / 3)
    # (70 - 40) / 2 and (30 - 20) / 1.
    assert (found.tpot_ms.count, found.tpot_ms.mean) == (2, 12.5)
    assert (found.output_tokens_per_s, found.prompt_tokens_per_s) == (5, 16)
    assert (found.mean_output_tokens, found.mean_prompt_tokens) == (2.5, 8)


def test_time_per_token_counts_tokens_where_a_piece_holds_several() -> None:
    found = figures([stream(0, 0, [10, 30, 50], output_tokens=9)])
    assert found.itl_ms is not None
    assert found.tpot_ms is not None
    assert found.itl_ms.mean == 20
    assert found.tpot_ms.mean == 5


def test_an_answer_in_one_piece_has_a_first_token_and_no_time_between_tokens() -> None:
    for tokens in (1, 8):
        found = figures([stream(0, 0, [10], output_tokens=tokens)], slo={"itl_ms": 5})
        assert found.ttft_ms is not None
        assert found.itl_ms is None
        assert found.tpot_ms is None
        # Nobody waited for a second piece, and nothing is known of how fast tokens come.
        assert found.good_per_s == 1
        assert slo_verdicts(found, SloPart(itl_ms=5))[0].met is None


def test_models_without_tokens_have_no_figures_of_tokens() -> None:
    found = figures([record(0, 0, 10)])
    tokens = (found.output_tokens_per_s, found.mean_prompt_tokens, found.ttft_ms, found.tokens_per_s_p1)
    assert tokens == (None, None, None, None)


def test_price_is_spread_over_what_was_done() -> None:
    # 100 tokens a second are 360,000 an hour; at 3.60 an hour a million costs 10.
    records = [stream(number, number * 10, [1, 2, 3, 4]) for number in range(25)]
    found = figures(records, price=PricePart(per_hour=3.6).model_dump())
    assert found.cost_per_million_output_tokens == pytest.approx(10)
    assert found.cost_per_million_requests == pytest.approx(40)
    assert figures(records).cost_per_million_requests is None


SLO = SloPart(p99_latency_ms=100, ttft_ms=50, itl_ms=20, min_tokens_per_s=20)


@pytest.mark.parametrize(
    ("pieces_ms", "good"),
    [
        ([50, 70, 90], True),
        ([51, 70, 90], False),  # first token
        ([20, 70, 101], False),  # latency
        ([20, 60, 61], False),  # 20.5 ms a token
        ([40, 60, 80], True),
        ([49], True),  # a single token; 20.4 tokens per second
        ([40, 51], True),
    ],
)
def test_request_is_good_when_it_keeps_every_limit(pieces_ms: list[float], good: bool) -> None:
    assert is_good(stream(0, 0, pieces_ms), SLO) is good


def test_request_is_good_only_at_the_least_rate_of_tokens() -> None:
    slow = SloPart(min_tokens_per_s=50)
    assert is_good(stream(0, 0, [10, 40]), slow)
    assert not is_good(stream(0, 0, [10, 41]), slow)
    assert not is_good(record(0, 0, 10), slow)


def test_failed_request_is_not_good() -> None:
    assert is_good(record(0, 0, 10), SloPart(p99_latency_ms=20))
    assert not is_good(record(0, 0, 10, outcome="server"), SloPart(p99_latency_ms=20))


def test_goodput_counts_good_requests_of_all() -> None:
    records = [record(number, number * 10, 5 if number % 4 else 50) for number in range(40)]
    records.append(record(40, 400, 1, outcome="overloaded"))
    found = figures(records, closed=False, slo={"p99_latency_ms": 20})
    assert found.good_per_s == 30
    assert found.good_percent == pytest.approx(100 * 30 / 41)
    assert figures(records, closed=False).good_per_s is None


def test_goodput_is_unknown_where_a_limit_cannot_be_measured() -> None:
    found = figures([record(0, 0, 5)], slo={"ttft_ms": 20})
    assert found.good_per_s is None
    assert [verdict.met for verdict in slo_verdicts(found, SloPart(ttft_ms=20))] == [None, True]


def test_goodput_is_nought_when_all_requests_fail() -> None:
    found = figures([record(0, 0, 5, outcome="server")], slo={"ttft_ms": 20})
    assert (found.good_per_s, found.good_percent) == (0, 0)


def test_verdicts_compare_the_99th_percentile_and_the_share_of_errors() -> None:
    records = [stream(number, number * 5, [10, 20, 40]) for number in range(100)]
    found = figures([*records, record(100, 500, 1, outcome="server")])
    slo = SloPart(p99_latency_ms=40, ttft_ms=9, itl_ms=15, min_tokens_per_s=76, max_error_percent=1)
    verdicts = {one.name: (one.measured, one.met) for one in slo_verdicts(found, slo)}
    assert verdicts == {
        "p99_latency_ms": (40, True),
        "ttft_ms": (10, False),
        "itl_ms": (15, True),
        "min_tokens_per_s": (pytest.approx(75), False),
        "max_error_percent": (pytest.approx(100 / 101), True),
    }


def test_slo_without_promises_has_no_verdicts_and_errors_alone_have_one() -> None:
    found = figures([record(0, 0, 5), record(1, 1, 5, outcome="server")])
    assert slo_verdicts(found, SloPart()) == ()
    (verdict,) = slo_verdicts(found, SloPart(max_error_percent=10))
    assert (verdict.measured, verdict.met) == (50, False)


@pytest.mark.parametrize(("slowest_ms", "kept"), [(40, True), (41, False)])
def test_of_fewer_than_a_hundred_answers_the_slowest_decides(slowest_ms: float, kept: bool) -> None:
    streams = [stream(number, number * 5, [10, 20, 30]) for number in range(98)]
    found = figures([*streams, stream(98, 500, [slowest_ms - 10, slowest_ms])])
    slo = SloPart(p99_latency_ms=40, ttft_ms=30, itl_ms=10, min_tokens_per_s=50)
    verdicts = {one.name: (one.measured, one.met) for one in slo_verdicts(found, slo)}
    assert found.latency_ms is not None
    assert found.latency_ms.p99 is None
    assert verdicts == {
        "p99_latency_ms": (slowest_ms, kept),
        "ttft_ms": (slowest_ms - 10, kept),
        "itl_ms": (10, True),
        "min_tokens_per_s": (pytest.approx(2000 / slowest_ms), kept),
        "max_error_percent": (0, True),
    }


def test_of_a_hundred_answers_one_may_break_a_promise_and_two_may_not() -> None:
    for late, kept in ((1, True), (2, False)):
        records = [record(number, number, 50 if number < late else 5) for number in range(100)]
        verdict, _ = slo_verdicts(figures(records), SloPart(p99_latency_ms=10))
        assert verdict.met is kept


times_ms = st.floats(0, 2000, allow_nan=False)


@given(
    st.lists(st.tuples(times_ms, st.floats(0, 500), st.sampled_from(["ok", "server"])), max_size=80),
    st.booleans(),
)
def test_figures_are_plain_finite_and_independent_of_the_order_of_records(
    told: list[tuple[float, float, str]], closed: bool
) -> None:
    records = [record(number, due, late, outcome=how) for number, (due, late, how) in enumerate(told)]
    found = figures(records, start_ms=200, end_ms=1200, closed=closed, slo={"p99_latency_ms": 100})
    again = figures(records[::-1], start_ms=200, end_ms=1200, closed=closed, slo={"p99_latency_ms": 100})
    assert found == dataclasses.replace(again, latency_ms=found.latency_ms, send_lag_ms=found.send_lag_ms)
    json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert sum(found.errors.values()) <= found.requests
    assert (found.good_per_s or 0) * found.duration_s <= found.requests + 1e-9


def sample(at_ms: float, **fields: object) -> Sample:
    return Sample(at_ns=round(at_ms * MS), wall_ahead_s=0.0, **fields)  # type: ignore[arg-type]


def test_server_figures_are_differences_of_the_samples_nearest_to_the_window() -> None:
    def counts(requests: int, batches: dict[int, int]) -> ModelCounts:
        return ModelCounts(
            success=requests,
            inferences=2 * requests,
            executions=sum(batches.values()),
            queue_s=0.004 * requests,
            queue_count=requests,
            compute_infer_s=0.01 * requests,
            compute_count=requests,
            batches=batches,
        )

    samples = [
        sample(0, statistics=counts(5, {1: 5})),
        sample(1010, statistics=counts(100, {1: 90, 4: 10})),
        sample(1900, statistics=counts(290, {1: 100, 4: 30, 8: 10})),
        sample(3000, statistics=counts(500, {1: 100, 4: 30, 8: 90})),
    ]
    server = figures([], start_ms=1000, end_ms=2000, samples=samples).server
    assert server is not None
    assert (server.requests, server.executions) == (190, 40)
    assert dict(server.batch_sizes) == {1: 10, 4: 20, 8: 10}
    assert server.mean_batch == (10 + 80 + 80) / 40
    assert server.queue_ms == pytest.approx(4)
    assert server.compute_infer_ms == pytest.approx(10)
    assert server.compute_input_ms == 0


def test_ensemble_is_asked_how_long_its_parts_queued_and_which_batches_the_slow_one_formed() -> None:
    def at(at_ms: float, count: int) -> Sample:
        whole = ModelCounts(
            success=count, queue_s=0.001 * count, queue_count=count, executions=count, batches={1: count}
        )
        fast = ModelCounts(
            success=count, queue_s=0.002 * count, compute_infer_s=0.1, executions=count, batches={1: count}
        )
        slow = ModelCounts(
            success=count,
            queue_s=0.003 * count,
            compute_infer_s=count,
            executions=count // 4,
            batches={4: count // 4},
        )
        return sample(at_ms, statistics=whole, composing={"fast": fast, "slow": slow})

    server = figures([], samples=[at(0, 0), at(1000, 40)]).server
    assert server is not None
    assert server.queue_ms == pytest.approx(6)
    assert dict(server.batch_sizes) == {4: 10}


def test_language_model_tells_its_steps_and_memory_through_metrics() -> None:
    def metrics(steps: int, used: float) -> dict[str, float]:
        return {
            'enginesmith_llm_steps_total{batch_size="1"}': 10.0,
            'enginesmith_llm_steps_total{batch_size="16"}': float(steps),
            "enginesmith_llm_kv_used_bytes": used,
            "enginesmith_llm_kv_total_bytes": 4000.0,
            "enginesmith_llm_prompt_tokens_total": 10.0 * steps,
            "enginesmith_llm_reused_tokens_total": 4.0 * steps,
        }

    samples = [
        sample(at_ms, statistics=ModelCounts(success=steps, batches={1: steps}), metrics=metrics(steps, used))
        for at_ms, steps, used in ((0, 0, 100.0), (500, 40, 3000.0), (1000, 50, 200.0))
    ]
    server = figures([], samples=samples).server
    assert server is not None
    assert (dict(server.batch_sizes), server.executions, server.mean_batch) == ({16: 50}, 50, 16)
    assert (server.kv_used_bytes, server.kv_total_bytes, server.kv_used_percent) == (3000, 4000, 75)
    assert server.kv_hit_percent == 40


def test_tensorrt_llm_tells_blocks_and_scheduled_requests() -> None:
    blocks = 'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{}"}}'

    def at(at_ms: float, reused: int, scheduled: int) -> Sample:
        kinds = {"reused": reused, "tokens_per": 32, "used": 30, "max": 120}
        metrics = {blocks.format(kind): float(value) for kind, value in kinds.items()}
        metrics['nv_trt_llm_request_metrics{request_type="scheduled"}'] = float(scheduled)
        return sample(at_ms, statistics=ModelCounts(success=int(at_ms)), metrics=metrics)

    asked = [record(number, 10, 100, prompt_tokens=64) for number in range(10)]
    server = figures(asked, samples=[at(0, 5, 2), at(1000, 10, 6)]).server
    assert server is not None
    assert server.kv_hit_percent == 25
    assert server.kv_used_percent == 25
    assert server.mean_batch == 4
    assert server.kv_used_bytes is None


def test_statistics_that_began_anew_give_no_figures() -> None:
    samples = [sample(0, statistics=ModelCounts(success=10)), sample(1000, statistics=ModelCounts(success=3))]
    assert figures([], samples=samples).server is None
    assert figures([], samples=[]).server is None
    assert figures([], samples=[sample(0)]).usage is None


def test_usage_is_of_one_core_and_the_most_memory() -> None:
    def at(at_ms: float, busy_s: float, rss: int, **fields: object) -> Sample:
        return sample(
            at_ms,
            client_cpu_s=0.5 * at_ms / 1000,
            machine_busy_s=busy_s,
            machine_total_s=4 * at_ms / 1000,
            server_cpu_s=1.5 * at_ms / 1000,
            server_rss_bytes=rss,
            **{
                "server": "7",
                "metrics": {'nv_gpu_utilization{gpu="a"}': 0.5, 'nv_gpu_utilization{gpu="b"}': 1.0},
            }
            | fields,
        )

    samples = [at(0, 0, 100), at(500, 1, 900), at(1000, 3, 300)]
    usage = figures([], samples=samples).usage
    assert usage is not None
    assert (usage.client_cpu_percent, usage.server_cpu_percent, usage.machine_cpu_percent) == (50, 150, 75)
    assert usage.server_rss_bytes == 900
    assert usage.gpu_percent == 150
    other = figures([], samples=[at(0, 0, 1), at(1000, 3, 1, server="8")]).usage
    assert other is not None
    assert other.server_cpu_percent is None


def test_time_per_token_is_unknown_without_a_count() -> None:
    assert tpot_ns(stream(0, 0, [1, 2, 3], output_tokens=None)) is None
    assert tpot_ns(stream(0, 0, [1, 2, 3])) == MS
