"""Whether `compare` can be trusted: identical models must not be called worse, a slowdown of 5% must be found.

Two models of about 5 ms behind one tritonserver, with the jitter of real ones: times that vary from request to request,
wander over seconds, and now and then are twice as long. First both are the same; then B takes 5% longer. Each time the
whole comparison is made twenty times, round by round through a real client, with the settings of `RECORD`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Bar, Outcome, print_table, run_benchmark, say, spread_of

from enginesmith.triton.server import TritonServer
from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.compare._comparison import CompareOptions, Comparison
from enginesmith_client.perf.compare._live import compare_live

SERVICE_MS = 5.0
SLOWDOWN = 1.05
MIN_FOUND_SHARE = 0.9
CONFIG = """
backend: "python"
input [ { name: "in" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "out" data_type: TYPE_FP32 dims: [ 4 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
MODEL = '''
import random
import time

import triton_python_backend_utils as triton

SERVICE_S = {service_s!r}


class TritonPythonModel:
    """Returns its input after SERVICE_S on average: 10% of jitter, 1% that wanders, one request in 200 twice as long."""

    def initialize(self, arguments):
        self.random = random.Random()
        self.level = 0.0

    def execute(self, requests):
        responses = []
        for request in requests:
            end_s = time.monotonic() + self.service_s()
            responses.append(triton.InferenceResponse([triton.Tensor("out", request.inputs()[0].as_numpy())]))
            time.sleep(max(0.0, end_s - time.monotonic()))
        return responses

    def service_s(self):
        self.level = 0.99 * self.level + self.random.gauss(0.0, 0.0014)
        stall = 2.0 if self.random.random() < 0.005 else 1.0
        return SERVICE_S * stall * self.random.lognormvariate(self.level, 0.1)
'''


@dataclass(frozen=True)
class Settings:
    """How each comparison is made, and how many."""

    comparisons: int
    rounds: int
    round_s: float


RECORD = Settings(comparisons=20, rounds=36, round_s=0.75)
QUICK = Settings(comparisons=2, rounds=8, round_s=0.5)
PROFILE = Profile.model_validate(
    {
        "name": "comparison",
        # Two in flight: the model is never idle, so what the client costs is not part of the time of a request.
        "load": {"loop": "closed", "concurrency": 2},
        "measure": {"warmup_s": 0.1},
    }
)
CASES: Mapping[str, str] = {"identical": "twin", "slower": "slow"}
"""B of each case; A is ``base``."""


def write_models(repository: Path) -> None:
    """Two models that are the same and one that is slower."""
    for name, factor in (("base", 1.0), ("twin", 1.0), ("slow", SLOWDOWN)):
        version = repository / name / "1"
        version.mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(CONFIG)
        (version / "model.py").write_text(MODEL.format(service_s=SERVICE_MS * factor / 1000))


def measure(settings: Settings) -> Outcome:
    """All comparisons of both cases, in turn, so that both meet the same hours of the machine."""
    found: dict[str, list[Comparison]] = {case: [] for case in CASES}
    durations_s = []
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as scratch:
        repository = Path(scratch, "repository")
        write_models(repository)
        with TritonServer(repository) as server:
            server.wait_ready()
            programs = {"tritonserver": server.server_version()}
            for number in range(settings.comparisons):
                for case, model in CASES.items():
                    begun_s = time.perf_counter()
                    directory = Path(scratch, f"{case}-{number}")
                    comparison = compare(server, model, settings, directory, seed=number)
                    durations_s.append(time.perf_counter() - begun_s)
                    found[case].append(comparison)
                    say(
                        f"{case} {number + 1}/{settings.comparisons}: {comparison.verdict}: {comparison.words}"
                    )
    _show(found)
    described = {
        "comparisons": settings.comparisons,
        "rounds": settings.rounds,
        "round_s": settings.round_s,
        "service_ms": SERVICE_MS,
        "slowdown": SLOWDOWN,
    }
    figures: dict[str, Any] = {case: _figures(comparisons) for case, comparisons in found.items()}
    figures["comparison_s"] = statistics.median(durations_s)
    return Outcome("comparison", described, figures, _bars(found), programs)


def compare(
    server: TritonServer, model: str, settings: Settings, directory: Path, *, seed: int
) -> Comparison:
    """One comparison of ``base`` with ``model``."""
    url = f"grpc://{server.grpc_url}"
    a, b = (
        Target(name, url, metrics_url=server.metrics_url, server_pid=server.pid) for name in ("base", model)
    )
    return compare_live(
        a,
        b,
        PROFILE,
        directory=directory,
        rounds=settings.rounds,
        round_s=settings.round_s,
        options=CompareOptions(seed=seed),
    )


def _figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Verdicts, and for each deciding figure what was measured and how much rounds differed."""
    return {
        "verdicts": dict(Counter(comparison.verdict for comparison in comparisons)),
        "warnings": dict(Counter(_rule(line) for comparison in comparisons for line in comparison.warnings)),
        "metrics": {name: _metric(comparisons, name) for name in ("requests_per_s", "latency_ms.p50")},
    }


def _rule(warning: str) -> str:
    return warning.partition(":")[0]


def _metric(comparisons: Sequence[Comparison], name: str) -> dict[str, Any]:
    found = [metric for one in comparisons for metric in one.metrics if metric.name == name]
    noise = [
        statistics.stdev(math.log(b / a) for a, b in zip(metric.values_a, metric.values_b, strict=True))
        for metric in found
    ]
    return {
        "ratios": [metric.ratio for metric in found],
        "lows": [metric.low for metric in found],
        "highs": [metric.high for metric in found],
        "verdicts": [metric.verdict for metric in found],
        "pair_stdev_percent": [100 * value for value in noise],
    }


def _bars(found: Mapping[str, Sequence[Comparison]]) -> list[Bar]:
    identical = [one.verdict for one in found["identical"]]
    slower = [one.verdict for one in found["slower"]]
    least = math.ceil(MIN_FOUND_SHARE * len(slower))
    return [
        Bar(f"identical, of {len(identical)} comparisons: false worse", "at most", 0, identical.count("worse")),
        Bar(f"5% slower, of {len(slower)} comparisons: found worse", "at least", least, slower.count("worse")),
    ]  # fmt: skip


def _show(found: Mapping[str, Sequence[Comparison]]) -> None:
    rows = []
    for case, comparisons in found.items():
        verdicts = Counter(comparison.verdict for comparison in comparisons)
        for name in ("requests_per_s", "latency_ms.p50"):
            figures = _metric(comparisons, name)
            if not figures["ratios"]:
                continue
            noise = spread_of(figures["pair_stdev_percent"])
            counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
            rows.append([f"{case}: {name}", str(spread_of(figures["ratios"])), str(noise), counts])
    print_table("compare", ("B / A", "ratio (range)", "noise of a pair, %", "verdicts"), rows)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short comparisons of each kind")
    parser.add_argument("--comparisons", type=int, help="of each kind; default: 20")
    given = parser.parse_args()
    settings = QUICK if given.quick else RECORD
    if given.comparisons:
        settings = Settings(given.comparisons, settings.rounds, settings.round_s)
    return run_benchmark(lambda: measure(settings))


if __name__ == "__main__":
    sys.exit(main())
