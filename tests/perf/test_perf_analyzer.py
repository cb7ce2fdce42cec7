"""The real perf_analyzer on a real tritonserver, and what becomes of a perf_analyzer that is not there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from perf_models import TOKEN_COUNTS, PerfServer, tensor_request, text_request
from tritonclient.grpc import service_pb2

from enginesmith.triton.server import TritonServer
from enginesmith_client._errors import ConnectError, ModelNotReady
from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError, ToolError
from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._progress import Progress
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run import recompute, run_profile
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts
from enginesmith_client.perf.perf_analyzer._files import input_data_from_requests, read_export, read_report
from enginesmith_client.perf.perf_analyzer._measure import (
    PerfAnalyzerRun,
    Question,
    find_perf_analyzer,
    input_data_from_rows,
    measure_with_perf_analyzer,
    run_perf_analyzer,
)
from enginesmith_client.perf.perf_analyzer._tool import VARIABLE, is_untried
from enginesmith_client.perf.workload._payload import Workload

ROWS = [{"in": [1.0, 2.0, 3.0, 4.0]}, {"in": [5.0, 6.0, 7.0, 8.0]}]


def workload_of(*requests: Prepared, streaming: bool = False) -> Workload:
    counts = TOKEN_COUNTS if streaming else TokenCounts()
    return Workload("text" if streaming else "tensors", streaming, counts, requests, {})


def profile_of(concurrency: int, **measure: float) -> Profile:
    load = {"loop": "closed", "concurrency": concurrency, "generator": "perf_analyzer"}
    return Profile.model_validate({"load": load, "measure": measure})


def inside(run: PerfAnalyzerRun) -> list[Record]:
    return [one for one in run.records if run.window.start_ns <= one.ended_ns < run.window.end_ns]


def killer_of(server: TritonServer) -> Callable[[Progress], None]:
    """Kills ``server`` once, when a first window is there."""
    left = [server.pid]

    def on_progress(progress: Progress) -> None:
        if progress.requests_per_s is not None and left:
            os.kill(left.pop(), signal.SIGKILL)

    return on_progress


def outcome_of(
    question: Question, directory: Path, *, on_progress: Callable[[Progress], None]
) -> PerfAnalyzerRun | ConnectError:
    try:
        return run_perf_analyzer(question, directory=directory, on_progress=on_progress)
    except ConnectError as error:
        return error


def its_quantile_us(records: Sequence[Record], percent: int) -> int:
    """As perf_analyzer takes it: InferenceProfiler::SummarizeLatency."""
    latencies = sorted(one.latency_ns for one in records)
    return latencies[int(percent / 100 * (len(latencies) - 1) + 0.5)] // 1000


def check_figures_agree(run: PerfAnalyzerRun) -> None:
    """What it says itself follows from the records within the window, to the microsecond that it prints."""
    records = inside(run)
    for percent in (50, 90, 95, 99):
        assert run.said[f"p{percent}_ms"] == pytest.approx(its_quantile_us(records, percent) / 1000, abs=1e-9)
    mean_us = sum(one.latency_ns for one in records) // len(records) // 1000
    assert run.said["avg_ms"] == pytest.approx(mean_us / 1000, abs=1e-9)


@pytest.mark.server
def test_windows_that_agree_are_the_window_and_its_own_figures_follow_from_the_records(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    seen: list[Progress] = []
    run = measure_with_perf_analyzer(
        perf_server.target("steady20"),
        workload_of(tensor_request("steady20")),
        profile_of(4, window_s=0.6, max_s=12, stability_percent=400),
        directory=tmp_path,
        on_progress=seen.append,
    )
    assert (run.status, run.ended_because, run.window.steady) == ("complete", "steady", True)
    check_figures_agree(run)
    assert run.rows_per_s == pytest.approx(run.said["rows_per_s"], rel=1e-4)
    assert (run.window.end_ns - run.window.start_ns) / 1e9 == pytest.approx(3 * 0.6, rel=0.1)
    assert run.records[0].sent_ns == 0
    assert all(one.due_ns == one.sent_ns < one.ended_ns for one in run.records)
    assert {"queue_ms", "compute_infer_ms"} <= run.said.keys()
    assert run.version.startswith("2.")
    assert "--stability-percentage 400" in run.command
    assert "--measurement-interval 500" in run.command
    assert {(one.phase, one.in_flight) for one in seen[:-1]} == {("measuring", 4)}
    assert seen[-2].requests_per_s is not None
    assert (seen[-1].phase, seen[-1].answered, seen[-1].failed) == ("done", len(run.records), 0)
    assert "Pass [1]" in (tmp_path / "perf_analyzer.log").read_text()


@pytest.mark.server
def test_a_number_of_requests_is_sent_exactly_and_counted_by_the_time_they_took(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    run = measure_with_perf_analyzer(
        perf_server.target("steady20"),
        workload_of(tensor_request("steady20", rows=2)),
        profile_of(2, max_requests=41),
        directory=tmp_path,
        origin_ns=0,
    )
    assert (len(run.records), run.ended_because) == (41, "max_requests")
    assert {one.rows for one in run.records} == {2}
    check_figures_agree(run)
    span_s = (run.window.end_ns - run.window.start_ns) / 1e9
    assert run.rows_per_s == pytest.approx(82 / span_s)
    # 2.51 divides by whole seconds, which is why its own figure is not the one to use here.
    assert run.said["rows_per_s"] <= run.rows_per_s * 1.001
    assert run.window.start_ns == run.records[0].sent_ns > 0, "counted from the origin that was given"


@pytest.mark.server
def test_a_saved_run_has_its_figures_by_our_formulas_and_its_own_beside_them(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    target = perf_server.target("steady20")
    saved = run_profile(target, profile_of(4, max_requests=200), directory=tmp_path)
    latency, said = saved.run.figures.latency_ms, saved.run.workload["perf_analyzer_said"]
    assert latency is not None
    assert latency.count == 200
    # Two definitions of a quantile are at most one request apart.
    ordered = sorted(one.latency_ns / 1e6 for one in saved.records())
    for name, ours in (("p50_ms", latency.p50), ("p99_ms", latency.p99)):
        rank = ordered.index(pytest.approx(ours, abs=1e-6))
        assert ordered[rank - 1] - 0.001 <= said[name] <= ordered[min(rank + 1, 199)]
    assert (saved.run.generator, saved.run.status) == ("perf_analyzer", "complete")
    assert "--request-count 200" in saved.run.command
    assert recompute(saved) == saved.run.figures


@pytest.mark.server
def test_streams_become_pieces_and_tokens_as_the_server_counts_them(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    run = measure_with_perf_analyzer(
        perf_server.target("tokens"),
        workload_of(
            text_request("three words long", tokens=7), text_request("two words", tokens=7), streaming=True
        ),
        profile_of(2, max_requests=30),
        directory=tmp_path,
    )
    assert {len(one.piece_ns) for one in run.records} == {7}
    assert {one.output_tokens for one in run.records} == {7}
    assert {one.prompt_tokens for one in run.records} == {2, 3}
    assert all(one.sent_ns < one.piece_ns[0] < one.piece_ns[-1] == one.ended_ns for one in run.records)
    check_figures_agree(
        run
    )  # Latencies are those of whole answers, whatever it prints about first responses.


@pytest.mark.server
def test_windows_that_never_agree_are_kept_and_named(tmp_path: Path, perf_server: PerfServer) -> None:
    run = measure_with_perf_analyzer(
        perf_server.target("tiny"),
        workload_of(tensor_request()),
        profile_of(2, window_s=0.2, max_s=0.8, stability_percent=1e-6),
        directory=tmp_path,
    )
    assert (run.status, run.ended_because, run.window.steady) == ("complete", "max_s", False)
    assert "no 3 windows in a row agree within 1e-06%: " in run.window.note
    assert "raise measure.window_s" in run.window.note
    assert run.said == {}, "perf_analyzer reports nothing that is not stable"
    assert (run.window.end_ns - run.window.start_ns) / 1e9 >= 0.75, "the four windows that were whole"
    assert len(inside(run)) > 100


@pytest.mark.server
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, perf_server: PerfServer) -> None:
    def interrupt_after_a_window(progress: Progress) -> None:
        if progress.requests_per_s is not None:
            signal.raise_signal(signal.SIGINT)

    run = measure_with_perf_analyzer(
        perf_server.target("steady20"),
        workload_of(tensor_request("steady20")),
        profile_of(2, window_s=0.5, max_s=60, stability_percent=1e-6),
        directory=tmp_path,
        on_progress=interrupt_after_a_window,
    )
    assert (run.status, run.ended_because, run.window.steady) == ("partial", "interrupted", False)
    assert inside(run)


@pytest.mark.server
def test_a_server_that_dies_is_named_with_what_was_seen_before(
    tmp_path: Path, own_server: Callable[..., AbstractContextManager[TritonServer]]
) -> None:
    with own_server("steady20") as server:
        question = Question(
            "steady20",
            server.grpc_url,
            input_data_from_rows(ROWS),
            2,
            window_s=0.4,
            stability_percent=1e-6,
        )
        with pytest.raises(
            ConnectError, match=r"(?s)lost the server .*windows before that: \d+ windows?.*/s at"
        ):
            run_perf_analyzer(question, directory=tmp_path, on_progress=killer_of(server))
    assert " infer/sec. Avg latency" in (tmp_path / "perf_analyzer.log").read_text()


@pytest.mark.server
def test_a_stream_that_loses_its_server_comes_to_an_end_and_leaves_what_it_can(
    tmp_path: Path, own_server: Callable[..., AbstractContextManager[TritonServer]]
) -> None:
    with own_server("tokens") as server:
        rows = [{"text_input": ["a"], "max_tokens": [3], "stream": [True]}]
        question = Question(
            "tokens",
            server.grpc_url,
            input_data_from_rows(rows),
            2,
            streaming=True,
            window_s=0.4,
            stability_percent=1e-6,
            timeout_s=2,
        )
        outcome = outcome_of(question, tmp_path, on_progress=killer_of(server))
    if isinstance(
        outcome, ConnectError
    ):  # The moment decides whether its threads notice before its statistics do.
        assert "lost the server" in outcome.message
    else:
        assert (outcome.status, outcome.ended_because) == ("partial", "server lost")
        assert inside(outcome)


@pytest.mark.server
def test_a_request_that_fails_ends_it_with_the_servers_words(tmp_path: Path, perf_server: PerfServer) -> None:
    message = service_pb2.ModelInferRequest.FromString(text_request("fail", tokens=3).message)
    request = Prepared(message.SerializeToString(), streaming=True)
    with pytest.raises(
        MeasurementError, match=r"(?s)a request to tokens failed.*asked to fail.*hint: generator: enginesmith"
    ):
        measure_with_perf_analyzer(
            perf_server.target("tokens"),
            workload_of(request, streaming=True),
            profile_of(1, max_requests=5),
            directory=tmp_path,
        )


@pytest.mark.server
def test_a_model_slower_than_the_windows_asks_for_longer_ones(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    with pytest.raises(
        ToolError, match=r"(?s)windows of 0.1 s without an answer.*hint: raise measure.window_s"
    ):
        measure_with_perf_analyzer(
            perf_server.target("tokens"),
            workload_of(text_request("slow", tokens=1000), streaming=True),
            profile_of(1, window_s=0.1, max_s=0.3),
            directory=tmp_path,
        )


@pytest.mark.server
def test_more_requests_than_there_is_time_for_end_at_the_limit(
    tmp_path: Path, perf_server: PerfServer
) -> None:
    question = Question(
        "steady20",
        perf_server.grpc_url,
        input_data_from_rows(ROWS),
        1,
        request_count=100_000,
        max_s=0.5,
        timeout_s=0.5,
    )
    with pytest.raises(
        ToolError, match=r"(?s)was ended \(max_s\); it left no records.*hint: raise measure.max_s"
    ):
        run_perf_analyzer(question, directory=tmp_path)


@pytest.mark.server
def test_an_unknown_model_is_named(tmp_path: Path, perf_server: PerfServer) -> None:
    question = Question("nosuch", perf_server.grpc_url, input_data_from_rows(ROWS), 1, request_count=5)
    with pytest.raises(ModelNotReady, match="does not serve the model 'nosuch'"):
        run_perf_analyzer(question, directory=tmp_path)


def test_a_server_that_is_not_there_is_a_connect_error(tmp_path: Path) -> None:
    question = Question("any", "127.0.0.1:9", input_data_from_rows(ROWS), 1, request_count=5)
    with pytest.raises(ConnectError, match=r"lost the server 127\.0\.0\.1:9"):
        run_perf_analyzer(question, directory=tmp_path)


def test_a_place_that_cannot_be_written_is_an_error_of_results(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    question = Question("any", "127.0.0.1:9", input_data_from_rows(ROWS), 1, request_count=5)
    with pytest.raises(ResultsError, match=r"perf_analyzer\.inputs\.json cannot be written: "):
        run_perf_analyzer(question, directory=tmp_path / "file")


def test_values_of_headers_are_not_shown(tmp_path: Path) -> None:
    headers = {"authorization": "Bearer secret"}
    question = Question("any", "127.0.0.1:9", input_data_from_rows(ROWS), 1, request_count=5, headers=headers)
    with pytest.raises(ConnectError):
        run_perf_analyzer(question, directory=tmp_path)
    log = (tmp_path / "perf_analyzer.log").read_text()
    assert "-H authorization:..." in log
    assert "secret" not in log


def test_fewer_requests_than_are_in_flight_are_refused(tmp_path: Path) -> None:
    target = PerfServer("127.0.0.1:9", "", 0, tmp_path).target("any")
    with pytest.raises(ProfileError, match="max_requests 2 is less than concurrency 4"):
        measure_with_perf_analyzer(
            target, workload_of(tensor_request()), profile_of(4, max_requests=2), directory=tmp_path
        )


def test_an_open_loop_is_refused(tmp_path: Path) -> None:
    profile = Profile.model_validate({"load": {"loop": "open", "rate_per_s": 5}})
    target = PerfServer("127.0.0.1:9", "", 0, tmp_path).target("any")
    with pytest.raises(ProfileError, match="closed loops only"):
        measure_with_perf_analyzer(target, workload_of(tensor_request()), profile, directory=tmp_path)


def test_a_batch_becomes_rows_bit_for_bit() -> None:
    message = service_pb2.ModelInferRequest(model_name="m")
    message.inputs.add(name="half", datatype="FP16", shape=[2, 1, 2])
    message.raw_input_contents.append(np.array([1, 2, 3, 4], np.float16).tobytes())
    message.inputs.add(name="text", datatype="BYTES", shape=[2, 1])
    message.raw_input_contents.append(b"\x02\0\0\0ab\x03\0\0\0\xc3\xbcx")
    data = input_data_from_requests([Prepared(message.SerializeToString(), rows=2)], batched=True)
    assert data == {
        "data": [
            {"half": {"b64": "ADwAQA==", "shape": [1, 2]}, "text": {"content": ["ab"], "shape": [1]}},
            {"half": {"b64": "AEIARA==", "shape": [1, 2]}, "text": {"content": ["üx"], "shape": [1]}},
        ]
    }


def test_bytes_that_are_no_text_are_refused() -> None:
    message = service_pb2.ModelInferRequest(model_name="m")
    message.inputs.add(name="image", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(b"\x01\0\0\0\xff")
    with pytest.raises(ProfileError, match="input image holds bytes that are no UTF-8"):
        input_data_from_requests([Prepared(message.SerializeToString())], batched=False)


def test_empty_final_responses_are_no_pieces(tmp_path: Path) -> None:
    request = {
        "timestamp": 100,
        "response_timestamps": [110, 120, 130],
        "response_outputs": [{"n": 1}, {"n": 2}, {}],
    }
    path = tmp_path / "export.json"
    path.write_text(json.dumps({"experiments": [{"requests": [request], "window_boundaries": [90, 140]}]}))
    export = read_export(path, TokenCounts(answer_output="n", counts_pieces=True))
    assert export is not None
    assert export.requests[0].response_ns == (110, 120)
    assert export.requests[0].output_tokens == 3


def test_an_export_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text('{"experiments": [{"requests": [{"timestamp"')
    with pytest.raises(ToolError, match="not an export of time stamps"):
        read_export(path, TokenCounts())


def test_figures_of_its_report_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_text("Concurrency,Inferences/Second,Avg latency,p50 latency,p90 latency\n1,12.5,-nan,inf,80\n")
    assert read_report(path) == {"rows_per_s": 12.5, "p90_ms": 0.08}


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any perf_analyzer: an empty cache, nothing named, and a PATH of one directory."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_a_named_program_that_does_not_run_is_refused_in_its_own_words(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "libc.so.6: version `GLIBC_2.38' not found"
    monkeypatch.setenv(
        VARIABLE, str(program(bare / "mine", f'echo "{words.replace("`", chr(92) + "`")}" >&2; exit 1'))
    )
    with pytest.raises(ToolError, match=r"mine does not run here: libc.so.6: version .GLIBC_2.38. not found"):
        find_perf_analyzer()


def test_a_named_program_that_is_too_old_is_refused(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(program(bare / "old", "echo Perf Analyzer Version 2.41.0")))
    with pytest.raises(ToolError, match=r"old is perf_analyzer 2\.41; needed: 2\.51 or newer"):
        find_perf_analyzer()


def test_one_on_the_path_that_does_not_run_gives_way_to_the_assembled_one(bare: Path) -> None:
    program(bare / "bin" / "perf_analyzer", "exit 1")
    assembled = program(
        bare / "cache" / "enginesmith" / "perf_analyzer-2.51.0" / "perf_analyzer",
        "echo 'Perf Analyzer Version 2.51.0 (commit unknown)'",
    )
    tool = find_perf_analyzer()
    assert tool.executable == assembled
    assert tool.version() == "2.51.0 (commit unknown)"


def test_the_program_of_the_wheel_is_taken_without_its_launcher(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bare / "site-packages"))
    (bare / "site-packages" / "perf_analyzer").mkdir(parents=True)
    (bare / "site-packages" / "perf_analyzer" / "__init__.py").touch()
    executable = program(
        bare / "site-packages" / "perf_analyzer" / "bin" / "perf_analyzer",
        "echo 'Perf Analyzer Version 2.60.0 (commit abc)'",
    )
    tool = find_perf_analyzer()
    assert (tool.executable, tool.version()) == (executable, "2.60.0 (commit abc)")


@pytest.mark.parametrize(
    ("version", "untried"), [("2.51.0", False), ("2.60.3", False), ("2.61.0", True), ("3.0", True)]
)
def test_versions_that_nobody_tried_are_known_as_such(version: str, untried: bool) -> None:
    assert is_untried(version) is untried


def test_where_none_runs_every_reason_is_given(bare: Path) -> None:
    on_path = program(bare / "bin" / "perf_analyzer", "echo broken >&2; exit 3")
    cached = program(bare / "cache" / "enginesmith" / "perf_analyzer-2.51.0" / "perf_analyzer", "exit 4")
    with pytest.raises(ToolError) as caught:
        find_perf_analyzer()
    assert f"{on_path} does not run here: broken" in caught.value.message
    assert f"{cached} does not run here: exit status 4, and it says nothing" in caught.value.message
    assert VARIABLE in str(caught.value.hint)


def test_a_wheel_without_the_program_is_refused(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "empty.whl").write_bytes(b"not a wheel")
    monkeypatch.setenv(VARIABLE, str(bare / "empty.whl"))
    with pytest.raises(ToolError, match="not a wheel with one perf_analyzer"):
        find_perf_analyzer()
    assert not list((bare / "cache" / "enginesmith").iterdir())
