"""``enginesmith bench``: what it measures, prints and keeps, and with which exit status it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from bench_command import SHORT, Bench, measuring
from perf_models import MODELS, PerfServer
from recorded_runs import figures, saved_run

from enginesmith.cli_bench_output import _print, run_tables, status_words
from enginesmith.triton.server import TritonServer
from enginesmith_client.perf._records import read_records
from enginesmith_client.perf._run_files import SloVerdict, load_run

StartServer = Callable[..., AbstractContextManager[TritonServer]]


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


@pytest.mark.server
def test_a_run_prints_its_figures_and_keeps_everything(bench: Bench, tmp_path: Path) -> None:
    said = bench.measure(
        "steady20", "--slo", "p99_latency_ms=5000", "--price", "3.6", "--parquet", "--out", "kept"
    )
    assert said.measured, said.err
    for words in (
        "short, 32 at a time: steady20 version 1",
        "requests",
        "latency",
        "p99.9",
        "kept",
        "goodput",
    ):
        assert words in said.out, words
    assert "measuring" in said.err
    assert f"report: {Path('kept', 'report.html')}" in said.err
    there = {path.name for path in Path("kept").iterdir()}
    assert there >= {
        "run.json",
        "records.jsonl",
        "records.parquet",
        "samples.jsonl",
        "report.html",
        "report.md",
    }
    run = load_run(Path("kept")).run
    cost = run.figures.cost_per_million_requests
    assert cost == pytest.approx(1000 / run.figures.requests_per_s)
    assert re.search(rf"cost per million requests +│ {cost:,.4g} USD +│", said.out)


def test_lines_are_printed_whole_and_numbers_without_exponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "perf_analyzer " + " ".join(f"--option-{number} {number}" for number in range(40))
    run = saved_run(
        tmp_path,
        figures(),
        command=command,
        slo=(SloVerdict(name="ttft_ms", limit=20_000.0, measured=21_234.5, met=False),),
    ).run
    _print(tuple(run_tables(run)))
    printed = capsys.readouterr().out
    assert f"command: {command}\n" in printed
    assert re.search(r"ttft_ms +│ +20000 +│ +2123[45] +│ MISSED", printed)
    assert "SLO missed: ttft_ms is 2123" in "".join(status_words(run))
    assert "e+04" not in printed + "".join(status_words(run))
    monkeypatch.setenv("FORCE_COLOR", "1")
    _print(tuple(run_tables(run)))
    assert f"command: {command}\n" in capsys.readouterr().out, "on a terminal it is there to be copied, too"


@pytest.mark.server
def test_parquet_holds_every_record(bench: Bench) -> None:
    import pyarrow.parquet as pq

    assert bench.measure("tokens", "--closed", "1", "--parquet", "--out", "kept").status in (0, 1)
    records = read_records(Path("kept", "records.jsonl"))
    rows = pq.read_table("kept/records.parquet").to_pylist()
    assert [(row["number"], row["ended_ns"], tuple(row["piece_ns"])) for row in rows] == [
        (record.number, record.ended_ns, record.piece_ns) for record in records
    ]
    assert any(row["piece_ns"] for row in rows)


@pytest.mark.server
def test_json_is_all_that_is_on_stdout(bench: Bench) -> None:
    said = bench.measure("steady20", "--json", "--out", "kept")
    document = json.loads(said.out)
    assert said.measured, said.err
    assert (document["exit_status"], document["directory"]) == (said.status, "kept")
    assert document["kind"] == "run"
    assert "requests_per_s" in said.out


@pytest.mark.server
def test_flags_override_the_keys_of_the_profile(bench: Bench) -> None:
    said = bench.measure(
        "steady20", "--open", "100", "--arrivals", "constant", "--duration-s", "0.6", "--out", "kept"
    )
    assert said.measured, said.err
    profile = load_run(Path("kept")).run.profile
    assert profile["load"]["loop"] == "open"
    assert (profile["load"]["rate_per_s"], profile["load"]["arrivals"]) == (100, {"kind": "constant"})
    assert (profile["measure"]["max_s"], profile["measure"]["window_s"]) == (0.6, 0.5)
    assert profile["measure"]["warmup_s"] == 0.1


@pytest.mark.server
def test_results_have_a_directory_of_their_own_by_default(bench: Bench) -> None:
    assert bench.measure("steady20:1").measured
    (directory,) = Path("bench").iterdir()
    assert directory.name.startswith("steady20-1-20")
    assert load_run(directory).run.model_version == "1"


@pytest.mark.server
def test_a_directory_with_a_run_is_not_overwritten(bench: Bench) -> None:
    assert bench.measure("steady20", "--out", "kept").measured
    before = Path("kept", "run.json").read_bytes()
    said = bench.measure("steady20", "--out", "kept")
    assert (said.status, said.out) == (1, "")
    assert "error: kept holds a run already" in said.err
    assert Path("kept", "run.json").read_bytes() == before


@pytest.mark.server
def test_a_missed_slo_is_exit_status_1_with_the_figure(bench: Bench) -> None:
    said = bench.measure("steady20", "--slo", "p99_latency_ms=1", "--out", "kept")
    assert said.status == 1
    assert "SLO missed: p99_latency_ms is" in said.err
    assert "the limit is 1" in said.err
    assert "MISSED" in said.out


@pytest.mark.server
def test_a_promise_that_cannot_be_measured_is_not_kept(bench: Bench) -> None:
    said = bench.measure("steady20", "--slo", "ttft_ms=1000", "--out", "kept")
    assert said.status == 1
    assert "SLO not judged: ttft_ms could not be measured" in said.err


@pytest.mark.server
def test_a_void_run_is_printed_as_one(bench: Bench) -> None:
    said = bench.measure("steady20", "--closed", "1", "--duration-s", "0.2", "--out", "kept")
    assert said.status == 1
    assert said.out.startswith("VOID: the figures below say nothing about the server")
    assert ": void: samples" in said.err
    assert load_run(Path("kept")).run.void


@pytest.mark.server
def test_an_unknown_model_is_told_with_those_that_are_served(bench: Bench) -> None:
    said = bench.measure("stedy20")
    assert (said.status, said.out) == (1, "")
    assert "does not serve model 'stedy20'" in said.err
    assert "steady20" in said.err
    assert not Path("bench").exists()


@pytest.mark.server
def test_a_sweep_measures_every_load_once_and_continues_where_it_was(bench: Bench) -> None:
    arguments = ("steady20", "--sweep", "concurrency=16,32", "--out", "kept")
    said = bench.measure(*arguments)
    assert said.status == 0, said.err
    assert "16 at a time" in said.out
    assert "32 at a time" in said.out
    runs = {path: path.stat().st_mtime_ns for path in Path("kept").glob("*/run.json")}
    assert len(runs) == 2
    again = bench.measure(*arguments)
    assert again.status == 0
    assert {path: path.stat().st_mtime_ns for path in Path("kept").glob("*/run.json")} == runs
    assert again.out == said.out


@pytest.mark.server
def test_a_sweep_whose_slo_is_impossible_says_so(bench: Bench) -> None:
    said = bench.measure(
        "steady20", "--sweep", "concurrency=16,32", "--slo", "p99_latency_ms=1", "--out", "kept"
    )
    assert said.status == 1
    assert "SLO impossible" in said.err


@pytest.mark.server
def test_one_scenario_of_a_suite_is_measured(bench: Bench, tmp_path: Path) -> None:
    said = bench(
        "bench", "steady20", *bench.at_server(), "--suite", "standard", "--only", "many-tiny", "--duration-s", "1", "--out", "kept"
    )  # fmt: skip
    assert said.status in (0, 1), said.err
    assert "many-tiny" in said.out
    assert len(list(Path("kept").rglob("run.json"))) == 1


@pytest.mark.server
def test_a_scenario_that_does_not_exist_is_a_usage_error(bench: Bench) -> None:
    said = bench("bench", "steady20", *bench.at_server(), "--suite", "standard", "--only", "chat-shrt")
    assert (said.status, said.out) == (2, "")
    assert "chat-short" in said.err


@pytest.mark.server
def test_a_server_of_its_own_is_started_and_stopped(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "steady20", tmp_path / "repository" / "steady20")
    arguments = ("--profile", bench.profile, "--repository", "repository", "--out", "kept")
    said = bench("bench", "steady20", *arguments)
    assert said.measured, said.err
    run = load_run(Path("kept")).run
    assert run.figures.usage is not None
    assert run.figures.usage.server_rss_bytes
    host, _, port = run.url.removeprefix("grpc://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    missing = bench("bench", "stedy20", *arguments)
    assert (missing.status, missing.out) == (1, "")
    assert "repository has no model 'stedy20'; it has: steady20" in missing.err


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A profile that measures for a minute unless it is stopped."""
    profile = tmp_path / "endless.yaml"
    profile.write_text(SHORT.replace("max_s: 0.5", "max_s: 60").replace("windows: 1", "windows: 100"))
    return ["--profile", str(profile), "--out", "kept"]


