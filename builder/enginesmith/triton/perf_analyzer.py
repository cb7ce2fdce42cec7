"""Runs NVIDIA's perf_analyzer against a tritonserver and reads its result.

Finds one on the machine, or puts one together from two wheels: ``tritonclient==2.51.0`` for manylinux1 is the last
that carries the program in a form that older systems (glibc from 2.35) can run, and ``nvidia-pytriton`` has the
two libraries that it needs, under other names.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from enginesmith.errors import OperatorError, ToolchainError
from enginesmith.triton.installation import cache_directory

WHEEL_VARIABLE = "ENGINESMITH_PERF_ANALYZER"
_REQUIREMENT = (
    "tritonclient==2.51.0 --hash=sha256:c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52"
)
_MEMBER_SUFFIX = ".data/data/bin/perf_analyzer"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_BY_HAND = f"set {WHEEL_VARIABLE} to a perf_analyzer executable, or to tritonclient-2.51.0-py3-none-manylinux1_x86_64.whl"

Value = str | int | float | bool


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer that runs on this machine."""

    executable: Path
    library_path: Path | None = None

    def environment(self) -> dict[str, str]:
        """The environment to run it in."""
        environment = dict(os.environ)
        if self.library_path:
            present = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(self.library_path), present]))
        return environment

    def version(self) -> str | None:
        """What it says about itself, or None when it does not run here."""
        try:
            done = subprocess.run(
                [self.executable, "--version"],
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        said = (done.stdout + done.stderr).strip()
        return said if "Perf Analyzer Version" in said else None


@dataclass(frozen=True)
class PerfResult:
    """What perf_analyzer measured at one concurrency. Latencies are of single requests, as the client sees them."""

    concurrency: int
    throughput_per_s: float
    """Rows, not requests."""
    avg_us: float
    p50_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    csv_path: Path
    """perf_analyzer's own report, with the server's queue and compute times."""
    stream: StreamFigures | None = None
    """Of a measurement over streams, whose latencies above are those of whole answers."""


@dataclass(frozen=True)
class StreamFigures:
    """What the responses of streams have besides."""

    responses_per_s: float
    """From the first request to the last response; empty final responses are not counted."""
    first_response_p50_us: float
    """From the request to the first response: of a language model that streams, the time to first token."""
    first_response_p99_us: float


def find_perf_analyzer() -> PerfAnalyzer:
    """A perf_analyzer that runs: on ``PATH``, named by ENGINESMITH_PERF_ANALYZER, or assembled in the user's cache.

    The last needs pip and the network the first time.

    Raises:
        ToolchainError: none can be had; says how to provide one.
    """
    named = os.environ.get(WHEEL_VARIABLE)
    if named and not named.endswith(".whl"):
        return _require_running(PerfAnalyzer(Path(named).expanduser()))
    on_path = shutil.which("perf_analyzer")
    if on_path and not named and PerfAnalyzer(Path(on_path)).version():
        return PerfAnalyzer(Path(on_path))
    directory = cache_directory() / "perf_analyzer-2.51.0"
    if named or not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".perf_analyzer-", dir=directory.parent) as staging:
            wheel = Path(named).expanduser() if named else _download(Path(staging))
            _assemble(wheel, Path(staging, "complete"), directory)
    return _require_running(PerfAnalyzer(directory / "perf_analyzer", directory))


def run_perf_analyzer(
    model: str,
    inputs: Sequence[Mapping[str, Sequence[Value]]],
    *,
    grpc_url: str,
    concurrency: int,
    out_dir: Path,
    batch_size: int = 1,
    request_count: int | None = None,
    streaming: bool = False,
    window_s: float = 5.0,
    stability_percent: float = 10.0,
    max_windows: int = 10,
    timeout_s: float = 600.0,
    tool: PerfAnalyzer | None = None,
) -> PerfResult:
    """Measure ``model`` with ``concurrency`` requests always in flight, going round ``inputs``.

    Args:
        inputs: rows, each the values of every input by name, without the batch dimension.
        batch_size: rows of one request. Throughput counts rows, latencies are of requests.
        out_dir: where the files that perf_analyzer reads and writes are kept.
        request_count: send exactly so many requests. Default: windows of ``window_s`` until three in a row agree
            within ``stability_percent``, at most ``max_windows``.
        streaming: over gRPC streams, the only way to a decoupled model.

    Raises:
        OperatorError: a request failed, or the measurement did not become stable.
    """
    tool = tool or find_perf_analyzer()
    out_dir.mkdir(parents=True, exist_ok=True)
    stem = out_dir / f"{model}-concurrency{concurrency}"
    data, report, export = (Path(f"{stem}{suffix}") for suffix in (".inputs.json", ".csv", ".requests.json"))
    data.write_text(json.dumps({"data": [_row(request) for request in inputs]}), encoding="utf-8")
    for stale in (report, export):
        stale.unlink(missing_ok=True)
    command = [str(tool.executable), "-m", model, "-u", grpc_url, "-i", "grpc", "--input-data", str(data)]
    command += ["--concurrency-range", str(concurrency), "-f", str(report), "--verbose-csv"]
    command += ["--profile-export-file", str(export), "-b", str(batch_size)]
    command += ["--streaming"] if streaming else []
    if request_count is not None:
        command += ["--request-count", str(request_count)]
    else:
        command += ["--measurement-interval", str(round(window_s * 1000)), "--max-trials", str(max_windows)]
        command += ["--stability-percentage", str(stability_percent)]
    _run(command, tool, model=model, timeout_s=timeout_s)
    requests = _requests(export)
    counted = None if request_count is None else len(requests) / _span_s(requests) * batch_size
    result = _result(report, concurrency, counted)
    return replace(result, stream=_stream_figures(requests)) if streaming else result


