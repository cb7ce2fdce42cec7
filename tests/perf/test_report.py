"""A report says first whether the numbers may be believed, then what they are; and names in it are only text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_cases
import yaml

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._run_files import (
    RECORDS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    SloVerdict,
    load_run,
    save_run,
)
from enginesmith_client.perf.report._figures import SLO_NAMES
from enginesmith_client.perf.report._report import as_json, html, markdown, report_of
from enginesmith_client.perf.report._run import flattened, profile_text

Case = Callable[[Path], object]
CASES: dict[str, Case] = {
    "good run": report_cases.good_run,
    "troubled run": report_cases.troubled_run,
    "void run": report_cases.void_run,
    "run without answers": report_cases.empty_run,
    "short run": report_cases.short_run,
    "sweep": report_cases.a_sweep,
    "suite": report_cases.a_suite,
    "comparison": report_cases.a_comparison,
}


@cache
def page_of(directory: Path) -> str:
    """The page of results that no test changes."""
    return html(directory)


@pytest.fixture(scope="module", params=CASES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    CASES[request.param](directory)
    return directory


class Page(HTMLParser):
    """The elements and the text of a page, by element."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not (self._open and self._open[-1] == tag):
            raise AssertionError(f"</{tag}> closes {self._open[-1:]}")
        self._open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> str:
        return " ".join(" ".join(text for at, text in self.texts if at == tag).split())


def test_a_page_is_well_formed_and_needs_nothing_else(results: Path) -> None:
    page = Page(page_of(results))
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not {"src", "href", "srcset", "onload", "onerror", "onclick"} & {
        name for name, _ in page.attributes
    }
    assert "url(" not in page.of("style")
    assert "@import" not in page.of("style")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert page.tags.count("h1") == 1


def test_a_page_is_less_than_a_megabyte(results: Path) -> None:
    assert len(page_of(results).encode()) < 1 << 20


def test_tables_say_what_their_headings_are_of(results: Path) -> None:
    page = page_of(results)
    assert re.findall(r"<th(?! scope=)", page.replace("<thead", "")) == []


def test_markdown_has_whole_tables_and_no_markup_of_others(results: Path) -> None:
    text = markdown(results)
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    width = 0
    for line in outside.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("| ") else 0
        assert not (cells and width and cells != width), line
        width = cells


def test_json_holds_the_verdict_the_plots_and_the_results_themselves(results: Path) -> None:
    report = report_of(results)
    plain = as_json(results)
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again == plain
    assert (plain["format"], plain["version"], plain["kind"]) == ("enginesmith-bench-report", 1, report.kind)
    assert [one["words"] for one in plain["verdict"]] == [one.words for one in report.verdict]
    plots = [plot for section in plain["sections"] for plot in section["plots"]]
    assert all(plot["kind"] in ("lines", "histogram", "bars", "forest") for plot in plots)
    saved = json.loads((results / f"{report.kind}.json").read_text())
    kept = plain["results"][report.kind]
    assert kept == {key: saved[key] for key in saved if key not in ("format", "version")}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_a_good_run_is_believed_and_its_slo_kept(directory: Path) -> None:
    saved = report_cases.good_run(directory)
    report = report_of(directory)
    assert [one.words for one in report.verdict] == [
        "The numbers may be believed: no check of the harness objects.",
        "The SLO was kept.",
    ]
    assert report.tone == "good"
    assert saved.run.figures.latency_ms is not None
    assert f"p99 {saved.run.figures.latency_ms.p99:.0f} ms" in html(directory)
    assert {plot.title for section in report.sections for plot in section.plots} == {
        "Latency: share of answers within a time",
        "Time to first token",
        "Inter-token latency",
        "Batch sizes that were formed",
        "Answers per second",
        "Latency over time",
        "CPU",
        "Memory of the server",
    }


def test_a_void_run_is_void_first_of_all_and_every_figure_is_crossed_out(directory: Path) -> None:
    report_cases.void_run(directory)
    report = report_of(directory)
    assert report.verdict[0].words.startswith("Void.")
    assert report.tone == "void"
    assert report.reasons[0].words.startswith("client-cpu: the load generator used 98% of a core")
    page = html(directory)
    figures = page[page.index("<h2>Figures") : page.index("<h2>Plots")]
    cells = re.findall(r"<td>(.*?)</td>", figures)
    assert cells
    assert all(cell == "–" or cell.startswith('<s><span class="unseen">void: </span>') for cell in cells)
    assert "<title>echo, 16 at a time (void)</title>" in page
    # Its SLO looks kept, and is not: nothing was learnt.
    assert "SLO was kept." not in page
    assert "~~" in markdown(directory)


def test_broken_promises_are_named_with_their_numbers(directory: Path) -> None:
    report_cases.troubled_run(directory)
    belief, promise = report_of(directory).verdict
    assert (belief.tone, belief.words) == (
        "warning",
        "Partial: the run was ended early (the server is lost).",
    )
    assert promise.tone == "bad"
    assert re.fullmatch(
        r"The SLO was broken: latency, p99 is 8\d\d ms, at most 600 ms is allowed; failed .*", promise.words
    )


