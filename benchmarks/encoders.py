"""Encoders: what each precision costs and gains, and how much of the runtime's speed a server keeps.

Four things, each against a peer in the same run: the engine of every variant against the FP32 engine in this process
(rounds interleaved); a naive INT8 variant, which the gate has to stop; every variant behind a real tritonserver against
its own engine in this process at the same batch size and threads, and 16 requests in flight against 1; and the time that
TensorRT for RTX takes to build, and to build again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from figures import (
    Bar,
    Outcome,
    bar_of_spread,
    print_table,
    run_benchmark,
    say,
    spread_of,
    spread_of_ratios,
)
from releases import CLI

from enginesmith.errors import OperatorError
from enginesmith.publish.local import CONFIG_FILE
from enginesmith.store import Artifact, ArtifactStore
from enginesmith.triton.config import parse_config
from enginesmith.triton.models.graph_onnxruntime.graph_runtime import GraphRuntime
from enginesmith.triton.server import TritonServer
from enginesmith_client.perf.perf_analyzer._measure import (
    PerfAnalyzer,
    Question,
    find_perf_analyzer,
    input_data_from_rows,
    run_perf_analyzer,
)

MIN_INT8_COSINE, MIN_FP8_COSINE = 0.98, 0.99
MIN_INT8_SPEED = 1.3
MIN_SHARE_OF_RUNTIME = 0.9
MIN_BATCHING_GAIN = 2.5
MAX_RTX_BUILD_S = 60.0
CONCURRENCY = 16
MAX_S = 600.0
"""Of one measurement."""
SHAPES = ((1, 16), (1, 128), (16, 16), (16, 64), (32, 128))
"""Batch size and tokens of the engines' rounds."""
SERVED_TOKENS = 64
TEXTS = (
    "how do I reset my password",
    "the cat sat on the mat",
    "opening hours on Sunday",
    "cheap flights to Lisbon",
    "what is a compiler",
    "the printer is out of paper",
    "best bread for toast",
    "my parcel has not arrived",
)
"""Short texts, as a search box gets them."""
NAIVE = {"scheme": "int8", "method": "max", "smoothing": None, "weights": "per_tensor", "attention": True}


@dataclass(frozen=True)
class Settings:
    """How often and how long to measure."""

    rounds: int
    runs: int
    requests: int
    """Short texts of one measurement with one in flight; four times as many with more, a tenth of full batches."""


RECORD = Settings(rounds=4, runs=3, requests=160)
QUICK = Settings(rounds=2, runs=2, requests=40)


