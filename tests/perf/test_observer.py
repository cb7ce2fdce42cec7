"""The observer beside a real tritonserver, and what it keeps."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from perf_models import MODELS, PerfServer

from enginesmith.triton.server import TritonServer
from enginesmith_client import Client
from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.observe._machine import machine, versions
from enginesmith_client.perf.observe._observer import Observer
from enginesmith_client.perf.observe._samples import Sample, SampleWriter, around, read_samples
from enginesmith_client.perf.observe._scrape import parse_metrics

PATIENCE_S = 20
ENSEMBLE = """
name: "both" platform: "ensemble" max_batch_size: 32
input { name: "in" data_type: TYPE_FP32 dims: [4] }
output { name: "out" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling {
  step { model_name: "tiny" model_version: -1
         input_map { key: "in" value: "in" } output_map { key: "out" value: "between" } }
  step { model_name: "steady20" model_version: -1
         input_map { key: "in" value: "between" } output_map { key: "out" value: "out" } }
}
"""


@contextmanager
def observing(
    target: Target, directory: Path, *, interval_s: float = 30.0
) -> Iterator[tuple[Client, Observer]]:
    """With so long an interval there are the first sample and the last."""
    with Client(target.url, timeout_s=30) as client:
        observer = Observer(client, target, directory / "samples.jsonl", interval_s=interval_s)
        observer.start(time.monotonic_ns())
        try:
            yield client, observer
        finally:
            observer.stop()


def tensor(rows: int = 1, value: float = 0.0) -> dict[str, npt.NDArray[np.float32]]:
    return {"in": np.full((rows, 4), value, np.float32)}


def await_count(client: Client, observer: Observer, model: str, count: int) -> None:
    """Return when the server has counted so many requests since the first sample: it may do so after it answered."""
    first = observer.samples[0].statistics
    assert first is not None
    end_s = time.monotonic() + PATIENCE_S
    while client.statistics(model)[0].success.count < first.success + count:
        assert time.monotonic() < end_s, f"{model} did not count {count} requests"


@pytest.mark.server
def test_samples_count_what_the_server_did(perf_server: PerfServer, tmp_path: Path) -> None:
    with observing(perf_server.target("tiny"), tmp_path) as (client, observer):
        for rows in (1, 1, 3):
            client.infer("tiny", tensor(rows))
        await_count(client, observer, "tiny", 3)
    first, last = observer.samples
    assert first.statistics is not None
    assert last.statistics is not None
    assert last.statistics.success - first.statistics.success == 3
    assert last.statistics.inferences - first.statistics.inferences == 5
    assert last.statistics.batches[3] - first.statistics.batches.get(3, 0) == 1
    assert last.statistics.compute_infer_s > first.statistics.compute_infer_s
    assert last.at_ns > first.at_ns >= 0


@pytest.mark.server
def test_samples_tell_of_processes_and_machine(perf_server: PerfServer, tmp_path: Path) -> None:
    with observing(perf_server.target("tiny"), tmp_path) as (client, observer):
        for _ in range(50):
            client.infer("tiny", tensor())
    first, last = observer.samples
    assert first.server is not None
    assert first.server.startswith(f"{perf_server.pid} since ")
    assert last.server == first.server
    assert first.server_rss_bytes is not None
    assert first.server_rss_bytes > psutil.Process(perf_server.pid).memory_info().rss
    assert last.server_cpu_s is not None
    assert last.server_cpu_s >= (first.server_cpu_s or 0) > 0
    assert last.client_cpu_s > first.client_cpu_s
    assert 0 < last.machine_busy_s < last.machine_total_s
    assert observer.notes == ()


@pytest.mark.server
def test_server_is_found_by_its_port(perf_server: PerfServer, tmp_path: Path) -> None:
    target = Target("tiny", f"grpc://{perf_server.grpc_url}")
    with observing(target, tmp_path) as (_, observer):
        pass
    assert (observer.samples[0].server or "").startswith(f"{perf_server.pid} since ")
    assert observer.notes == ("no address of the server's metrics was given",)


@pytest.mark.server
def test_stream_counts_as_one_request_when_it_has_ended(perf_server: PerfServer, tmp_path: Path) -> None:
    asked = {
        "text_input": np.array([[b"one two"]], object),
        "max_tokens": np.array([[5]], np.int32),
        "stream": np.array([[True]]),
    }
    with observing(perf_server.target("tokens"), tmp_path) as (client, observer):
        for _ in range(3):
            with client.infer_stream("tokens", asked) as stream:
                assert len(list(stream)) >= 5
        await_count(client, observer, "tokens", 3)
    first, last = observer.samples
    assert first.statistics is not None
    assert last.statistics is not None
    assert last.statistics.requests - first.statistics.requests == 3


@pytest.mark.server
def test_samples_come_while_the_load_goes_on_and_are_kept_at_once(
    perf_server: PerfServer, tmp_path: Path
) -> None:
    with observing(perf_server.target("tiny"), tmp_path, interval_s=0.02) as (_, observer):
        end_s = time.monotonic() + PATIENCE_S
        while len(read_samples(tmp_path / "samples.jsonl")) < 4:
            assert time.monotonic() < end_s, "no samples came"
    assert not any(thread.name == "observer" for thread in threading.enumerate())
    times = [one.at_ns for one in observer.samples]
    assert times == sorted(times)
    assert read_samples(tmp_path / "samples.jsonl") == list(observer.samples)
    observer.stop()


@pytest.mark.server
def test_unknown_model_is_noted_and_everything_else_is_seen(perf_server: PerfServer, tmp_path: Path) -> None:
    with observing(perf_server.target("nobody"), tmp_path) as (_, observer):
        pass
    assert observer.samples[-1].statistics is None
    assert observer.samples[-1].server_rss_bytes
    assert any(note.startswith("the model's configuration cannot be read") for note in observer.notes)
    assert "the server gives no statistics of the model" in observer.notes


@pytest.mark.server
def test_ensemble_is_sampled_with_its_parts_and_the_cache_is_counted(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for model in ("tiny", "steady20"):
        shutil.copytree(MODELS / model, repository / model)
    (repository / "both" / "1").mkdir(parents=True)
    (repository / "both" / "config.pbtxt").write_text(ENSEMBLE)
    config = repository / "tiny" / "config.pbtxt"
    config.write_text(f"{config.read_text()}\nresponse_cache {{ enable: true }}\n")
    with TritonServer(repository, cache_bytes=1 << 20) as server:
        server.wait_ready()
        url = f"grpc://{server.grpc_url}"
        with observing(Target("both", url), tmp_path / "both") as (client, observer):
            for value in range(4):
                client.infer("both", tensor(value=value))
            await_count(client, observer, "both", 4)
        assert set(observer.samples[-1].composing) == {"tiny", "steady20"}
        assert observer.samples[-1].composing["steady20"].success == 4
        with observing(Target("tiny", url), tmp_path / "tiny") as (client, observer):
            for _ in range(3):
                client.infer("tiny", tensor(value=9.0))
            await_count(client, observer, "tiny", 3)
    first, last = (one.statistics for one in observer.samples)
    assert first is not None
    assert last is not None
    assert (last.success - first.success, last.cache_hits - first.cache_hits) == (3, 2)


@pytest.mark.server
def test_server_that_dies_leaves_samples_of_what_is_left(
    own_server: Callable[..., AbstractContextManager[TritonServer]], tmp_path: Path
) -> None:
    with own_server("tiny") as server:
        target = Target(
            "tiny", f"grpc://{server.grpc_url}", metrics_url=server.metrics_url, server_pid=server.pid
        )
        with observing(target, tmp_path) as (_, observer):
            process = psutil.Process(server.pid)
            os.kill(server.pid, signal.SIGKILL)
            psutil.wait_procs([process], timeout=PATIENCE_S)
        first, last = observer.samples
        assert first.server is not None
        assert (last.server, last.server_cpu_s, last.statistics) == (None, None, None)
        assert last.machine_busy_s > 0
    assert read_samples(tmp_path / "samples.jsonl") == [first, last]


def test_server_on_another_machine_has_no_processes_here(tmp_path: Path) -> None:
    # 203.0.113.0/24 is for documentation: nobody answers, and the observer says what it cannot see.
    target = Target("tiny", "grpc://203.0.113.7:8001")
    with Client(target.url, timeout_s=0.2) as client:
        observer = Observer(client, target, tmp_path / "samples.jsonl")
        observer.start(time.monotonic_ns())
        observer.stop()
    assert observer.samples[0].server is None
    assert any("runs on another machine (203.0.113.7)" in note for note in observer.notes)


def test_lines_of_metrics_are_named_without_their_model_and_summed_over_versions() -> None:
    page = b"""# HELP enginesmith_llm_running Sequences
enginesmith_llm_running{model="llm",version="1"} 2
enginesmith_llm_running{model="llm",version="2"} 3
enginesmith_llm_running{model="other",version="1"} 50
enginesmith_llm_steps_total{batch_size="4",model="llm",version="1"} 1.5e3
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 7
nv_gpu_utilization{gpu_uuid="GPU-1"} 0.25
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} nan
nv_inference_count{model="llm",version="1"} 9
"""
    assert parse_metrics(page, ["llm"]) == {
        "enginesmith_llm_running": 5,
        'enginesmith_llm_steps_total{batch_size="4"}': 1500,
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used"}': 7,
        'nv_gpu_utilization{gpu_uuid="GPU-1"}': 0.25,
    }


def test_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    kept = [Sample(at_ns=at_ns, wall_ahead_s=1.5) for at_ns in (1, 2)]
    with SampleWriter(path) as writer:
        for sample in kept:
            writer.write(sample)
    path.write_text(path.read_text() + '{"at_ns": 3, "wall_')
    assert read_samples(path) == kept


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a file of benchmark samples"),
        ('{"format": "enginesmith-bench-samples", "version": 9}\n', "of version 9; this program reads"),
        ('{"format": "enginesmith-bench-samples", "version": 1}\n{"at_ns": "x"}\n', "line 2: not a sample"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(ResultsError, match=words):
        read_samples(path)
    with pytest.raises(ResultsError, match="cannot be read"):
        read_samples(tmp_path / "missing.jsonl")


def test_window_lies_between_the_samples_nearest_to_its_ends() -> None:
    samples = [Sample(at_ns=at_ns, wall_ahead_s=0) for at_ns in (0, 10, 20, 30)]
    found = around(samples, 12, 24)
    assert found is not None
    assert [one.at_ns for one in found] == [10, 20]
    short = around(samples, 9, 11)
    assert short is not None
    assert [one.at_ns for one in short] == [10, 20]
    assert around(samples, 40, 50) is None
    assert around(samples[:1], 0, 9) is None


def test_file_of_samples_says_what_it_is(tmp_path: Path) -> None:
    with SampleWriter(tmp_path / "deeper" / "samples.jsonl"):
        pass
    header = json.loads((tmp_path / "deeper" / "samples.jsonl").read_text())
    assert header == {"format": "enginesmith-bench-samples", "version": 1}


def test_machine_is_described_without_its_name() -> None:
    described = machine()
    assert described["cores"] >= described["cores_usable"] >= 1
    assert socket.gethostname() not in json.dumps(described)
    assert set(versions()) >= {"python", "tritonclient", "numpy"}
    assert set(versions(("numpy", "no-such-distribution"))) == {"python", "numpy"}
