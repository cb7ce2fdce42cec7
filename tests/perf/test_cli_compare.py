"""``enginesmith compare`` and ``bench-report``: verdicts, exit statuses, and figures that are computed again."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_command import SHORT, Bench, measuring
from perf_models import MODELS, PerfServer

from enginesmith import cli
from enginesmith_client.perf._run_files import RUN_FILE, load_run


@pytest.fixture
def bench(
    perf_server: PerfServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    profile = tmp_path / "short.yaml"
    profile.write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    return Bench(perf_server, capsys, profile)


@pytest.fixture(scope="module")
def measured(perf_server: PerfServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of ``steady20``, which nobody may change."""
    directory = tmp_path_factory.mktemp("measured")
    profile = directory / "short.yaml"
    profile.write_text(SHORT)
    url = f"grpc://{perf_server.grpc_url}"
    arguments = (
        "bench",
        "steady20",
        "--profile",
        str(profile),
        "--url",
        url,
        "--metrics-url",
        perf_server.metrics_url,
    )
    assert cli.run([*arguments, "--closed", "16", "--out", str(directory / "run")]) in (0, 1)
    return directory / "run"


@pytest.fixture
def a_run(measured: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(measured, tmp_path / "run"))


@pytest.mark.server
def test_two_versions_are_served_side_by_side_and_the_slow_one_is_not_better(
    bench: Bench, tmp_path: Path
) -> None:
    model = shutil.copytree(MODELS / "steady20", tmp_path / "repository" / "steady20")
    source = (model / "1" / "model.py").read_text()
    assert "0.02" in source
    (model / "2").mkdir()
    (model / "2" / "model.py").write_text(source.replace("0.02", "0.04"))
    said = bench(
        "compare", "steady20:1", "steady20:2", "--profile", bench.profile, "--closed", "16", "--rounds", "6",
        "--round-s", "0.25", "--repository", "repository", "--json", "--out", "kept",
    )  # fmt: skip
    document = json.loads(said.out)
    assert (document["exit_status"], document["kind"]) == (said.status, "comparison")
    # Which of the two it is depends on what else the machine does.
    verdicts = {1: "worse: ", 5: "inconclusive: "}
    assert verdicts[said.status] in said.err
    fast, slow = (load_run(Path("kept", f"round-01-{side}")).run for side in "ab")
    assert (fast.model_version, slow.model_version) == ("1", "2")
    assert fast.figures.latency_ms
    assert slow.figures.latency_ms
    assert slow.figures.latency_ms.p50 > 1.2 * fast.figures.latency_ms.p50, "both versions are served"


@pytest.mark.server
def test_a_saved_run_compared_with_itself_is_no_change(bench: Bench, measured: Path) -> None:
    said = bench("compare", measured, measured, "--out", "kept")
    assert said.status in (0, 5)
    assert "one run of each cannot show how runs differ" in said.err
    assert Path("kept", "comparison.json").is_file()


@pytest.mark.server
def test_a_run_joined_by_a_comparison_shows_both(bench: Bench, measured: Path) -> None:
    said = bench.measure("steady20", "--closed", "16", "--compare-to", measured, "--out", "kept")
    assert said.status in (0, 1, 5)
    assert "requests sent by enginesmith" in said.out
    assert "B / A" in said.out
    assert re.search(r"requests per second +│ +[\d,.]+ /s │ +[\d,.]+ /s │", said.out)
    assert re.search(r"latency p50 +│ +[\d.]+ ms │ +[\d.]+ ms │", said.out)


@pytest.mark.server
def test_a_run_that_cannot_be_compared_is_shown_all_the_same(bench: Bench, measured: Path) -> None:
    said = bench.measure("steady20", "--closed", "32", "--compare-to", measured, "--out", "kept")
    assert said.status == 1
    assert "not compared: the runs were not measured in the same way" in said.err
    assert "requests sent by enginesmith" in said.out


