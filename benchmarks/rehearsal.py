"""How long the rehearsal of a TensorRT-LLM deployment takes, from an assembled repository to its report.

Brings everything that the rehearsal reads up to date first, by the command line; then runs the step itself, in a
process of its own as a build does, ``--rounds`` times. What comes before it is listed with what it took when it ran.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from figures import Bar, Outcome, Spread, bar_of_spread, print_table, run_benchmark, say, spread_of

from enginesmith.errors import OperatorError
from enginesmith.plan import Plan, make_plan
from enginesmith.plan_steps import Step
from enginesmith.runner import Runner, StepRequest
from enginesmith.spec_file import load_spec
from enginesmith.steps import REHEARSALS, STEP_KINDS
from enginesmith.store import Artifact, ArtifactStore

MAX_SECONDS = 180.0


def measure(given: argparse.Namespace) -> Outcome:
    """Run every rehearsal of the chosen targets."""
    command = [
        sys.executable,
        "-m",
        "enginesmith.cli",
        "--store",
        str(given.store),
        "rehearse",
        str(given.spec),
    ]
    targets = [part for target in given.target for part in ("--target", target)]
    if subprocess.run([*command, *targets], stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise OperatorError(
            "the rehearsal failed; its message is above", hint="the benchmark measures what passes"
        )
    store = ArtifactStore(given.store)
    plan = make_plan(load_spec(given.spec), store, targets=given.target or None, goals=REHEARSALS)
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    for step in plan.steps:
        if step.kind in REHEARSALS:
            seconds, facts = _rehearsed(step, store, rounds=given.rounds)
            figures[step.place] = {
                "seconds": asdict(seconds),
                "facts": facts,
                "before": _before(plan, step, store),
            }
            bars.append(
                bar_of_spread(
                    f"rehearsal of {step.place}", seconds, relation="at most", limit=MAX_SECONDS, unit=" s"
                )
            )
    return Outcome("rehearsal", {"spec": plan.spec.name, "rounds": given.rounds}, figures, bars)


def _rehearsed(step: Step, store: ArtifactStore, *, rounds: int) -> tuple[Spread, dict[str, Any]]:
    inputs = {role: _artifact(store, key).path for role, key in step.inputs.items()}
    seconds: list[float] = []
    facts: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        say(f"{step.place}: round {number}/{rounds}")
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as directory:
            place = Path(directory)
            for name in ("out", "scratch"):
                (place / name).mkdir()
            request = StepRequest(
                title=f"{step.kind} {step.place}",
                function=STEP_KINDS[step.kind].function,
                params=step.params,
                inputs=inputs,
                out=place / "out",
                scratch=place / "scratch",
                file=place / "request.json",
                log=place / "log",
                online=False,
            )
            run = Runner().run(request, lambda _fraction, _note: None)
        seconds.append(run.duration_s)
        facts = dict(run.facts)
    return spread_of(seconds), facts


def _before(plan: Plan, rehearsal: Step, store: ArtifactStore) -> dict[str, float]:
    """Seconds of the steps before the rehearsal, as they were when they ran."""
    steps = [
        step for step in plan.steps_of(rehearsal.variant or "", rehearsal.target) if step is not rehearsal
    ]
    taken = {f"{step.kind} {step.place}".strip(): _artifact(store, step.key).duration_s for step in steps}
    rows = [(name, f"{seconds:.1f} s") for name, seconds in taken.items()]
    print_table(f"before the rehearsal of {rehearsal.place}", ("step", "when it ran"), rows)
    return taken


def _artifact(store: ArtifactStore, key: str) -> Artifact:
    artifact = store.get(key)
    if artifact is None:
        raise OperatorError(
            f"the store lost {key[:12]} while it was measured", hint="run the benchmark again"
        )
    return artifact


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, default=Path("models/smollm2-135m-trtllm.yaml"), metavar="FILE")
    parser.add_argument("--store", type=Path, default=Path(".enginesmith"), metavar="DIR")
    parser.add_argument(
        "--target", action="append", default=[], metavar="NAME", help="repeatable; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    return run_benchmark(lambda: measure(given))


if __name__ == "__main__":
    sys.exit(main())