@pytest.mark.server
def test_a_server_that_dies_leaves_a_partial_run(
    bench: Bench, own_server: StartServer, endless: list[str]
) -> None:
    with own_server("steady20") as server:
        with measuring("bench", "steady20", "--url", f"grpc://{server.grpc_url}", *endless) as process:
            os.kill(server.pid, signal.SIGKILL)
            _, err = process.communicate(timeout=60)
        server.stop()
    assert process.returncode == 1, err
    assert "partial: server lost" in err
    run = load_run(Path("kept")).run
    assert run.status == "partial"
    assert {"ok", "connect"} <= {record.outcome for record in read_records(Path("kept", "records.jsonl"))}
    assert "server lost" in Path("kept", "report.md").read_text()


@pytest.mark.server
def test_an_interrupted_run_keeps_what_it_measured(bench: Bench, endless: list[str]) -> None:
    with measuring("bench", "steady20", *bench.at_server(), *endless) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "partial: interrupted" in err
    assert load_run(Path("kept")).run.status == "partial"
    assert read_records(Path("kept", "records.jsonl"))


@pytest.mark.server
def test_an_interrupted_sweep_says_how_it_goes_on(bench: Bench, endless: list[str]) -> None:
    arguments = ("bench", "steady20", *bench.at_server(), "--sweep", "concurrency=16,32")
    with measuring(*arguments, *endless) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command with --out kept continues" in err