def _row(request: Mapping[str, Sequence[Value]]) -> dict[str, object]:
    return {name: {"content": list(values), "shape": [len(values)]} for name, values in request.items()}


def _run(command: Sequence[str], tool: PerfAnalyzer, *, model: str, timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command,
            env=tool.environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OperatorError(
            f"perf_analyzer did not finish measuring {model} in {timeout_s:g} s",
            hint="ask for fewer requests or shorter windows",
        ) from error
    if done.returncode == 0:
        return
    said = "\n".join(f"  | {line}" for line in done.stderr.splitlines()[-12:] if line.strip())
    if "stable measurement" in done.stderr:
        raise OperatorError(
            f"perf_analyzer got no stable measurement of {model}\n{said}",
            hint="quiet the machine, lengthen the windows, allow a larger stability_percent, or measure a fixed request count",
        )
    raise OperatorError(
        f"perf_analyzer could not measure {model} (exit status {done.returncode})\n{said}",
        hint="see the server's log",
    )


def _result(report: Path, concurrency: int, counted_throughput_per_s: float | None) -> PerfResult:
    with report.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    return PerfResult(
        concurrency=concurrency,
        throughput_per_s=counted_throughput_per_s or float(row["Inferences/Second"]),
        avg_us=float(row["Avg latency"]),
        p50_us=float(row["p50 latency"]),
        p90_us=float(row["p90 latency"]),
        p95_us=float(row["p95 latency"]),
        p99_us=float(row["p99 latency"]),
        csv_path=report,
    )


@dataclass(frozen=True)
class _Request:
    """When a request was sent, and when its responses came."""

    sent_ns: int
    answered_ns: tuple[int, ...]


def _requests(export: Path) -> list[_Request]:
    (experiment,) = json.loads(export.read_text(encoding="utf-8"))["experiments"]
    return [_Request(one["timestamp"], tuple(one["response_timestamps"])) for one in experiment["requests"]]


def _span_s(requests: Sequence[_Request]) -> float:
    """The time from the first request sent to the last response.

    With a fixed request count perf_analyzer 2.51 divides by a window that is rounded up to whole seconds: it
    reports 200/s for 200 requests that took 0.16 s.
    """
    last_ns = max(request.answered_ns[-1] for request in requests)
    return (last_ns - min(request.sent_ns for request in requests)) / 1e9


def _stream_figures(requests: Sequence[_Request]) -> StreamFigures:
    waits_us = sorted((request.answered_ns[0] - request.sent_ns) / 1e3 for request in requests)
    return StreamFigures(
        responses_per_s=sum(len(request.answered_ns) for request in requests) / _span_s(requests),
        first_response_p50_us=waits_us[math.ceil(0.5 * len(waits_us)) - 1],
        first_response_p99_us=waits_us[math.ceil(0.99 * len(waits_us)) - 1],
    )


def _require_running(tool: PerfAnalyzer) -> PerfAnalyzer:
    if tool.version() is None:
        raise ToolchainError(
            f"{tool.executable} does not run on this machine (it needs Linux on x86-64, glibc 2.35)",
            hint=_BY_HAND,
        )
    return tool


def _download(directory: Path) -> Path:
    """The wheel, from the package index that pip is configured for, if it has the known digest."""
    requirements = directory / "requirements.txt"
    requirements.write_text(_REQUIREMENT + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--platform", "manylinux1_x86_64", "--dest", str(directory)]
    done = subprocess.run(
        [*command, "--require-hashes", "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(directory.glob("tritonclient-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ToolchainError(
            f"pip could not download perf_analyzer: {done.stderr.strip()[-500:]}", hint=_BY_HAND
        )
    return wheels[0]


def _assemble(wheel: Path, staging: Path, directory: Path) -> None:
    """Put the program and its libraries into ``directory``, complete when visible."""
    staging.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(_MEMBER_SUFFIX)]
            (staging / "perf_analyzer").write_bytes(archive.read(member))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ToolchainError(
            f"{wheel} is not a wheel with one perf_analyzer in it: {error}", hint=_BY_HAND
        ) from error
    (staging / "perf_analyzer").chmod(0o755)
    libraries = _pytriton_libraries()
    for name, pattern in _LIBRARIES.items():
        found = sorted(libraries.glob(pattern))
        if not found:
            raise ToolchainError(f"{libraries} has no {pattern}", hint="pip install 'enginesmith[serve]'")
        shutil.copy2(found[0], staging / name)
    try:
        staging.rename(directory)
    except OSError:
        # Somebody else was faster, or it is there from before: either is the same program.
        if not directory.is_dir():
            raise


def _pytriton_libraries() -> Path:
    specification = importlib.util.find_spec("pytriton")
    if specification is None or specification.origin is None:
        raise ToolchainError(
            "perf_analyzer needs libraries that come with nvidia-pytriton, which is not installed",
            hint="pip install 'enginesmith[serve]'",
        )
    return Path(specification.origin).parent.parent / "nvidia_pytriton.libs"
