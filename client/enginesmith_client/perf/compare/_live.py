"""Compares two models, two versions or two servers while they run: in pairs of short runs, one right after the other.

Whatever changes slowly (a neighbour on the machine, its temperature, the caches) meets both sides of a pair, and in
half of the pairs, chosen by chance, B goes first. The number of rounds is fixed before the first is measured: looking at
intervals and measuring on until they please would make false verdicts likely.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError
from enginesmith_client.perf._profile import MeasurePart, OpenLoad, Profile
from enginesmith_client.perf._progress import OnProgress, ignore_progress
from enginesmith_client.perf._run_files import RUN_FILE, SavedRun
from enginesmith_client.perf._saved_files import Format, only_writer, read_document, write_document
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.compare._bootstrap import Estimator, PairedRatio
from enginesmith_client.perf.compare._comparison import (
    COMPARISON_FILE,
    CompareOptions,
    Comparison,
    load_comparison,
    save_comparison,
)
from enginesmith_client.perf.compare._saved import conclude, side_of
from enginesmith_client.perf.compare._verdicts import Values
from enginesmith_client.perf.many._many_runs import (
    RunProfile,
    complete_run_in,
    default_run,
    not_interrupted,
    part_of,
    unusable,
)

Order: TypeAlias = Literal["ab", "ba"]

MIN_ROUNDS = 6
"""Fewer pairs say too little about their own spread."""
DEFAULT_ROUNDS = 12
MAX_LEFT_OUT = 0.25
"""Of the pairs: with more that are void, so is the comparison."""
PLAN_FILE = "plan.json"
PLAN_FORMAT = Format("enginesmith-bench-comparison-plan")
_WARMUP_S = 0.5
_METHOD = "studentized bootstrap over the pairs of rounds, mean of log(B / A), symmetric"


def compare_live(
    target_a: Target,
    target_b: Target,
    profile: Profile,
    *,
    directory: Path,
    rounds: int = DEFAULT_ROUNDS,
    round_s: float | None = None,
    options: CompareOptions | None = None,
    on_progress: OnProgress = ignore_progress,
    run: RunProfile | None = None,
) -> Comparison:
    """B against A, measured in ``rounds`` pairs of runs after a warm-up of both; ``comparison.json`` and every run are kept.

    A comparison that was interrupted goes on in the same directory; a pair of which one half is missing is measured
    again. One that is finished there already is returned as it is.

    Args:
        round_s: the window of each run. Default: ``window_s`` of the profile. It should hold 30 requests at least.
        run: what makes a run. Default: ``run_profile``.

    Raises:
        ProfileError: too few rounds, or a profile that cannot be run in pairs.
        ResultsError: the directory holds another comparison, or something else is measuring into it.
        TritonClientError: a server or a model is not there, or stopped answering. The rounds so far are kept.
        KeyboardInterrupt: a round was interrupted. The rounds so far are kept.
    """
    options = options or CompareOptions()
    _check(target_a, target_b, profile, rounds)
    order = random_order(rounds, seed=options.seed)
    of_round = _round_profile(profile, round_s or profile.measure.window_s)
    with only_writer(directory, results_file=COMPARISON_FILE):
        if not _planned(directory, _plan(target_a, target_b, of_round, order, options)):
            return load_comparison(directory)
        rounds_of = _Rounds(target_a, target_b, directory, on_progress, run or default_run(), 2 * rounds + 2)
        warm = rounds_of.warm_up(of_round)
        of_round = _at_rate_of(warm, of_round)
        pairs = [rounds_of.pair(number, first, of_round) for number, first in enumerate(order, start=1)]
        comparison = dataclasses.replace(
            _concluded(pairs, options, _server_warnings(target_a, target_b)),
            profile=profile.as_kept(),
            rounds=rounds,
            order=order,
            left_out=_left_out(pairs),
        )
        save_comparison(directory, comparison)
    return comparison


def random_order(rounds: int, *, seed: int) -> tuple[Order, ...]:
    """Which side goes first in each pair: A in one half of them and B in the other, shuffled."""
    halves: list[Order] = ["ab" if number % 2 == 0 else "ba" for number in range(rounds)]
    return tuple(halves[position] for position in np.random.default_rng(seed).permutation(rounds))


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """Makes the runs of one comparison."""

    target_a: Target
    target_b: Target
    directory: Path
    on_progress: OnProgress
    run: RunProfile
    count: int

    def warm_up(self, profile: Profile) -> SavedRun:
        """One run of each that is not used; returns that of A."""
        warm = self._one("warmup-a", self.target_a, profile, part=1, reuse=True)
        self._one("warmup-b", self.target_b, _at_rate_of(warm, profile), part=2, reuse=True)
        return warm

    def pair(self, number: int, order: Order, profile: Profile) -> tuple[SavedRun, SavedRun]:
        """The runs of A and B, which were made one right after the other.

        Both get the same requests at the same times, and every pair others: what chance does to one, it does to both.
        """
        profile = profile.model_copy(update={"seed": profile.seed + number})
        reuse = all(complete_run_in(self.directory / _name(number, side)) for side in order)
        done = {
            side: self._one(
                _name(number, side),
                self.target_a if side == "a" else self.target_b,
                profile,
                part=2 * number + position,
                reuse=reuse,
            )
            for position, side in enumerate(order, start=1)
        }
        return done["a"], done["b"]

    def _one(self, name: str, target: Target, profile: Profile, *, part: int, reuse: bool) -> SavedRun:
        directory = self.directory / name
        if not reuse:
            (directory / RUN_FILE).unlink(missing_ok=True)
        saved = self.run(
            target,
            profile,
            directory=directory,
            title=f"{name.replace('-', ' ')}: {target.model}",
            on_progress=part_of(self.on_progress, part, self.count),
            reuse=reuse,
        )
        return not_interrupted(saved)


def _name(number: int, side: str) -> str:
    return f"round-{number:02}-{side}"


def require_rounds(rounds: int) -> None:
    """Raise ``ProfileError`` for fewer rounds than a verdict needs."""
    if rounds < MIN_ROUNDS:
        raise ProfileError(f"a comparison needs at least {MIN_ROUNDS} rounds; seen: {rounds}")


def _check(target_a: Target, target_b: Target, profile: Profile, rounds: int) -> None:
    require_rounds(rounds)
    same_model = (target_a.url, target_a.model) == (target_b.url, target_b.model)
    if profile.start == "cold" and same_model:
        raise ProfileError(
            "two versions of one model cannot be compared with `start: cold`: unloading one unloads the other",
            hint="serve them as two models, or on two servers",
        )


def _round_profile(profile: Profile, round_s: float) -> Profile:
    """The same load in one window of ``round_s``, after a warm-up that is short because the models are warm."""
    measure = profile.measure.model_dump() | {
        "window_s": round_s,
        "windows": 1,
        "max_s": 2 * round_s,
        "warmup_s": min(profile.measure.warmup_s, _WARMUP_S),
    }
    return profile.model_copy(update={"measure": MeasurePart.model_validate(measure)})


def _at_rate_of(warm: SavedRun, profile: Profile) -> Profile:
    """Both sides get the same load: a rate that is a multiple of the capacity becomes that of A, in requests per second."""
    load = profile.load
    if not isinstance(load, OpenLoad) or load.capacity_factor is None:
        return profile
    capacity_per_s = warm.run.workload.get("capacity_per_s")
    if not capacity_per_s:
        raise MeasurementError(f"the capacity of {warm.run.model} was not measured, so no rate is known")
    rate_per_s = float(capacity_per_s) * load.capacity_factor
    fixed = OpenLoad.model_validate(load.model_dump() | {"rate_per_s": rate_per_s, "capacity_factor": None})
    return profile.model_copy(update={"load": fixed})


def _plan(
    target_a: Target, target_b: Target, profile: Profile, order: Sequence[Order], options: CompareOptions
) -> dict[str, Any]:
    """What makes two comparisons the same one."""
    targets = [[target.url, target.model, target.version] for target in (target_a, target_b)]
    digest = hashlib.sha256(json.dumps(profile.as_json(), sort_keys=True).encode()).hexdigest()
    return {
        "targets": targets,
        "profile_digest": digest,
        "order": list(order),
        "options": dataclasses.asdict(options),
    }


def _planned(directory: Path, plan: dict[str, Any]) -> bool:
    """Whether anything is left to be measured for ``plan``.

    Raises:
        ResultsError: the directory holds a comparison of another plan.
    """
    path = directory / PLAN_FILE
    if not path.exists():
        write_document(path, PLAN_FORMAT, plan)
        return True
    there = read_document(path, PLAN_FORMAT)
    if there != plan:
        changed = ", ".join(key for key in plan if there.get(key) != plan[key])
        raise ResultsError(
            f"{directory} holds a comparison with other {changed}",
            hint="give a new directory; rounds that are added after a look at the result would make false verdicts likely",
        )
    return not (directory / COMPARISON_FILE).exists()


def _concluded(
    pairs: Sequence[tuple[SavedRun, SavedRun]], options: CompareOptions, warnings: Sequence[str]
) -> Comparison:
    left_out = _left_out(pairs)
    used = [pair for number, pair in enumerate(pairs, start=1) if number not in left_out]
    reasons = [f"round {number}: {reason}" for number, reason in left_out.items()]
    too_many = len(left_out) > MAX_LEFT_OUT * len(pairs) or len(used) < MIN_ROUNDS

    def estimator(item: Values) -> Estimator:
        return PairedRatio(item.a, item.b, seed=options.seed, resamples=options.resamples)

    shown = pairs if too_many else used
    return conclude(
        [a for a, _ in shown],
        [b for _, b in shown],
        sides=(side_of([a for a, _ in pairs]), side_of([b for _, b in pairs])),
        estimator=estimator,
        options=options,
        kind="live",
        method=_METHOD,
        warnings=[*warnings, *([] if too_many else [f"left out, {reason}" for reason in reasons])],
        void=[f"{len(left_out)} of {len(pairs)} rounds are void; {reasons[0]}", *reasons[1:]]
        if too_many
        else [],
        repeats=(len(pairs), "rounds"),
    )


def _left_out(pairs: Sequence[tuple[SavedRun, SavedRun]]) -> dict[int, str]:
    found = {}
    for number, pair in enumerate(pairs, start=1):
        reasons = [
            f"{side}: {words}" for side, saved in zip("AB", pair, strict=True) if (words := unusable(saved))
        ]
        if reasons:
            found[number] = "; ".join(reasons)
    return found


def _server_warnings(target_a: Target, target_b: Target) -> list[str]:
    if target_a.url == target_b.url:
        return []
    return [
        f"A and B are on two servers ({target_a.url}, {target_b.url}): what differs between these is part of the result"
    ]
