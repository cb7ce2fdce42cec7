"""From a spec to the steps that build it, each with a key that is known before it runs.

Owns the step graph and what enters each key. Pure: no torch, no network, no writing but the memory of file digests.
``build`` runs a plan; ``Plan.explain`` says what would run and why.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginesmith.checks import check_legal, read_hf_config
from enginesmith.digests import source_digest
from enginesmith.errors import SpecError
from enginesmith.explain import Explanation, explain_step, place_of
from enginesmith.legality import check_targets
from enginesmith.platforms import TOOLCHAINS
from enginesmith.spec import ModelSpec
from enginesmith.step_params import (
    compile_params,
    convert_params,
    deployment_params,
    fetch_params,
    package_params,
    quantize_params,
    reference_params,
    verify_params,
)
from enginesmith.steps import PACKAGES, STEP_KINDS, StepKind, StepName
from enginesmith.store import Artifact, ArtifactStore
from enginesmith.targets import LlmApiTarget, OnnxRuntimeTarget, Target, TensorRtLlmTarget

MISSING_TOOL = "missing"


@dataclass(frozen=True)
class Step:
    """One unit of work. ``variant`` is None for steps that all variants share."""

    kind: StepName
    variant: str | None
    target: str | None
    """The target's name for steps of runtimes other than ONNX Runtime, whose engine is every variant's twin."""
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Keys of the input artifacts, by role."""
    parts: Mapping[str, Any]
    """What the key is the digest of: kind, params, inputs, tools, code."""
    key: str

    @property
    def tools(self) -> Mapping[str, str]:
        """Versions of the distributions that will run it; ``MISSING_TOOL`` where one is not installed."""
        tools: Mapping[str, str] = self.parts["tools"]
        return tools

    @property
    def place(self) -> str:
        """Whose step it is: ``""`` (all variants), ``variant`` or ``variant@target``."""
        return place_of(self.variant, self.target)


@dataclass(frozen=True)
class Plan:
    """The steps of one spec, inputs before users."""

    spec: ModelSpec
    steps: tuple[Step, ...]
    kept: tuple[Step, ...] = ()
    """All steps of the chosen variants and targets; ``steps`` has fewer of them in a plan for one goal."""

    @property
    def deployments(self) -> tuple[tuple[str, str | None], ...]:
        """What can be published: variants, each with the target, or None for ONNX Runtime."""
        return tuple(
            (step.variant, step.target) for step in self.steps if step.kind in PACKAGES and step.variant
        )

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that this plan builds."""
        return tuple(dict.fromkeys(step.variant for step in self.steps if step.variant is not None))

    def step(self, kind: StepName, variant: str | None, target: str | None = None) -> Step:
        """The step of this kind for this variant and target."""
        wanted = (kind, variant, target)
        return next(step for step in self.steps if (step.kind, step.variant, step.target) == wanted)

    def steps_of(self, variant: str, target: str | None) -> tuple[Step, ...]:
        """The steps behind one deployment, the shared ones included."""
        return tuple(
            step for step in self.steps if step.variant in (None, variant) and step.target in (None, target)
        )

    def explain(self, store: ArtifactStore) -> tuple[Explanation, ...]:
        """For each step, in order: cached or not, and what changed since it was last built."""
        kinds = {step.key: step.kind for step in self.steps}
        return tuple(
            explain_step(
                store,
                spec_name=self.spec.name,
                variant=step.variant,
                target=step.target,
                kind=step.kind,
                key=step.key,
                parts=step.parts,
                input_kinds=kinds,
            )
            for step in self.steps
        )


def canonical_json(document: Any) -> str:
    """The one JSON text of a document: keys sorted, no spaces. Refuses NaN and infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def step_key(parts: Mapping[str, Any]) -> str:
    """The SHA-256 of everything that decides a step's result."""
    return hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