@pytest.mark.server
def test_a_perf_analyzer_that_does_not_run_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_PERF_ANALYZER", "/nowhere/perf_analyzer")
    said = bench.measure("steady20", "--generator", "perf_analyzer", "--out", "kept")
    assert (said.status, said.out) == (1, "")
    assert "/nowhere/perf_analyzer" in said.err
    assert "ENGINESMITH_PERF_ANALYZER" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--closed", "1", "--open", "1"), "--closed and --open are two kinds of load"),
        (("--closed", "1", "--arrivals", "burst"), "--arrivals is about an open loop"),
        (("--open", "1", "--generator", "perf_analyzer"), "perf_analyzer measures closed loops here"),
        (("--slo", "tfft_ms=1"), "did you mean 'ttft_ms'?"),
        (("--slo", "ttft_ms=fast"), "'fast' is no number"),
        (("--sweep", "rate=1", "--suite", "standard"), "--sweep and --suite are two kinds of measurement"),
        (("--sweep", "rate=fast"), "the loads of a sweep are numbers, auto, or LOW..HIGH; seen: 'fast'"),
        (("--sweep", "load=1"), "a sweep is over concurrency or rate"),
        (("--only", "chat-short"), "give --suite too"),
        (
            ("--suite", "standard", "--closed", "2"),
            "every scenario of a suite has its own load: leave out --closed",
        ),
        (("--suite", "standard", "--profile", "standard"), "leave out --profile"),
        (("--suite", "standard", "--compare-to", "x"), "--compare-to compares one run"),
        (("--repository", "x", "--url", "grpc://127.0.0.1:1"), "leave out --url and --metrics-url"),
        (("--profile", "missing.yaml"), "missing.yaml"),
        (("--slo", "ttft_ms=-1"), "slo.ttft_ms"),
        (("--suite", "missing"), "there is no suite 'missing'"),
    ],
)
def test_a_wrong_command_line_is_one_message_and_exit_status_2(
    bench: Bench, arguments: tuple[str, ...], words: str
) -> None:
    said = bench("bench", "steady20", *arguments)
    assert (said.status, said.out) == (2, "")
    assert words in said.err


@pytest.mark.parametrize("model", ["../../escaped", "/tmp/escaped", "..", ".hidden"])
def test_a_model_is_no_path_in_the_name_of_a_directory(model: str) -> None:
    from enginesmith.cli_bench import _file_name

    name = Path("bench", f"{_file_name(model)}-now")
    assert (name.parent, name.name.startswith(".")) == (Path("bench"), False)


def test_the_version_of_a_model_is_a_number(bench: Bench) -> None:
    said = bench("bench", "steady20:new")
    assert (said.status, said.out) == (2, "")
    assert "give a version after the colon, e.g. steady20:2" in said.err


def test_the_slo_of_a_spec_is_taken(bench: Bench) -> None:
    from enginesmith.cli_bench_profile import LoadFlags, profile_from_flags

    spec = Path(__file__).parents[2] / "models" / "smollm2-135m.yaml"
    slo = profile_from_flags(LoadFlags(slo=(str(spec), "itl_ms=50"))).slo
    assert (slo.ttft_ms, slo.itl_ms, slo.p99_latency_ms) == (2000, 50, None)


def test_the_profile_that_comes_with_the_harness_is_found_by_its_name(bench: Bench) -> None:
    from enginesmith.cli_bench_profile import LoadFlags, profile_from_flags

    assert profile_from_flags(LoadFlags(profile="standard")).name == "standard"


def test_no_server_is_one_message(bench: Bench) -> None:
    said = bench("bench", "steady20", "--url", "grpc://127.0.0.1:1")
    assert (said.status, said.out) == (1, "")
    assert "cannot reach a Triton server at grpc://127.0.0.1:1" in said.err
