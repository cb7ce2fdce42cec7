"""Whether the harness measures what perf_analyzer measures: closed loops of both on the same model, in turn.

Three models of 5 ms and more (20 ms whatever the batch, a sentence encoder, a language model over streams), at 1, 4 and 16
requests in flight. A round measures every point once by each generator, one after the other, and every second round in
the other order; both send the same requests and one set of formulas makes their figures. Last a model that only returns
its input, where a generator in Python measures itself: there the harness has to say so, and to name perf_analyzer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from figures import Bar, Outcome, Spread, print_table, run_benchmark, say, spread_of, spread_of_ratios
from releases import Project, add_project_options, project_from, published_releases

from enginesmith.errors import OperatorError
from enginesmith.triton.server import TritonServer
from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._run import run_profile
from enginesmith_client.perf._run_files import Run
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.perf_analyzer._measure import find_perf_analyzer

Generator: TypeAlias = Literal["enginesmith", "perf_analyzer"]
GENERATORS: tuple[Generator, ...] = ("enginesmith", "perf_analyzer")
CONCURRENCIES = (1, 4, 16)
LIMITS_PERCENT = {"throughput": 3.0, "p50": 5.0, "p99": 5.0}
"""How far the median of ours against perf_analyzer's may be from 1."""
PYTHON_MODELS = Path(__file__).parent.parent / "tests" / "perf" / "models"
CASES = ("steady20", "minilm", "smollm2", "tiny")
ECHO = "tiny"
TRUST_RULE = "client-cpu"
"""The check that says that the generator measured itself."""


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int
    window_s: float
    stream_window_s: float
    """Of the language model, which answers fewer requests and needs a hundred for its 99th percentile."""
    max_windows: int


RECORD = Settings(rounds=4, window_s=3.0, stream_window_s=6.0, max_windows=6)
QUICK = Settings(rounds=1, window_s=1.0, stream_window_s=2.0, max_windows=4)


@dataclass(frozen=True)
class Case:
    """A model, and what it is asked."""

    name: str
    model: str
    repository: Path
    load: tuple[str, ...]
    """The models that the server loads for it."""
    window_s: float
    requests: Mapping[str, Any] = field(default_factory=dict)

    def profile(self, concurrency: int, generator: Generator, *, max_windows: int) -> Profile:
        """The same for both generators but for their name."""
        return Profile.model_validate(
            {
                "name": f"{self.name}-{concurrency}",
                "requests": dict(self.requests),
                "load": {"loop": "closed", "concurrency": concurrency, "generator": generator},
                "measure": {
                    "window_s": self.window_s,
                    "max_s": self.window_s * max_windows,
                    "warmup_s": 1.0,
                },
            }
        )


@dataclass(frozen=True)
class Point:
    """What one generator measured in one round."""

    throughput: float
    """Requests per second, answered."""
    p50: float
    """Milliseconds, as the next."""
    p99: float
    names_perf_analyzer: bool
    """Whether a check says that the generator measured itself, and whose figure is to be trusted."""
    steady: bool


Points: TypeAlias = Mapping[int, Mapping[Generator, Sequence[Point]]]
"""By concurrency and generator, one for every round."""


def measure(project: Project, minilm_spec: Path, only: Sequence[str]) -> Outcome:
    """Every case behind a server of its own."""
    settings = QUICK if project.quick else RECORD
    programs = {"perf_analyzer": find_perf_analyzer().version()}
    found: dict[str, Points] = {}
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as scratch:
        for case in _cases(project, minilm_spec, only, settings, Path(scratch)):
            with TritonServer(case.repository, model_control="explicit", load_models=case.load) as server:
                server.wait_ready()
                programs["tritonserver"] = server.server_version()
                target = Target(
                    case.model,
                    f"grpc://{server.grpc_url}",
                    metrics_url=server.metrics_url,
                    server_pid=server.pid,
                )
                found[case.name] = measure_case(case, target, settings, Path(scratch, f"{case.name}-runs"))
    _show(found)
    figures = {name: _figures(points) for name, points in found.items()}
    described = {
        "rounds": settings.rounds,
        "window_s": settings.window_s,
        "stream_window_s": settings.stream_window_s,
    }
    return Outcome("agreement", described, figures, _bars(found), programs)


def measure_case(case: Case, target: Target, settings: Settings, directory: Path) -> Points:
    """All rounds of one model."""
    points: dict[int, dict[Generator, list[Point]]] = {
        concurrency: {generator: [] for generator in GENERATORS} for concurrency in CONCURRENCIES
    }
    for number in range(settings.rounds):
        say(f"{case.name}: round {number + 1}/{settings.rounds}")
        for concurrency in CONCURRENCIES:
            for generator in GENERATORS if number % 2 == 0 else reversed(GENERATORS):
                saved = run_profile(
                    target,
                    case.profile(concurrency, generator, max_windows=settings.max_windows),
                    directory=directory / f"{number}-{concurrency}-{generator}",
                )
                points[concurrency][generator].append(_point(saved.run))
    return points


