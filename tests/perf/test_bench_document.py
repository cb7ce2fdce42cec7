"""The Python of docs/bench.md, on a real server."""

from pathlib import Path

import pytest
from bench_command import SHORT
from perf_models import PerfServer
from recorded_runs import example_in

from enginesmith_client.perf import load_run, profile_from_file, run_profile


@pytest.mark.server
def test_the_example_measures_compares_sweeps_and_draws(
    perf_server: PerfServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat.yaml").write_text(SHORT)
    run_profile(
        perf_server.target("steady20"),
        profile_from_file(Path("chat.yaml")),
        directory=Path("bench/released"),
    )
    example = example_in("bench.md")
    for written, meant in (
        ("smollm2-135m-int4-awq", "steady20"),
        ("grpc://127.0.0.1:8001", f"grpc://{perf_server.grpc_url}"),
        ("http://127.0.0.1:8002/metrics", perf_server.metrics_url),
    ):
        assert written in example
        example = example.replace(written, meant)
    exec(example, {})
    said = capsys.readouterr().out
    assert "Quantiles(" in said
    assert "1 at a time" in said
    assert load_run(Path("bench/sweep/concurrency-2")).run.model == "steady20"
    assert "<svg" in Path("candidate.html").read_text()
