"""Runs every benchmark, each in a process of its own, and records what they found.

Writes ``benchmarks/results/<name>.json`` (figures, bars, machine, versions, load before) and the table of bars in
``benchmarks/README.md``. A quick run, or one of chosen variants, records nothing. Exit status 1 when a script failed; a
bar that is missed is a result and no failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from figures import bar_cells, exit_status, print_table, say
from machine import load_average, machine, machine_cpu_s, stolen_share, versions
from releases import add_project_options

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
SCRIPTS = (
    "builds",
    "engines",
    "serving",
    "exactness",
    "rehearsal",
    "conversion",
    "encoders",
    "streaming",
    "cancellation",
    "resilience",
    "client",
    "agreement",
    "generator",
    "comparison",
)
APART = (
    "rehearsal",
    "conversion",
    "encoders",
    "resilience",
    "client",
    "agreement",
    "generator",
    "comparison",
)
"""Scripts with options of their own: run by name only, with what follows ``--`` on the command line."""
_BEGIN, _END = "<!-- results: written by run.py -->", "<!-- end of results -->"


def run_script(name: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The result of one benchmark with what it was measured on; None when it failed, its message is on stderr."""
    load = load_average()
    say(f"== {name} (load average {load[0]:.2f})")
    started, started_s, cpu_s = datetime.now(UTC), time.perf_counter(), machine_cpu_s()
    last = ""
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line
    if process.returncode != 0:
        say(f"{name} ended with status {process.returncode}")
        return None
    outcome: dict[str, Any] = json.loads(last)
    return outcome | {
        "date": started.isoformat(timespec="seconds"),
        "duration_s": round(time.perf_counter() - started_s, 1),
        "load_average_before": load,
        "stolen_cpu_share": round(stolen_share(cpu_s), 4),
        "machine": machine(),
        "versions": versions() | outcome.pop("programs"),
    }


def record(result: Mapping[str, Any]) -> None:
    """Keep a result under its benchmark's name."""
    path = RESULTS / f"{result['benchmark']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"recorded {path}")


def update_readme() -> None:
    """Replace the part of the README between the two marks by the bars of all recorded results."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    paths = [RESULTS / f"{name}.json" for name in SCRIPTS]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    parts = "\n".join(_section(result) for result in results)
    README.write_text(f"{before}{_BEGIN}\n\n{parts}\n{_END}{after}", encoding="utf-8")


def _section(result: Mapping[str, Any]) -> str:
    """One result as Markdown."""
    host = result["machine"]
    flags = ", ".join(host["cpu_flags"])
    load = result["load_average_before"][0]
    stolen = result.get("stolen_cpu_share")
    lines = [
        f"**{result['benchmark']}.py**, {result['date'][:10]}: {host['cores']} cores of {host['cpu']} ({flags}), "
        f"{host['memory_bytes'] / 2**30:.0f} GiB, Linux {host['kernel']}, load average before {load:.2f}"
        + (f", {stolen:.1%} of the CPU time taken by the hypervisor" if stolen is not None else ""),
        "",
        "| bar | measured (median) | runs | limit | verdict |",
        "|---|---:|---:|---:|---|",
        *(f"| {' | '.join(bar_cells(bar))} |" for bar in result["bars"]),
        "",
    ]
    return "\n".join(lines)


def _summary(results: Sequence[Mapping[str, Any]]) -> None:
    rows = [(result["benchmark"], *bar_cells(bar)) for result in results for bar in result["bars"]]
    print_table("all bars", ("benchmark", "bar", "measured", "runs", "limit", "verdict"), rows)


def run_all(given: argparse.Namespace) -> int:
    """Run the scripts in turn and record what they found; each builds what it lacks."""
    shared = ["--spec", str(given.spec), "--store", str(given.store), "--repository", str(given.repository)]
    shared += [part for variant in given.variant for part in ("--variant", variant)]
    shared += ["--quick"] if given.quick else []
    peer = [] if given.llama_python is None else ["--llama-python", str(given.llama_python)]
    results = []
    for name in SCRIPTS:
        if name not in (given.only or set(SCRIPTS) - set(APART)):
            continue
        options = given.options if name in APART else [*shared, *peer] if name == "engines" else shared
        result = run_script(name, options)
        if result is None:
            continue
        results.append(result)
        if not given.quick and not given.variant:
            record(result)
            update_readme()
    _summary(results)
    return 0 if len(results) == len(set(given.only or set(SCRIPTS) - set(APART))) else 1


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    parser.add_argument("--only", action="append", choices=SCRIPTS, help="only this benchmark; repeatable")
    parser.add_argument(
        "--llama-python",
        type=Path,
        metavar="PATH",
        help="a Python interpreter with llama-cpp-python, for the comparison",
    )
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTION ...", help=f"options of {' and '.join(APART)}"
    )
    given = parser.parse_args()
    return exit_status(lambda: run_all(given))


if __name__ == "__main__":
    sys.exit(main())