@pytest.mark.server
def test_runs_that_were_measured_differently_are_compared_only_by_force(bench: Bench, measured: Path) -> None:
    assert bench.measure("steady20", "--closed", "32", "--out", "other").measured
    refused = bench("compare", measured, "other")
    assert (refused.status, refused.out) == (1, "")
    assert "the runs were not measured in the same way" in refused.err
    assert bench("compare", measured, "other", "--force").status in (0, 1, 5)


@pytest.mark.server
def test_an_interrupted_comparison_keeps_its_rounds_and_continues(bench: Bench) -> None:
    arguments = (
        "compare", "steady20", "steady20", "--profile", bench.profile, "--closed", "16", "--rounds", "6",
        *bench.at_server(), "--out", "kept",
    )  # fmt: skip
    with measuring(*arguments) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command with --out kept continues" in err
    assert Path("kept", "plan.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a/b", "c"), "give two directories of saved runs, or two models"),
        (("a", "."), "a is no directory: give two directories of saved runs, or two models"),
        ((".", "b/c"), "b/c is no directory: give two directories of saved runs, or two models"),
        ((".", ".", "--rounds", "8"), "--rounds is about measuring; . and . are saved runs"),
        ((".", ".", "--closed", "8"), "--closed is about measuring"),
        (("a", "b", "--force"), "--force is about saved runs"),
        (
            ("a", "b", "--rounds", "2", "--url", "grpc://127.0.0.1:1"),
            "a comparison needs at least 6 rounds; seen: 2",
        ),
        (("a:x", "b"), "give a version after the colon"),
    ],
)
def test_a_wrong_comparison_is_one_message_and_exit_status_2(
    bench: Bench, arguments: tuple[str, ...], words: str
) -> None:
    said = bench("compare", *arguments)
    assert (said.status, said.out) == (2, "")
    assert words in said.err


def test_a_directory_without_results_is_told(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for verb in (("compare", "empty", "empty"), ("bench-report", "empty"), ("bench-report", "nowhere")):
        said = bench(*verb)
        assert (said.status, said.out) == (1, ""), said
        assert "empty" in said.err or "nowhere" in said.err


@pytest.mark.server
def test_a_report_is_rendered_again_from_what_was_saved(bench: Bench, a_run: Path) -> None:
    before = (a_run / "report.html").read_text()
    (a_run / "report.html").unlink()
    assert bench("bench-report", a_run).status == 0
    assert (a_run / "report.html").read_text() == before
    assert bench("bench-report", a_run, "--format", "md").out == (a_run / "report.md").read_text()
    assert json.loads(bench("bench-report", a_run, "--json").out)["kind"] == "run"
    assert bench("bench-report", a_run, "--format", "html", "--out", "page.html").status == 0
    assert Path("page.html").read_text() == before
    contradicting = bench("bench-report", a_run, "--json", "--format", "md")
    assert (contradicting.status, contradicting.out) == (2, "")


def edited(run: Path, edit: Callable[[dict[str, object]], object]) -> None:
    document = json.loads((run / RUN_FILE).read_text())
    edit(document)
    (run / RUN_FILE).write_text(json.dumps(document))


@pytest.mark.server
def test_a_figure_that_its_records_do_not_give_is_named(bench: Bench, a_run: Path) -> None:
    edited(a_run, lambda document: document["figures"]["latency_ms"].update(p99=1.0))  # type: ignore[index]
    said = bench("bench-report", a_run)
    assert (said.status, said.out) == (1, "")
    assert "latency_ms.p99 is 1.0, but its records give" in said.err


@pytest.mark.server
def test_results_of_another_version_are_refused(bench: Bench, a_run: Path, measured: Path) -> None:
    edited(a_run, lambda document: document.update(version=0))
    for verb in (("compare", a_run, measured), ("bench-report", a_run)):
        said = bench(*verb)
        assert (said.status, said.out) == (1, "")
        assert (
            "holds enginesmith-bench-run of version 0; this program reads enginesmith-bench-run of version 1"
            in said.err
        )


@pytest.mark.server
def test_records_that_are_gone_are_told(bench: Bench, a_run: Path) -> None:
    (a_run / "records.jsonl").unlink()
    said = bench("bench-report", a_run)
    assert (said.status, said.out) == (1, "")
    assert "records.jsonl" in said.err