def test_a_promise_that_could_not_be_measured_is_not_kept(directory: Path) -> None:
    report_cases.short_run(directory)
    saved = load_run(directory)
    unknown = SloVerdict("ttft_ms", 500.0, None, None)
    save_run(directory, dataclasses.replace(saved.run, slo=(unknown,)))
    promise = report_of(directory).verdict[1]
    assert (
        promise.words
        == "Whether the SLO was kept is not known: time to first token, p99 could not be measured."
    )


def test_names_from_outside_are_only_text(directory: Path) -> None:
    report_cases.troubled_run(directory)
    page = Page(html(directory))
    assert f"chat {report_cases.HOSTILE}" == page.of("h1")
    assert report_cases.HOSTILE in page.of("pre")


def test_the_profile_in_a_report_is_a_profile(directory: Path) -> None:
    run = report_cases.good_run(directory).run
    again = Profile.model_validate(yaml.safe_load(profile_text(run.profile)))
    assert again.as_json() == run.profile


def test_every_promise_of_a_profile_has_words() -> None:
    assert set(SLO_NAMES) == set(Profile().slo.model_dump())


def test_a_run_whose_records_are_gone_is_reported_without_plots(directory: Path) -> None:
    report_cases.good_run(directory)
    (directory / RECORDS_FILE).unlink()
    plots = next(section for section in report_of(directory).sections if section.title == "Plots")
    assert not plots.plots
    assert RECORDS_FILE in plots.words[0]
    assert "<h2>Figures" in html(directory)


def test_a_run_whose_samples_are_gone_says_so(directory: Path) -> None:
    report_cases.good_run(directory)
    (directory / SAMPLES_FILE).unlink()
    plots = next(section for section in report_of(directory).sections if section.title == "Plots")
    assert "CPU" not in [plot.title for plot in plots.plots]
    assert plots.words[0].startswith("CPU and memory over time are missing")


def test_a_sweep_names_what_the_slo_allows_and_crosses_out_void_points(directory: Path) -> None:
    report_cases.a_sweep(directory)
    report = report_of(directory)
    assert [one.words for one in report.verdict] == [
        "1 of 8 points are void and were not used.",
        "Within the SLO: up to 16 at a time.",
    ]
    crossed = re.findall(r'<tr class=crossed><th scope="row">(.*?)</th>', html(directory))
    assert crossed == ["2 at a time"]
    curve = report.sections[0].plots[0]
    assert curve.kind == "lines"
    assert not re.search(r"\b2 at a time", curve.words)
    assert [(mark.value, mark.tone) for mark in curve.marks] == [(150.0, "bad")]
    assert [spot.label for spot in curve.spots] == ["knee"]


def test_a_suite_tells_the_fate_of_every_scenario(directory: Path) -> None:
    report_cases.a_suite(directory)
    report = report_of(directory)
    rows = {row[0]: row[1:] for row in report.sections[0].tables[0].rows}
    assert list(rows) == [
        "chat-short",
        "bursty",
        "many-tiny (void)",
        "embeddings-bulk (skipped)",
        "soak (failed)",
    ]
    assert (rows["chat-short"][-1], rows["bursty"][-1]) == ("kept", "broken")
    assert set(rows["soak (failed)"]) == {"–"}
    assert [one.words for one in report.verdict] == [
        "Void: many-tiny. These numbers say nothing about the server and must not be used.",
        "The SLO was broken in: bursty.",
    ]
    assert "cut to 512 tokens" in markdown(directory)


def test_a_comparison_gives_its_verdict_and_its_intervals(directory: Path) -> None:
    report_cases.a_comparison(directory)
    report = report_of(directory)
    assert report.tone == "bad"
    assert report.verdict[0].words.startswith("B is worse")
    forest = report.sections[0].plots[0]
    assert forest.kind == "forest"
    latency = next(row for row in forest.rows if row.name == "latency p50")
    assert 1.02 < latency.low < latency.ratio < latency.high < 1.09
    assert (latency.verdict, latency.note) == ("worse", "lower is better")
    assert "Latency: share of answers within a time" in [plot.title for plot in report.sections[0].plots]


def test_a_void_comparison_is_void(directory: Path) -> None:
    report_cases.a_comparison(directory, void=True)
    report = report_of(directory)
    assert report.tone == "void"
    assert any("the clock jumped" in one.words for one in report.reasons)
    assert "(void)</title>" in html(directory)
    assert all(table.rows for section in report.sections for table in section.tables)


def test_lists_of_words_are_read_as_words() -> None:
    found = dict(flattened({"cpu_flags": ["avx", "avx2"], "nested": {"sizes": [1, 2]}}))
    assert found == {"cpu_flags": "avx, avx2", "nested.sizes": "[1, 2]"}


def test_a_directory_without_results_is_refused_with_what_could_be_there(tmp_path: Path) -> None:
    with pytest.raises(
        ResultsError, match=r"holds no results: none of comparison\.json, sweep\.json, suite\.json, run\.json"
    ):
        report_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda document: document | {"version": 99}, "version 99"),
        (lambda document: {key: document[key] for key in document if key != "figures"}, "figures"),
    ],
    ids=["another version", "damaged"],
)
def test_results_that_cannot_be_read_are_refused(
    directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]], says: str
) -> None:
    report_cases.good_run(directory)
    path = directory / RUN_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ResultsError, match=says):
        html(directory)
