"""How long the command line takes where nothing is to be done, and what each build step cost when it ran.

Durations and peak memory of steps are those that the store recorded when it made each artifact. A bare start of the
same Python is measured in the same rounds, to tell the machine's share from enginesmith's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from figures import Bar, Outcome, Spread, bar_of_spread, print_table, run_benchmark, say, spread_of
from releases import (
    Project,
    Release,
    add_project_options,
    artifacts_of,
    baseline_of,
    project_from,
    published_releases,
)

from enginesmith.errors import OperatorError
from enginesmith.report_parts import bytes_text
from enginesmith.store import Artifact, ArtifactStore

MAX_REBUILD_S = 3.0
MAX_PLAN_S = 1.0
MAX_HELP_S = 0.3
PEAK_CONSTANT_BYTES = 1 << 30
PEAK_PER_CHECKPOINT = 2.5
"""A step may use 1 GiB and 2.5 times the BF16 checkpoint."""
ROUNDS, QUICK_ROUNDS = 9, 3


def measure(project: Project) -> Outcome:
    """Bring everything up to date, then time what should be nothing."""
    releases = published_releases(project)
    store = ArtifactStore(project.store, warn=say)
    steps = artifacts_of(releases)
    before = _entries(store)
    rounds = QUICK_ROUNDS if project.quick else ROUNDS
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "help": project.cli("--help"),
        "plan": project.cli("plan", str(project.spec_path)),
        "rebuild": project.build_command(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        say(f"commands: round {number}/{rounds}")
        for name, command in commands.items():
            seconds[name].append(_duration_s(command))
    if made := _entries(store) - before:
        raise OperatorError(
            f"a rebuild of an unchanged spec made {len(made)} artifacts: {', '.join(sorted(made))}"
        )
    spreads = {name: spread_of(values) for name, values in seconds.items()}
    limit_bytes = PEAK_CONSTANT_BYTES + PEAK_PER_CHECKPOINT * _bf16_bytes(releases)
    figures = {
        "commands_s": spreads,
        "steps": [_step_figures(*step) for step in steps],
        "steps_total_s": sum(artifact.duration_s for _, _, artifact in steps),
        "peak_limit_bytes": limit_bytes,
    }
    _show(figures, limit_bytes)
    return Outcome("builds", {"rounds": rounds}, figures, _bars(spreads, steps, limit_bytes))


def _duration_s(command: Sequence[str]) -> float:
    started_s = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    elapsed_s = time.perf_counter() - started_s
    if done.returncode != 0:
        raise OperatorError(
            f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return elapsed_s


def _entries(store: ArtifactStore) -> set[str]:
    """The key and the moment of creation of every artifact: a rebuilt one would differ."""
    return {
        f"{path.parent.name}@{path.stat().st_mtime_ns}"
        for path in store.root.glob("artifacts/*/*/manifest.json")
    }


def _bf16_bytes(releases: Sequence[Release]) -> int:
    return int(baseline_of(releases).facts("lower")["bf16_bytes"])


def _step_figures(kind: str, variant: str, artifact: Artifact) -> dict[str, Any]:
    return {
        "kind": kind,
        "variant": variant or None,
        "duration_s": artifact.duration_s,
        "peak_rss_bytes": artifact.peak_rss_bytes,
        "size_bytes": artifact.size_bytes,
    }


def _bars(
    spreads: Mapping[str, Spread], steps: Sequence[tuple[str, str, Artifact]], limit_bytes: float
) -> list[Bar]:
    kind, variant, artifact = max(steps, key=lambda step: step[2].peak_rss_bytes)
    limits = (
        ("second `enginesmith build --publish`", "rebuild", MAX_REBUILD_S),
        ("`enginesmith plan`", "plan", MAX_PLAN_S),
        ("`enginesmith --help`", "help", MAX_HELP_S),
    )
    timed = [
        bar_of_spread(name, spreads[command], relation="at most", limit=limit_s, unit=" s")
        for name, command, limit_s in limits
    ]
    largest = f"{kind} {variant}".strip()
    peak = Bar(
        f"largest peak memory of a step ({largest})",
        "at most",
        round(limit_bytes / 2**20),
        round(artifact.peak_rss_bytes / 2**20),
        " MiB",
    )
    return [*timed, peak]


def _show(figures: Mapping[str, Any], limit_bytes: float) -> None:
    print_table(
        "commands when nothing is to be done",
        ("command", "seconds"),
        [(name, str(spread)) for name, spread in figures["commands_s"].items()],
    )
    rows = [
        (
            f"{step['kind']} {step['variant'] or ''}",
            f"{step['duration_s']:.1f} s",
            str(bytes_text(step["peak_rss_bytes"])),
            f"{step['peak_rss_bytes'] / limit_bytes:.0%}",
            str(bytes_text(step["size_bytes"])),
        )
        for step in figures["steps"]
    ]
    rows.append(("all", f"{figures['steps_total_s']:.1f} s", "", "", ""))
    print_table("steps, as they ran", ("step", "duration", "peak memory", "of the limit", "artifact"), rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    given = parser.parse_args()
    return run_benchmark(lambda: measure(project_from(given)))


if __name__ == "__main__":
    sys.exit(main())
