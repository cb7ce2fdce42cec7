"""The real perf_analyzer on a real tritonserver with an echo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from echo_models import ECHO, PIECES, write_model

from enginesmith.errors import OperatorError, ToolchainError
from enginesmith.spec_part import DynamicBatching
from enginesmith.triton.perf_analyzer import WHEEL_VARIABLE, PerfResult, find_perf_analyzer, run_perf_analyzer
from enginesmith.triton.server import TritonServer

BOOM = '        if text == "boom":\n            raise ValueError("boom, as asked")\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    marker = "        answer = json.dumps("
    assert marker in ECHO
    write_model(
        repository,
        "echo",
        ECHO.replace(marker, BOOM + marker),
        batching=DynamicBatching(max_queue_delay_us=100),
    )
    write_model(repository, "pieces", PIECES, decoupled=True)
    with TritonServer(repository) as instance:
        instance.wait_ready()
        yield instance


@pytest.mark.server
def test_a_counted_measurement_is_read_back_whole(tmp_path: Path, server: TritonServer) -> None:
    inputs = [{"text_input": ["grüße"], "max_tokens": [4]}, {"text_input": ["b"], "max_tokens": [5]}]
    result = run_perf_analyzer(
        "echo", inputs, grpc_url=server.grpc_url, concurrency=4, out_dir=tmp_path, request_count=400
    )
    assert result.concurrency == 4
    assert 0 < result.p50_us <= result.p90_us <= result.p95_us <= result.p99_us
    # Four are in flight at all times but the last, so Little's law ties the two figures together.
    assert result.throughput_per_s == pytest.approx(4 / (result.avg_us * 1e-6), rel=0.25)
    assert result.csv_path.read_text().startswith("Concurrency,Inferences/Second")


@pytest.mark.server
def test_a_decoupled_model_is_measured_over_streams(tmp_path: Path, server: TritonServer) -> None:
    result = run_perf_analyzer(
        "pieces",
        [{"text_input": ["a"], "max_tokens": [5]}],
        grpc_url=server.grpc_url,
        concurrency=4,
        out_dir=tmp_path,
        request_count=200,
        streaming=True,
    )
    assert result.stream is not None
    assert result.stream.responses_per_s == pytest.approx(5 * result.throughput_per_s)
    assert 0 < result.stream.first_response_p50_us <= result.stream.first_response_p99_us
    assert result.stream.first_response_p50_us < result.p50_us, "latencies are those of whole answers"
    assert result.throughput_per_s == pytest.approx(4 / (result.avg_us * 1e-6), rel=0.25)


@pytest.mark.server
def test_streams_that_fail_are_an_error_with_the_servers_words(tmp_path: Path, server: TritonServer) -> None:
    with pytest.raises(OperatorError, match=r"(?s)could not measure pieces.*boom, as asked"):
        run_perf_analyzer(
            "pieces",
            [{"text_input": ["boom"], "max_tokens": [1]}],
            grpc_url=server.grpc_url,
            concurrency=1,
            out_dir=tmp_path,
            request_count=5,
            streaming=True,
        )


@pytest.mark.server
def test_a_decoupled_model_takes_no_single_requests(tmp_path: Path, server: TritonServer) -> None:
    with pytest.raises(
        OperatorError, match=r"(?s)could not measure pieces.*Decoupled models must be run with"
    ):
        run_perf_analyzer(
            "pieces",
            [{"text_input": ["a"], "max_tokens": [5]}],
            grpc_url=server.grpc_url,
            concurrency=1,
            out_dir=tmp_path,
            request_count=5,
        )


@pytest.mark.server
def test_a_windowed_measurement_obeys_littles_law(tmp_path: Path, server: TritonServer) -> None:
    result: PerfResult = run_perf_analyzer(
        "echo",
        [{"text_input": ["a"]}],
        grpc_url=server.grpc_url,
        concurrency=2,
        out_dir=tmp_path,
        window_s=0.5,
        stability_percent=95,
        max_windows=20,
    )
    assert result.throughput_per_s == pytest.approx(2 / (result.avg_us * 1e-6), rel=0.25)


@pytest.mark.server
def test_requests_that_fail_are_an_error_with_the_servers_words(tmp_path: Path, server: TritonServer) -> None:
    with pytest.raises(OperatorError, match=r"(?s)could not measure echo.*boom, as asked"):
        run_perf_analyzer(
            "echo",
            [{"text_input": ["boom"]}],
            grpc_url=server.grpc_url,
            concurrency=1,
            out_dir=tmp_path,
            request_count=5,
        )


@pytest.mark.server
def test_a_measurement_that_does_not_settle_is_an_error(tmp_path: Path, server: TritonServer) -> None:
    with pytest.raises(OperatorError, match=r"(?s)no stable measurement of echo.*hint: quiet the machine"):
        run_perf_analyzer(
            "echo",
            [{"text_input": ["a"]}],
            grpc_url=server.grpc_url,
            concurrency=1,
            out_dir=tmp_path,
            window_s=0.1,
            stability_percent=0.0001,
            max_windows=3,
        )


@pytest.mark.server
def test_an_unknown_model_is_an_error_that_names_it(tmp_path: Path, server: TritonServer) -> None:
    with pytest.raises(OperatorError, match="unknown model: 'nosuch'"):
        run_perf_analyzer(
            "nosuch",
            [{"text_input": ["a"]}],
            grpc_url=server.grpc_url,
            concurrency=1,
            out_dir=tmp_path,
            request_count=5,
        )


def test_a_program_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv(WHEEL_VARIABLE, str(program))
    with pytest.raises(ToolchainError, match="does not run on this machine"):
        find_perf_analyzer()


def test_a_wheel_without_the_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.whl").write_bytes(b"not a wheel")
    monkeypatch.setenv(WHEEL_VARIABLE, str(tmp_path / "empty.whl"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ToolchainError, match="not a wheel with one perf_analyzer"):
        find_perf_analyzer()
    assert not list((tmp_path / "cache" / "enginesmith").iterdir())