@dataclass(frozen=True)
class Project:
    """What is measured, and where it is built and published."""

    spec: Path
    rtx_spec: Path
    store: Path
    repository: Path
    settings: Settings

    def build(self, spec: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Build a spec with the command line; its report is on stdout as JSON."""
        command = [*CLI, "--store", str(self.store), "build", str(spec), "--json", *options]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def measure(project: Project) -> Outcome:
    """All four parts."""
    report = _built(project, project.spec, "--publish", str(project.repository))
    variants = {entry["variant"]: entry for entry in report["variants"]}
    baseline = next(name for name, entry in variants.items() if entry["scheme"] == "none")
    directories = {name: _served_directory(project, report["name"], name) for name in variants}
    engines = _engine_figures(directories, baseline, project.settings)
    served, programs = _served_figures(report["name"], directories, project)
    figures = {
        "accuracy": {
            name: {key: entry[key] for key in ("mean_cosine", "min_cosine")}
            for name, entry in variants.items()
        },
        "naive_int8": _naive(project),
        "engines": engines,
        "served": served,
        "tensorrt_rtx": _rtx_builds(project),
    }
    _show(figures)
    settings = {"rounds": project.settings.rounds, "runs": project.settings.runs, "shapes": SHAPES}
    return Outcome("encoders", settings, figures, _bars(figures, variants), programs)


def _built(project: Project, spec: Path, *options: str) -> dict[str, Any]:
    done = project.build(spec, *options)
    if done.returncode != 0:
        raise OperatorError(f"enginesmith build {spec} ended with status {done.returncode}")
    (report,) = json.loads(done.stdout)["reports"]
    return dict(report)


def _served_directory(project: Project, name: str, variant: str) -> Path:
    """The version directory that is served, which is an engine directory too."""
    path = project.repository / f"{name}-{variant}" / CONFIG_FILE
    config = parse_config(path.read_text(encoding="utf-8"), origin=str(path))
    (version,) = config.version_policy.specific.versions
    return path.parent / str(version)


def _ids(runtime: GraphRuntime, batch: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random token ids without padding, for every input of a text model."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1000, 20000, (batch, tokens))
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {tensor["name"]: values[tensor["name"]] for tensor in runtime.signature["inputs"]}


def _rate(runtime: GraphRuntime, batch: int, tokens: int, *, runs: int) -> float:
    """Rows per second."""
    inputs = _ids(runtime, batch, tokens)
    runtime.run(inputs)
    started_s = time.perf_counter()
    for _ in range(runs):
        runtime.run(inputs)
    return batch * runs / (time.perf_counter() - started_s)


def _engine_figures(directories: Mapping[str, Path], baseline: str, settings: Settings) -> dict[str, Any]:
    """For every variant and shape: rows per second, and the ratio to the FP32 engine of the same round."""
    runtimes = {name: GraphRuntime(directory) for name, directory in directories.items()}
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(1, settings.rounds + 1):
        say(f"engines: round {number}/{settings.rounds}")
        for batch, tokens in SHAPES:
            for name, runtime in runtimes.items():
                rate = _rate(runtime, batch, tokens, runs=settings.runs)
                rates.setdefault((name, f"{batch}x{tokens}"), []).append(rate)
    return {
        name: {
            shape: {
                "rows_per_s": spread_of(rates[name, shape]),
                "against_fp32": spread_of_ratios(rates[name, shape], rates[baseline, shape]),
            }
            for shape in (f"{batch}x{tokens}" for batch, tokens in SHAPES)
        }
        for name in runtimes
    }


def _served_figures(
    name: str, directories: Mapping[str, Path], project: Project
) -> tuple[dict[str, Any], dict[str, str]]:
    tool = find_perf_analyzer()
    programs = {"perf_analyzer": tool.version()}
    figures = {}
    for variant, directory in directories.items():
        model = f"{name}-{variant}"
        parts = [model, f"{model}-tokenizer", f"{model}-text"]
        with (
            tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as scratch,
            TritonServer(project.repository, model_control="explicit", load_models=parts) as server,
        ):
            server.wait_ready()
            programs["tritonserver"] = server.server_version()
            bench = _ServedBench(model, directory, server.grpc_url, tool, Path(scratch), project.settings)
            figures[variant] = bench.figures()
    return figures, programs


class _ServedBench:
    """One model behind a server, and the same engine in this process."""

    def __init__(
        self,
        model: str,
        directory: Path,
        grpc_url: str,
        tool: PerfAnalyzer,
        scratch: Path,
        settings: Settings,
    ) -> None:
        self._model, self._grpc_url, self._tool = model, grpc_url, tool
        self._scratch, self._settings = scratch, settings
        self._runtime = GraphRuntime(directory)
        config = parse_config((directory.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        self._batch = int(config.max_batch_size)

    def figures(self) -> dict[str, Any]:
        """Rounds of: full batches served and in this process, then short texts one at a time and 16 in flight."""
        rounds = max(1, self._settings.rounds // 2)
        served, raw, single, many = [], [], [], []
        count = self._settings.requests
        for number in range(1, rounds + 1):
            say(f"{self._model}: round {number}/{rounds}")
            raw.append(_rate(self._runtime, self._batch, SERVED_TOKENS, runs=2 * self._settings.runs))
            served.append(self._perf(self._model, self._rows(), concurrency=2, requests=count // 10))
            texts = [{"TEXT": [text]} for text in TEXTS]
            single.append(self._perf(f"{self._model}-text", texts, concurrency=1, requests=count))
            many.append(self._perf(f"{self._model}-text", texts, concurrency=CONCURRENCY, requests=4 * count))
        return {
            "batch": self._batch,
            "tokens": SERVED_TOKENS,
            "rows_per_s": spread_of(served),
            "runtime_rows_per_s": spread_of(raw),
            "share_of_runtime": spread_of_ratios(served, raw),
            "texts_per_s": {"1": spread_of(single), str(CONCURRENCY): spread_of(many)},
            "batching_gain": spread_of_ratios(many, single),
        }

    def _rows(self) -> list[dict[str, list[int]]]:
        arrays = _ids(self._runtime, self._batch, SERVED_TOKENS)
        return [
            {name: [int(value) for value in array[row]] for name, array in arrays.items()}
            for row in range(self._batch)
        ]

    def _perf(
        self, model: str, rows: Sequence[Mapping[str, Sequence[Any]]], *, concurrency: int, requests: int
    ) -> float:
        """Rows per second; of the model itself in full batches."""
        question = Question(
            model,
            self._grpc_url,
            input_data_from_rows(rows),
            concurrency,
            batch=self._batch if model == self._model else 1,
            request_count=requests,
            max_s=MAX_S,
        )
        return run_perf_analyzer(question, directory=self._scratch, tool=self._tool).rows_per_s


def _naive(project: Project) -> dict[str, Any]:
    """Whether the gate stops a naive INT8 variant, and at which cosine."""
    document = yaml.safe_load(project.spec.read_text(encoding="utf-8"))
    document["variants"] = {"naive": NAIVE}
    with tempfile.NamedTemporaryFile(
        "w", dir=project.spec.parent, prefix=".naive-", suffix=".yaml", encoding="utf-8"
    ) as file:
        yaml.safe_dump(document, file)
        file.flush()
        done = project.build(Path(file.name), "--keep-going")
    (report,) = json.loads(done.stdout)["reports"]
    (variant,) = report["variants"]
    # Measured but without a verdict: the gate's step failed, and nothing before it did.
    stopped = done.returncode == 1 and variant["measured"] and variant["passed"] is None
    return {"stopped": stopped, "mean_cosine": variant["mean_cosine"]}


def _rtx_builds(project: Project) -> dict[str, Any]:
    """Seconds of every TensorRT for RTX engine, as its step took, and of building the spec again."""
    report = _built(project, project.rtx_spec, "--target", "tensorrt-rtx")
    first = {entry["variant"]: _compiled(entry, project.store) for entry in report["variants"]}
    started_s = time.perf_counter()
    again = _built(project, project.rtx_spec, "--target", "tensorrt-rtx")
    elapsed_s = time.perf_counter() - started_s
    second = {entry["variant"]: _compiled(entry, project.store) for entry in again["variants"]}
    return {
        "build_s": {variant: artifact.duration_s for variant, artifact in first.items()},
        "again_s": elapsed_s,
        "built_again": sum(first[name].created_unix_s != second[name].created_unix_s for name in first),
    }


def _compiled(entry: Mapping[str, Any], store: Path) -> Artifact:
    found = ArtifactStore(store).inspect(entry["keys"]["compile_tensorrt@tensorrt-rtx"])
    assert isinstance(found, Artifact), found
    return found


def _bars(figures: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    limits = {"int8": MIN_INT8_COSINE, "fp8": MIN_FP8_COSINE}
    bars = [
        Bar(f"{name}: mean cosine", "at least", limits[entry["scheme"]], entry["mean_cosine"])
        for name, entry in variants.items()
        if entry["scheme"] in limits
    ]
    naive = figures["naive_int8"]
    bars.append(Bar("naive INT8: stopped by the gate", "at least", 1, float(naive["stopped"])))
    for name, entry in variants.items():
        if entry["scheme"] == "int8":
            bars += [
                bar_of_spread(
                    f"{name}: rows/s against FP32 at {shape}",
                    figure["against_fp32"],
                    relation="at least",
                    limit=MIN_INT8_SPEED,
                )
                for shape, figure in figures["engines"][name].items()
            ]
    for name, figure in figures["served"].items():
        bars.append(
            bar_of_spread(
                f"{name}: served against the runtime, batches of {figure['batch']}",
                figure["share_of_runtime"],
                relation="at least",
                limit=MIN_SHARE_OF_RUNTIME,
            )
        )
        bars.append(
            bar_of_spread(
                f"{name}: short texts, {CONCURRENCY} in flight against 1",
                figure["batching_gain"],
                relation="at least",
                limit=MIN_BATCHING_GAIN,
            )
        )
    bars += [
        Bar(f"{name}: TensorRT for RTX, time to build", "at most", MAX_RTX_BUILD_S, seconds, " s")
        for name, seconds in figures["tensorrt_rtx"]["build_s"].items()
    ]
    bars.append(Bar("engines built again", "at most", 0, figures["tensorrt_rtx"]["built_again"]))
    return bars


def _show(figures: Mapping[str, Any]) -> None:
    shapes = [f"{batch}x{tokens}" for batch, tokens in SHAPES]
    rows = [
        [name, *(f"{figure[shape]['against_fp32'].median:.2f}x" for shape in shapes)]
        for name, figure in figures["engines"].items()
    ]
    print_table("rows per second against FP32, by batch x tokens: medians", ("variant", *shapes), rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, default=Path("models/minilm-l6.yaml"), metavar="FILE")
    parser.add_argument(
        "--rtx-spec", type=Path, default=Path("models/minilm-l6-tensorrt.yaml"), metavar="FILE"
    )
    parser.add_argument("--store", type=Path, default=Path(".enginesmith"), metavar="DIR")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="short settings; not for the record")
    given = parser.parse_args()
    settings = QUICK if given.quick else RECORD
    return run_benchmark(
        lambda: measure(Project(given.spec, given.rtx_spec, given.store, given.repository, settings))
    )


if __name__ == "__main__":
    sys.exit(main())
