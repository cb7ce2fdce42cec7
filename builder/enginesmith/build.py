"""Runs plans: every step that the store lacks, in a process of its own, each finished one committed at once.

Owns the order of work and what a failure means for the rest. ``runner`` runs a step, ``store`` keeps the result,
``console`` shows the events, ``report`` the outcome.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from enginesmith.engines.tensorrt.library import LIBRARIES
from enginesmith.engines.tensorrt_llm.toolchain import require_compiler
from enginesmith.errors import EnginesmithError, SourceError, ToolchainError
from enginesmith.graph_targets import TensorRtRtxTarget, TensorRtTarget
from enginesmith.plan import Plan, check_with_checkpoint
from enginesmith.plan_steps import MISSING_TOOL, Step
from enginesmith.platforms import TRITON_IMAGES
from enginesmith.records import remember_build, remember_root
from enginesmith.runner import DiskFullInWorkerError, Runner, StepRequest
from enginesmith.steps import STEP_KINDS, StepKind, StepName
from enginesmith.store import Artifact, ArtifactStore, Staging
from enginesmith.targets import TensorRtLlmTarget

EventState = Literal["cached", "started", "progress", "waiting", "built", "failed", "skipped"]


@dataclass(frozen=True)
class BuildEvent:
    """Something happened to a step. ``number`` counts finished steps of ``total``."""

    state: EventState
    step: Step
    number: int
    total: int
    fraction: float | None = None
    note: str = ""
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended. ``artifact`` is there when it is cached or built, ``error`` when it failed."""

    state: Literal["cached", "built", "failed", "skipped"]
    artifact: Artifact | None = None
    error: EnginesmithError | None = None


@dataclass(frozen=True)
class BuildResult:
    """Every step's outcome, by key."""

    outcomes: Mapping[str, Outcome]

    @property
    def artifacts(self) -> Mapping[str, Artifact]:
        """The artifacts that are there, by key."""
        return {
            key: outcome.artifact for key, outcome in self.outcomes.items() if outcome.artifact is not None
        }

    @property
    def errors(self) -> tuple[EnginesmithError, ...]:
        """What failed, in the order in which it did."""
        return tuple(outcome.error for outcome in self.outcomes.values() if outcome.error is not None)


def build(
    plans: Sequence[Plan],
    store: ArtifactStore,
    *,
    jobs: int = 1,
    keep_going: bool = False,
    kinds: Mapping[StepName, StepKind] = STEP_KINDS,
    on_event: Callable[[BuildEvent], None] = lambda _: None,
) -> BuildResult:
    """Run what is missing, ``jobs`` steps at a time; steps that plans share run once.

    Whatever ends a build, even ``kill -9``, the same call later resumes it. With ``keep_going`` a failed step only
    skips the steps that need it, and the errors are in the result.

    Raises:
        EnginesmithError: a step failed (without ``keep_going``), a tool or the GPU to compile engines with is
            missing, a spec does not fit its checkpoint.
        KeyboardInterrupt: after the workers have ended.
    """
    for plan in plans:
        _check_compilers(plan, store)
    for plan in plans:
        _remember_plan(plan, store)
    store.clean_staging()
    return _Build(plans, store, kinds=kinds, on_event=on_event).run(jobs=jobs, keep_going=keep_going)