def _point(run: Run) -> Point:
    latency = run.figures.latency_ms
    if latency is None:
        raise OperatorError(
            f"{run.title}: no request was answered",
            hint="see the errors of the run above, and the server's log",
        )
    return Point(
        throughput=run.figures.requests_per_s,
        p50=latency.p50,
        # Fewer than a hundred answers, as in a quick run: the slowest stands for it.
        p99=latency.max if latency.p99 is None else latency.p99,
        names_perf_analyzer=any(
            check.rule == TRUST_RULE and "perf_analyzer" in check.words for check in run.checks
        ),
        steady=run.window.steady,
    )


def _cases(
    project: Project, minilm_spec: Path, only: Sequence[str], settings: Settings, scratch: Path
) -> Iterator[Case]:
    """Those that were asked for; what they serve is built when its turn comes."""
    for name in only:
        if name == "minilm":
            yield _minilm(project, minilm_spec, settings)
        elif name == "smollm2":
            yield _smollm2(project, settings)
        else:
            repository = scratch / name
            # A copy, because the Python backend writes __pycache__ beside every model.py.
            shutil.copytree(PYTHON_MODELS / name, repository / name)
            yield Case(name, name, repository, (name,), settings.window_s)


def _minilm(project: Project, spec: Path, settings: Settings) -> Case:
    """The FP32 variant with its tokenizer before it, asked for one text of 64 tokens."""
    command = project.cli("build", str(spec), "--variant", "fp32", "--publish", str(project.repository))
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise OperatorError(f"enginesmith build {spec} ended with status {done.returncode}")
    (report,) = json.loads(done.stdout)["reports"]
    model = f"{report['name']}-fp32"
    parts = (model, f"{model}-tokenizer", f"{model}-text")
    requests = {"prompt_tokens": {"kind": "fixed", "tokens": 64}}
    return Case("minilm", f"{model}-text", project.repository, parts, settings.window_s, requests)


def _smollm2(project: Project, settings: Settings) -> Case:
    """Short answers, so that a hundred of them fit into a window."""
    release = next(iter(published_releases(project)))
    requests = {
        "prompt_tokens": {"kind": "fixed", "tokens": 16},
        "output_tokens": {"kind": "fixed", "tokens": 8},
    }
    return Case(
        "smollm2", release.model, project.repository, (release.model,), settings.stream_window_s, requests
    )


def _ratios(points: Mapping[Generator, Sequence[Point]], figure: str) -> Spread:
    """Ours against perf_analyzer's of the same round."""
    ours, theirs = ([getattr(point, figure) for point in points[generator]] for generator in GENERATORS)
    return spread_of_ratios(ours, theirs)


def _figures(points: Points) -> dict[str, Any]:
    return {
        str(concurrency): {
            "ratio": {figure: _ratios(by_generator, figure) for figure in LIMITS_PERCENT},
            **{
                generator: {
                    figure: spread_of([getattr(point, figure) for point in measured])
                    for figure in LIMITS_PERCENT
                }
                | {"steady": sum(point.steady for point in measured)}
                for generator, measured in by_generator.items()
            },
        }
        for concurrency, by_generator in points.items()
    }


def _bars(found: Mapping[str, Points]) -> list[Bar]:
    bars = []
    for name, points in found.items():
        for concurrency, by_generator in points.items():
            if name == ECHO:
                bars.append(_trust_bar(concurrency, by_generator["enginesmith"]))
                continue
            for figure, limit in LIMITS_PERCENT.items():
                bars.append(_agreement_bar(f"{name} x{concurrency}: {figure}", by_generator, figure, limit))
    return bars


def _agreement_bar(label: str, points: Mapping[Generator, Sequence[Point]], figure: str, limit: float) -> Bar:
    """How far the median ratio is from 1, in percent; its range is that of the rounds, with their signs."""
    ratios = _ratios(points, figure)
    low, middle, high = (100 * (ratio - 1) for ratio in (ratios.low, ratios.median, ratios.high))
    return Bar(f"{label} against perf_analyzer's", "at most", limit, abs(middle), "%", low, high)


def _trust_bar(concurrency: int, ours: Sequence[Point]) -> Bar:
    share = statistics.mean(point.names_perf_analyzer for point in ours)
    return Bar(f"{ECHO} x{concurrency}: says that Python measures itself", "at least", 1, share)


def _show(found: Mapping[str, Points]) -> None:
    headings = ["model", "in flight"]
    headings += [f"{figure} {whose}" for figure in LIMITS_PERCENT for whose in ("ours", "theirs", "ratio")]
    rows = []
    for name, points in found.items():
        for concurrency, by_generator in points.items():
            row = [name, str(concurrency)]
            for figure in LIMITS_PERCENT:
                for generator in GENERATORS:
                    middle = statistics.median(getattr(point, figure) for point in by_generator[generator])
                    row.append(f"{middle:.1f}")
                row.append(str(_ratios(by_generator, figure)))
            rows.append(row)
    print_table("requests per second and milliseconds by both generators: medians", headings, rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    parser.add_argument("--minilm-spec", type=Path, default=Path("models/minilm-l6.yaml"), metavar="FILE")
    parser.add_argument(
        "--only", action="append", choices=CASES, help="only this model; repeatable; not for the record"
    )
    given = parser.parse_args()
    given.variant = given.variant or ["int4-awq"]
    return run_benchmark(lambda: measure(project_from(given), given.minilm_spec, given.only or CASES))


if __name__ == "__main__":
    sys.exit(main())
