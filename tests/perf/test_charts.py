"""Drawings say what was measured, at the right place, and stay within their frame."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import HOSTILE, good_run, samples, tensor_records

from enginesmith_client.perf._quantities import quantity, tick
from enginesmith_client.perf.report._charts import svg_of
from enginesmith_client.perf.report._distribution_plots import Times, histogram, latency_cdf, times_of
from enginesmith_client.perf.report._plots import (
    Axis,
    Bars,
    Forest,
    ForestRow,
    Histogram,
    Lines,
    Mark,
    Plot,
    Series,
    Span,
    Spot,
)
from enginesmith_client.perf.report._scales import linear_scale, log_scale
from enginesmith_client.perf.report._timeline_plots import timeline_plots

MS = Axis("latency", "ms", log=True)
COUNT = Axis("requests", "count")
SVG = "{http://www.w3.org/2000/svg}"


def drawn(plot: Plot) -> ElementTree.Element:
    """The drawing, parsed: it is well-formed."""
    return ElementTree.fromstring(svg_of(plot))


def texts(picture: ElementTree.Element) -> list[str]:
    return [one.text or "" for one in picture.iter(f"{SVG}text")]


def tooltips(picture: ElementTree.Element) -> list[str]:
    return [one.text or "" for one in picture.iter(f"{SVG}title")]


PLOTS: dict[str, Plot] = {
    "lines": Lines(
        "Throughput",
        "words",
        Axis("time", "s", ends=(0.0, 10.0)),
        MS,
        (
            Series("p50", (0.0, 5.0, 10.0), (1.0, None, 3.0)),
            Series("p99", (0.0, 5.0, 10.0), (4.0, 5.0, 400.0), steps=True),
        ),
        marks=(Mark("x", 9.99, "the last"), Mark("y", 100.0, "SLO 100 ms", "bad")),
        spots=(Spot(9.9, 3.0, "knee", "good"),),
        spans=(Span(1.0, 9.0, "measured"),),
    ),
    "histogram": Histogram(
        "TTFT", "words", MS, (1.0, 2.0, 4.0), (3, 1), (Mark("x", 4.0, "SLO 4.00 ms", "bad"),)
    ),
    "bars": Bars("Batches", "words", "batch size", COUNT, ("1", "2", "16"), (10.0, 300.0, 20.0)),
    "forest": Forest(
        "B against A", "words", (ForestRow("latency p50", 1.05, 1.03, 1.08, "worse", "bad", 0.98, 1.02),)
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_drawing_is_an_image_with_its_words_as_text(name: str) -> None:
    picture = drawn(PLOTS[name])
    assert picture.get("role") == "img"
    assert picture.get("aria-label") == f"{PLOTS[name].title}. words"


@pytest.mark.parametrize("name", PLOTS)
def test_everything_lies_within_the_frame(name: str) -> None:
    picture = drawn(PLOTS[name])
    _, _, width, height = map(float, (picture.get("viewBox") or "").split())
    for x, y in places(picture):
        assert 0 <= x <= width
        assert 0 <= y <= height


def places(picture: ElementTree.Element) -> Iterator[tuple[float, float]]:
    """Every point that a shape or a text has, but for text that is turned."""
    for one in picture.iter():
        if one.get("transform"):
            continue
        if (d := one.get("d")) is not None:
            yield from ((float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", d))
        for x_name, y_name in (("x", "y"), ("cx", "cy")):
            if one.get(x_name) is not None:
                yield float(one.get(x_name, "")), float(one.get(y_name, ""))
        if one.tag == f"{SVG}rect":
            yield (
                float(one.get("x", "")) + float(one.get("width", "")),
                float(one.get("y", "")) + float(one.get("height", "")),
            )


def test_names_are_text_and_never_markup() -> None:
    row = ForestRow(HOSTILE, 1.0, 0.9, 1.1, HOSTILE, "plain", 0.98, 1.02, HOSTILE)
    series = (Series(HOSTILE, (1.0, 2.0), (1.0, 2.0)), Series("b", (1.0,), (1.0,), labels=(HOSTILE,)))
    marks = (Mark("x", 1.5, HOSTILE), Mark("y", 1.5, HOSTILE))
    for plot in (
        Forest(HOSTILE, HOSTILE, (row,)),
        Lines(
            HOSTILE,
            HOSTILE,
            Axis(HOSTILE, "ms"),
            Axis(HOSTILE, "ms"),
            series,
            marks,
            (Spot(1, 1, HOSTILE),),
            (Span(1, 2, HOSTILE),),
        ),
        Bars(HOSTILE, HOSTILE, HOSTILE, COUNT, (HOSTILE,), (1.0,)),
    ):
        picture = drawn(plot)
        assert {one.tag.removeprefix(SVG) for one in picture.iter()} <= {
            "svg",
            "g",
            "path",
            "text",
            "title",
            "circle",
            "rect",
        }
        assert HOSTILE in texts(picture)


def test_higher_values_are_drawn_higher_and_later_ones_further_right() -> None:
    picture = drawn(
        Lines("t", "w", Axis("x", "count"), Axis("y", "count"), (Series("s", (1.0, 2.0), (10.0, 20.0)),))
    )
    (x1, y1), (x2, y2) = [
        (float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in picture.iter(f"{SVG}circle")
    ]
    assert x1 < x2
    assert y1 > y2


def test_a_gap_in_the_values_is_a_gap_in_the_line() -> None:
    series = Series("s", (1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 2.0, None, 4.0, 5.0))
    lines = [
        one
        for one in drawn(Lines("t", "w", COUNT, COUNT, (series,))).iter(f"{SVG}path")
        if "line" in one.get("class", "")
    ]
    assert len(lines) == 2


def test_points_say_their_values() -> None:
    said = tooltips(drawn(Lines("t", "w", Axis("load", "per_s"), MS, (Series("p99", (250.0,), (12.0,)),))))
    assert "p99: 12.0 ms at 250 /s" in said


def test_labels_of_marks_that_lie_close_do_not_touch() -> None:
    marks = tuple(Mark("x", value, f"mark at {value}") for value in (10.0, 10.1, 10.2))
    picture = drawn(Lines("t", "w", Axis("x", "ms"), COUNT, (Series("s", (1.0, 20.0), (1.0, 2.0)),), marks))
    rows = {one.get("y") for one in picture.iter(f"{SVG}text") if "mark-label" in one.get("class", "")}
    assert len(rows) == 3


def test_many_batch_sizes_keep_readable_names() -> None:
    sizes = tuple(str(size) for size in range(1, 129))
    picture = drawn(Bars("b", "w", "batch size", COUNT, sizes, tuple(map(float, range(128)))))
    named = [one for one in texts(picture) if one in sizes]
    assert 5 < len(named) < 40
    assert sum("bar" in one.get("class", "") for one in picture.iter(f"{SVG}rect")) == 128


@given(st.lists(st.floats(1e-4, 1e7), min_size=1, max_size=20))
def test_scales_hold_all_values_and_their_ticks(values: list[float]) -> None:
    for scale in (linear_scale(values, first=0.0, last=100.0), log_scale(values, first=0.0, last=100.0)):
        assert scale.low <= min(values) * (1 + 1e-9)
        assert scale.high >= max(values) * (1 - 1e-9)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 14
        assert all(scale.low * 0.999999 - 1e-9 <= one <= scale.high * 1.000001 for one in ticks)
        assert list(ticks) == sorted(set(ticks))


@given(st.floats(1e-4, 1e7), st.floats(1e-4, 1e7))
def test_scales_keep_the_order(one: float, other: float) -> None:
    for scale in (
        linear_scale((one, other), first=0.0, last=100.0),
        log_scale((one, other), first=0.0, last=100.0),
    ):
        assert (scale(one) <= scale(other)) == (one <= other) or math.isclose(scale(one), scale(other))


def test_bytes_have_ticks_of_round_powers_of_1024() -> None:
    scale = linear_scale((0, 900 << 20), first=0.0, last=1.0, binary=True)
    assert [tick(value, "bytes", base=scale.base) for value in scale.ticks()][:3] == [
        "0",
        "200 MiB",
        "400 MiB",
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0421, "ms", "42.1 µs"),
        (4.2, "ms", "4.20 ms"),
        (999.7, "ms", "1.00 s"),
        (61_000.0, "ms", "61.0 s"),
        (240.0, "s", "4.00 min"),
        (0.0, "ms", "0 ms"),
        (1234.5, "per_s", "1,234 /s"),
        (9.999, "per_s", "10.0 /s"),
        (1.05, "change", "+5.0%"),
        (0.99999, "change", "0.0%"),
        (1.0, "change", "0.0%"),
        (0.958, "change", "−4.2%"),
        (1 << 30, "bytes", "1.00 GiB"),
        (99.97, "percent", "100%"),
        (None, "ms", "–"),
        (float("nan"), "ms", "–"),
    ],
)
def test_quantities_are_read_in_units_that_fit(value: float | None, unit: Any, text: str) -> None:
    assert quantity(value, unit) == text


@given(st.floats(1e-9, 1e12))
def test_three_digits_are_never_wrong_by_more_than_half_a_percent(value: float) -> None:
    shown = quantity(value, "plain").replace(",", "")
    assert math.isclose(float(shown), value, rel_tol=0.0051)


def test_the_cdf_goes_through_the_quantiles() -> None:
    values = np.arange(1.0, 1001.0)
    plot = latency_cdf({"latency": values}, {"p99_latency_ms": 2000.0})
    (series,) = plot.series
    at = dict(zip(series.x, series.y, strict=True))
    assert all(math.isclose(share or 0, latency / 10) for latency, share in at.items())
    assert series.y[-1] == 100
    assert [mark.label for mark in plot.marks] == ["p50 501 ms", "p99 990 ms", "SLO 2.00 s"]


def test_too_few_values_have_no_p99() -> None:
    plot = latency_cdf({"latency": np.arange(1.0, 51.0)}, {})
    assert [mark.label for mark in plot.marks] == ["p50 26.0 ms"]
    assert "99%" not in plot.words


@given(st.lists(st.floats(0.001, 1e5), min_size=1, max_size=300))
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    plot = histogram("TTFT", np.sort(np.array(values)), limit_ms=50.0)
    assert sum(plot.counts) == len(values)
    assert all(low < high for low, high in zip(plot.edges, plot.edges[1:], strict=False))
    drawn(plot)


def test_a_limit_far_from_the_values_does_not_squeeze_them() -> None:
    values = np.linspace(10.0, 20.0, 200)
    plot = histogram("TTFT", values, limit_ms=5000.0)
    assert plot.x.ends is not None
    assert plot.x.ends[1] < 25
    assert plot.marks[-1].label == "SLO 5.00 s, far to the right"


def test_a_timeline_of_few_requests_has_few_parts(tmp_path: Any) -> None:
    saved = good_run(tmp_path)
    throughput = timeline_plots(saved.run, saved.records()[::10], [])[0]
    assert isinstance(throughput, Lines)
    assert 4 < len(throughput.series[0].x) < 12


def test_a_stall_is_seen_in_the_timeline(tmp_path: Any) -> None:
    saved = good_run(tmp_path)
    records = [
        one
        if not 20 <= one.due_ns / 1e9 < 21
        else type(one)(one.number, one.due_ns, one.sent_ns, one.ended_ns + 5 * 10**9)
        for one in saved.records()
    ]
    latency = next(
        plot for plot in timeline_plots(saved.run, records, []) if plot.title == "Latency over time"
    )
    assert isinstance(latency, Lines)
    p99 = dict(zip(latency.series[1].x, latency.series[1].y, strict=True))
    assert (p99[20.0] or 0) > 5000
    assert all((value or 0) < 2000 for second, value in p99.items() if second != 20.0)


def test_a_part_of_the_run_is_drawn_to_its_end_also_where_no_request_was_due_after_it(tmp_path: Any) -> None:
    saved = good_run(tmp_path)
    records = [one for one in saved.records() if not 10 <= one.due_ns / 1e9 < 12]
    last = records[-1]
    records[-1] = type(last)(last.number, last.due_ns, last.sent_ns, last.ended_ns + 5 * 10**9)
    latency = next(
        plot for plot in timeline_plots(saved.run, records, []) if plot.title == "Latency over time"
    )
    assert isinstance(latency, Lines)
    p50 = latency.series[0]
    shown = [(at, value) for at, value in zip(p50.x, p50.y, strict=True) if value is not None]
    assert [at for at, _ in shown if 9 < at <= 12] == [10.0, 12.0]
    assert shown[-1][0] > records[-1].due_ns / 1e9
    assert shown[-1][1] == shown[-2][1]


def test_the_ring_of_the_knee_does_not_go_through_the_label_of_its_point() -> None:
    def label_y(*spots: Spot) -> float:
        series = Series("p50", (1.0, 2.0), (10.0, 20.0), short_labels=("first", "second"))
        plot = Lines("Load", "two", Axis("x", "plain"), Axis("y", "ms"), (series,), spots=spots)
        found = re.search(r'<text[^>]* y="([\d.]+)"[^>]*>first<', svg_of(plot))
        assert found
        return float(found[1])

    assert label_y() - label_y(Spot(1.0, 10.0, "knee")) > 3


def test_a_server_that_began_anew_leaves_a_gap_not_a_negative_cpu(tmp_path: Any) -> None:
    saved = good_run(tmp_path)
    seen = samples()
    restarted = [
        *seen[:20],
        *(type(one)(one.at_ns, 0.0, client_cpu_s=one.client_cpu_s, server_cpu_s=0.1) for one in seen[20:]),
    ]
    cpu = next(plot for plot in timeline_plots(saved.run, saved.records(), restarted) if plot.title == "CPU")
    assert isinstance(cpu, Lines)
    assert min(value or 0 for value in cpu.series[0].y) >= 0


def test_tens_of_thousands_of_records_stay_a_small_drawing(tmp_path: Any) -> None:
    records = tensor_records(60_000, seconds=3600.0)
    run = good_run(tmp_path).run
    times: Times = times_of(records)
    plots: list[Plot] = [
        latency_cdf({"latency": times.latency}, {}),
        histogram("ITL", times.latency, limit_ms=None),
    ]
    plots += timeline_plots(run, records, samples(seconds=3600))
    assert len(plots) == 6
    for plot in plots:
        assert len(svg_of(plot)) < 60_000, plot.title