class _Build:
    """One run of ``build``: which steps are done, and which can start."""

    def __init__(
        self,
        plans: Sequence[Plan],
        store: ArtifactStore,
        *,
        kinds: Mapping[StepName, StepKind],
        on_event: Callable[[BuildEvent], None],
    ) -> None:
        self._plans = plans
        self._store = store
        self._kinds = kinds
        self._on_event = on_event
        self._steps = {step.key: step for plan in plans for step in plan.steps}
        self._outcomes: dict[str, Outcome] = {}
        self._runner = Runner()
        self._event_guard = threading.Lock()

    def run(self, *, jobs: int, keep_going: bool) -> BuildResult:
        for key, step in self._steps.items():
            if (artifact := self._store.get(key)) is not None:
                self._settle(step, Outcome("cached", artifact))
        waiting = [step for key, step in self._steps.items() if key not in self._outcomes]
        _check_toolchain(waiting)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            try:
                self._run_waiting(waiting, pool, jobs=jobs, keep_going=keep_going)
            finally:
                # After success nothing runs any more; otherwise this ends what still does.
                self._runner.stop()
        return BuildResult(self._outcomes)

    def _run_waiting(
        self, waiting: list[Step], pool: ThreadPoolExecutor, *, jobs: int, keep_going: bool
    ) -> None:
        running: dict[Future[Outcome], Step] = {}
        while waiting or running:
            for step in [step for step in waiting if self._is_decided(step)]:
                if len(running) < jobs and self._is_ready(step):
                    waiting.remove(step)
                    self._emit("started", step)
                    running[pool.submit(self._make, step)] = step
                elif not self._is_ready(step):
                    waiting.remove(step)
                    self._settle(step, Outcome("skipped"))
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                step = running.pop(future)
                outcome = future.result()
                self._settle(step, outcome)
                if outcome.error is not None and not keep_going:
                    raise outcome.error

    def _is_decided(self, step: Step) -> bool:
        return all(key in self._outcomes for key in step.inputs.values())

    def _is_ready(self, step: Step) -> bool:
        return all(self._outcomes[key].artifact is not None for key in step.inputs.values())

    def _make(self, step: Step) -> Outcome:
        try:
            with self._store.staging(
                step.key, on_wait=lambda: self._emit("waiting", step), cancelled=lambda: self._runner.stopping
            ) as staging:
                if staging.existing is not None:
                    return Outcome("cached", staging.existing)
                return Outcome("built", self._run_step(step, staging))
        except EnginesmithError as error:
            return Outcome("failed", error=error)

    def _run_step(self, step: Step, staging: Staging) -> Artifact:
        request = StepRequest(
            title=title_of(step),
            function=self._kinds[step.kind].function,
            params=step.params,
            inputs={role: self._input(key).path for role, key in step.inputs.items()},
            out=staging.files,
            scratch=staging.scratch,
            file=staging.place / "request.json",
            log=self._store.log_path(step.key),
            online=_needs_network(step),
        )
        try:
            with self._store.disk_errors(f"running step {request.title}", needed=staging.files):
                run = self._runner.run(
                    request, lambda fraction, note: self._emit("progress", step, fraction=fraction, note=note)
                )
        except DiskFullInWorkerError as error:
            raise self._store.disk_full(f"step {request.title}, which", staging.files) from error
        return staging.commit(
            kind=step.kind,
            parts=step.parts,
            facts=run.facts,
            duration_s=run.duration_s,
            peak_rss_bytes=run.peak_rss_bytes,
        )

    def _input(self, key: str) -> Artifact:
        artifact = self._outcomes[key].artifact
        assert artifact is not None, "a step starts only when its inputs are there"
        return artifact

    def _settle(self, step: Step, outcome: Outcome) -> None:
        """Record how a step ended and tell everyone."""
        self._outcomes[step.key] = outcome
        note = outcome.error.message if outcome.error else ""
        self._emit(outcome.state, step, note=note, artifact=outcome.artifact)
        if outcome.artifact is None:
            return
        for plan in self._plans:
            for place in plan.steps:
                if place.key == step.key:
                    remember_build(
                        self._store,
                        spec_name=plan.spec.name,
                        place=place.place,
                        kind=place.kind,
                        parts=place.parts,
                    )
                    if place.kind == "fetch":
                        check_with_checkpoint(plan, self._store)

    def _emit(
        self,
        state: EventState,
        step: Step,
        *,
        fraction: float | None = None,
        note: str = "",
        artifact: Artifact | None = None,
    ) -> None:
        with self._event_guard:
            self._on_event(
                BuildEvent(
                    state,
                    step,
                    len(self._outcomes),
                    len(self._steps),
                    fraction=fraction,
                    note=note,
                    artifact=artifact,
                )
            )


def title_of(step: Step) -> str:
    """Kind and variant of a step, for people."""
    return f"{step.kind} {step.place}".rstrip()


def _remember_plan(plan: Plan, store: ArtifactStore) -> None:
    by_place: dict[str, tuple[str, ...]] = {}
    for step in plan.kept or plan.steps:
        by_place[step.place] = (*by_place.get(step.place, ()), step.key)
    spec = plan.spec
    of_targets = {f"{name}@{target.name}" for name in spec.variants for target in spec.targets_of(name)}
    remember_root(
        store,
        spec.name,
        spec_path=spec.path,
        places=by_place,
        all_places=frozenset({"", *spec.variants, *of_targets}),
    )


def _check_toolchain(steps: Sequence[Step]) -> None:
    missing = sorted(
        {tool for step in steps for tool, version in step.tools.items() if version == MISSING_TOOL}
    )
    if missing:
        extras = sorted({extra for tool in missing for extra in _extras_with(tool)})
        advice = (
            f"pip install 'enginesmith[{','.join(extras)}]'" if extras else f"pip install {' '.join(missing)}"
        )
        raise ToolchainError(
            f"this build needs {', '.join(missing)}, which this Python environment does not have", hint=advice
        )


def _check_compilers(plan: Plan, store: ArtifactStore) -> None:
    """Engines come last, hours may lie before them, and most machines cannot compile any: so it is asked first."""
    targets = {target.name: target for target in plan.spec.targets}
    for step in plan.steps:
        if step.kind not in ("compile", "compile_tensorrt") or store.get(step.key) is not None:
            continue
        target = targets[step.target or ""]
        if isinstance(target, TensorRtTarget | TensorRtRtxTarget):
            image = TRITON_IMAGES[target.toolchain] if isinstance(target, TensorRtTarget) else None
            capabilities = step.params["compute_capabilities"]
            LIBRARIES[target.runtime].require(step.params["version"], capabilities, image=image)
            continue
        if engine_dir := step.params["location"]["engine_dir"]:
            if not (Path(engine_dir) / "config.json").is_file():
                raise SourceError(
                    f"{engine_dir} holds no engines: config.json, which trtllm-build writes, is missing",
                    hint="give the directory that trtllm-build wrote with --output_dir",
                )
            continue
        assert isinstance(target, TensorRtLlmTarget), target
        require_compiler(target)


def _extras_with(distribution: str) -> list[str]:
    """The extras of enginesmith that bring ``distribution``."""
    extras = importlib.metadata.metadata("enginesmith").get_all("Provides-Extra") or []
    requirements = [Requirement(text) for text in importlib.metadata.requires("enginesmith") or []]
    return [
        extra
        for extra in extras
        for requirement in requirements
        if requirement.name == distribution
        and requirement.marker
        and requirement.marker.evaluate({"extra": extra})
    ]


def _needs_network(step: Step) -> bool:
    """Whether the step reads from the Hugging Face hub: a hub source, or a dataset that is not a local path."""
    calibration = step.params.get("calibration") or step.params
    corpus = calibration.get("corpus") or {}
    source = step.params.get("source") or {}
    return bool(source.get("hub")) or ("dataset" in corpus and "sha256" not in corpus)
