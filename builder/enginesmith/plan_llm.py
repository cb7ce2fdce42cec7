"""The step graph of a text-generation model: which steps its variants and targets need, and what each reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from enginesmith.plan_steps import Step, StepCollector
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
from enginesmith.store import ArtifactStore
from enginesmith.targets import LlmApiTarget, OnnxRuntimeTarget, Target, TensorRtLlmTarget


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


class LlmPlanner:
    """Collects the steps of a spec of task text-generation."""

    def __init__(
        self,
        spec: ModelSpec,
        store: ArtifactStore,
        collector: StepCollector,
        *,
        server: str | None,
        engine_dir: str | None,
    ) -> None:
        self._spec = spec
        self._store = store
        self._collector = collector
        self._add = collector.add
        self._server = server
        self._engine_dir = engine_dir

    def plan(self, variants: Sequence[str], targets: Sequence[str] | None) -> tuple[Step, ...]:
        """All steps of these variants on these targets (None: all), inputs before users."""
        spec = self._spec
        fetch = self._add("fetch", fetch_params(spec, self._store, as_it_came=not spec.verify.twin), {})
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
        return self._collector.steps

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