def make_plan(
    spec: ModelSpec,
    store: ArtifactStore,
    *,
    variants: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    goals: Collection[StepName] | None = None,
    server: str | None = None,
    engine_dir: str | None = None,
    kinds: Mapping[StepName, StepKind] = STEP_KINDS,
) -> Plan:
    """The steps that build ``variants`` of ``spec`` on ``targets`` (default: all), with their keys.

    Args:
        goals: plan only what steps of these kinds need.
        server: the tritonserver that rehearses the packages (None: the one that is found).
        engine_dir: TensorRT-LLM engines that were built elsewhere, for a plan of one deployment.

    Raises:
        SpecError: an unknown variant or target, or a combination that cannot be built, as far as that is known
            before fetching.
        SourceError: a local checkpoint or text file is missing.
    """
    chosen = list(spec.variants) if variants is None else list(dict.fromkeys(variants))
    if unknown := [name for name in chosen if name not in spec.variants]:
        raise SpecError(
            f"{spec.name} has no variant {', '.join(unknown)}; it has: {', '.join(spec.variants)}"
        )
    known = [target.name for target in spec.targets]
    if unknown := [name for name in targets or () if name not in known]:
        raise SpecError(f"{spec.name} has no target {', '.join(unknown)}; it has: {', '.join(known)}")
    check_targets(spec)  # What no checkpoint could make legal, before anything is looked up.
    steps = _Planner(spec, store, kinds, server=server, engine_dir=engine_dir).plan(chosen, targets)
    plan = Plan(spec, steps if goals is None else _needed_for(goals, steps), steps)
    if not plan.variants:
        raise SpecError(
            f"nothing to do: none of the targets {', '.join(targets or known)} builds variant {', '.join(chosen)}"
            + ("" if goals is None else f" with a step {' or '.join(sorted(goals))}"),
            hint="targets choose their variants with the key variants",
        )
    config = _config_at_hand(spec, store, plan.step("fetch", None).key)
    if config is not None:
        check_legal(spec, config)
    return plan


def _needed_for(goals: Collection[StepName], steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of these kinds and all that they need, in order."""
    needed: set[str] = set()
    for step in reversed(steps):
        if step.kind in goals or step.key in needed:
            needed.update((step.key, *step.inputs.values()))
    return tuple(step for step in steps if step.key in needed)


@dataclass(frozen=True)
class _Made:
    """Keys of what all targets of one variant share."""

    fetch: str
    checkpoint: str
    twin: str | None
    verdict: str | None

    def as_engine(self) -> Mapping[str, str]:
        """The twin as an input, where there is one."""
        return {} if self.twin is None else {"engine": self.twin}

    def as_verdict(self) -> Mapping[str, str]:
        """The gate's verdict as an input, where there is one."""
        return {} if self.verdict is None else {"verdict": self.verdict}


class _Planner:
    """Collects the steps of one plan; looks each tool and each module up once."""

    def __init__(
        self,
        spec: ModelSpec,
        store: ArtifactStore,
        kinds: Mapping[StepName, StepKind],
        *,
        server: str | None,
        engine_dir: str | None,
    ) -> None:
        self._spec = spec
        self._store = store
        self._kinds = kinds
        self._server = server
        self._engine_dir = engine_dir
        self._steps: list[Step] = []
        self._tool_versions: dict[str, str] = {}
        self._code_digests: dict[str, str] = {}

    def plan(self, variants: Sequence[str], targets: Sequence[str] | None) -> tuple[Step, ...]:
        """All steps of these variants on these targets (None: all), inputs before users."""
        spec = self._spec
        fetch = self._add("fetch", fetch_params(spec, self._store), {})
        baseline = None
        if spec.verify.twin:
            baseline = self._add(
                "reference", reference_params(spec, self._store), {"checkpoint": fetch, "tokenizer": fetch}
            )
        for name in variants:
            chosen = [target for target in spec.targets_of(name) if targets is None or target.name in targets]
            if chosen:
                made = self._add_variant(name, fetch, baseline)
                for target in chosen:
                    self._add_target(name, target, made)
        return tuple(self._steps)

    def _add_variant(self, name: str, fetch: str, baseline: str | None) -> _Made:
        """The steps that every target of a variant shares: its checkpoint, and its twin with the gate's verdict."""
        spec, variant, mode = self._spec, self._spec.variants[name], self._spec.twin.mode
        checkpoint, reference = fetch, baseline
        if variant.scheme != "none":
            params = quantize_params(spec, self._store, variant)
            checkpoint = self._add("quantize", params, {"checkpoint": fetch}, variant=name)
        if baseline is None:
            return _Made(fetch, checkpoint, twin=None, verdict=None)
        if variant.scheme != "none":
            reference = self._add(
                "reference",
                reference_params(spec, self._store),
                {"checkpoint": checkpoint, "tokenizer": fetch},
                variant=name,
            )
        assert reference is not None, "there is one where there is a baseline"
        engine = self._add("lower", {"mode": mode}, {"checkpoint": checkpoint}, variant=name)
        measurements = self._add(
            "measure",
            {"mode": mode, "probe_tokens": spec.verify.probe_tokens},
            {"engine": engine, "reference": reference, "baseline": baseline, "checkpoint": fetch},
            variant=name,
        )
        params = verify_params(spec, variant)
        verdict = self._add("verify", params, {"measurements": measurements}, variant=name)
        return _Made(fetch, checkpoint, twin=engine, verdict=verdict)

    def _add_target(self, name: str, target: Target, made: _Made) -> None:
        match target:
            case OnnxRuntimeTarget():
                self._add_onnxruntime(name, target, made)
            case TensorRtLlmTarget():
                self._add_tensorrt_llm(name, target, made)
            case LlmApiTarget():
                self._add_llmapi(name, target, made)

    def _add_onnxruntime(self, name: str, target: OnnxRuntimeTarget, made: _Made) -> None:
        assert made.twin is not None, "the spec demands a twin for this target"
        assert made.verdict is not None, "what has a twin is judged"
        package = self._add(
            "package",
            package_params(self._spec, name, target),
            {"engine": made.twin, "verdict": made.verdict, "checkpoint": made.fetch},
            variant=name,
        )
        params = {"model_name": self._spec.triton_name(name), "server": self._server}
        self._add("rehearse", params, {"package": package}, variant=name)

    def _add_tensorrt_llm(self, name: str, target: TensorRtLlmTarget, made: _Made) -> None:
        spec, place = self._spec, (name, target.name)
        convert = self._add("convert", convert_params(target), {"checkpoint": made.checkpoint}, place=place)
        deployment = deployment_params(spec, name, target)
        repository = self._add(
            "assemble", deployment, {"checkpoint": made.fetch, "converted": convert}, place=place
        )
        rehearsal = self._add(
            "rehearse_trtllm",
            {**deployment, "server": self._server},
            {"repository": repository, "checkpoint": made.fetch, **made.as_engine()},
            place=place,
        )
        version = TOOLCHAINS[target.toolchain].tensorrt_llm
        compile_ = compile_params(spec, target, self._store, version=version, engine_dir=self._engine_dir)
        engines = self._add(
            "compile", compile_, {"converted": convert, "checkpoint": made.fetch}, place=place
        )
        self._add(
            "package_trtllm",
            deployment,
            {"repository": repository, "engines": engines, "rehearsal": rehearsal, **made.as_verdict()},
            place=place,
        )

    def _add_llmapi(self, name: str, target: LlmApiTarget, made: _Made) -> None:
        deployment, place = deployment_params(self._spec, name, target), (name, target.name)
        package = self._add(
            "package_llmapi", deployment, {"checkpoint": made.checkpoint, **made.as_verdict()}, place=place
        )
        self._add(
            "rehearse_llmapi",
            {**deployment, "server": self._server},
            {"package": package, "checkpoint": made.fetch, **made.as_engine()},
            place=place,
        )

    def _add(
        self,
        kind: StepName,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        variant: str | None = None,
        place: tuple[str, str] | None = None,
    ) -> str:
        """Add a step of all variants, of one ``variant``, or of one variant on one target (``place``)."""
        name, target = place or (variant, None)
        step_kind = self._kinds[kind]
        parts = {
            "kind": kind,
            "params": {key: value for key, value in params.items() if key not in step_kind.unkeyed_params},
            "inputs": dict(inputs),
            "tools": {tool: self._tool_version(tool) for tool in step_kind.tools},
            "code": {module: self._code_digest(module) for module in step_kind.code},
        }
        step = Step(kind, name, target, params, inputs, parts, step_key(parts))
        self._steps.append(step)
        return step.key

    def _tool_version(self, tool: str) -> str:
        if tool not in self._tool_versions:
            try:
                self._tool_versions[tool] = importlib.metadata.version(tool)
            except importlib.metadata.PackageNotFoundError:
                self._tool_versions[tool] = MISSING_TOOL
        return self._tool_versions[tool]

    def _code_digest(self, module: str) -> str:
        if module not in self._code_digests:
            self._code_digests[module] = source_digest(module)
        return self._code_digests[module]


def _config_at_hand(spec: ModelSpec, store: ArtifactStore, fetch_key: str) -> dict[str, Any] | None:
    if spec.source.path is not None and (directory := spec.resolve(spec.source.path)).is_dir():
        return read_hf_config(directory)
    fetched = store.inspect(fetch_key)
    return read_hf_config(fetched.path) if isinstance(fetched, Artifact) else None
