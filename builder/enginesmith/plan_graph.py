"""The step graph of a model that one ONNX graph computes: which steps its variants and targets need.

    fetch ─ sample ─ export ─┬─ [sensitivity] ─ quantize_graph ─ lower_graph ─ measure_graph ─ verify_graph     per variant
                             │                                       └─ package_graph ─ rehearse_graph          onnxruntime
                             └─ assemble_tensorrt ─ rehearse_tensorrt, compile_tensorrt ─ package_tensorrt      tensorrt, tensorrt_rtx

``lower_graph`` makes the ONNX Runtime engine for this CPU, the twin of every other runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginesmith.engines.tensorrt.library import LIBRARIES, MISSING
from enginesmith.graph_params import (
    export_params,
    package_params,
    quality_params,
    sample_params,
    scheme_params,
    tensorrt_params,
)
from enginesmith.graph_spec import GraphSpec
from enginesmith.graph_targets import GraphOnnxRuntimeTarget, GraphTarget, TensorRtRtxTarget, TensorRtTarget
from enginesmith.plan_steps import Step, StepCollector
from enginesmith.platforms import TRITON_IMAGES
from enginesmith.schemes import GRAPH_SCHEMES
from enginesmith.step_params import fetch_params
from enginesmith.store import ArtifactStore


@dataclass(frozen=True)
class _Shared:
    """Keys of what all variants share."""

    checkpoint: dict[str, str]
    """The fetched checkpoint as an input; empty for modules and ONNX files."""
    samples: str
    export: str
    baseline: str
    """The FP32 engine, which speed is compared with."""


@dataclass(frozen=True)
class _Made:
    """Keys of what all targets of one variant share."""

    graph: str
    twin: str
    verdict: str


class GraphPlanner:
    """Collects the steps of a graph spec."""

    def __init__(
        self,
        spec: GraphSpec,
        store: ArtifactStore,
        collector: StepCollector,
        *,
        server: str | None,
        propose: bool,
    ) -> None:
        """``propose`` adds the step that ranks layers also where no variant applies its proposal."""
        self._spec = spec
        self._store = store
        self._collector = collector
        self._add = collector.add
        self._server = server
        self._propose = propose

    def plan(self, variants: Sequence[str], targets: Sequence[str] | None) -> tuple[Step, ...]:
        """All steps of these variants on these targets (None: all), inputs before users."""
        shared = self._add_shared()
        for name in variants:
            chosen = [
                target for target in self._spec.targets_of(name) if targets is None or target.name in targets
            ]
            if chosen:
                made = self._add_variant(name, shared)
                for target in chosen:
                    self._add_target(name, target, shared, made)
        return self._collector.steps

    def _add_shared(self) -> _Shared:
        spec, store = self._spec, self._store
        checkpoint = {}
        if spec.source.is_checkpoint:
            checkpoint = {"checkpoint": self._add("fetch", fetch_params(spec, store, as_it_came=True), {})}
        params = sample_params(spec, store, spec.verify.samples, where="verify.samples")
        samples = self._add("sample", params, checkpoint)
        export = self._add("export", export_params(spec, store), {**checkpoint, "samples": samples})
        baseline = self._add("lower_graph", {"scheme": "none"}, {"graph": export})
        return _Shared(checkpoint, samples, export, baseline)

    def _add_variant(self, name: str, shared: _Shared) -> _Made:
        """The steps that every target of a variant shares: its graph, the twin, and the gate's verdict."""
        spec, variant = self._spec, self._spec.variants[name]
        graph, twin = shared.export, shared.baseline
        if variant.scheme != "none":
            graph = self._add_quantized(name, shared)
            twin = self._add("lower_graph", {"scheme": variant.scheme}, {"graph": graph}, variant=name)
        measurements = self._add(
            "measure_graph",
            {"task": spec.task, "scheme": variant.scheme},
            {"engine": twin, "baseline": shared.baseline, "samples": shared.samples, "export": shared.export},
            variant=name,
        )
        limits = {
            "export": spec.verify.export.model_dump(mode="json") if variant.scheme == "none" else None,
            "quality": quality_params(spec, variant),
        }
        params = {"scheme": variant.scheme, "variant": name, "limits": limits}
        verdict = self._add("verify_graph", params, {"measurements": measurements}, variant=name)
        return _Made(graph, twin, verdict)

    def _add_quantized(self, name: str, shared: _Shared) -> str:
        spec, variant = self._spec, self._spec.variants[name]
        params, inputs = scheme_params(variant), {"graph": shared.export}
        if GRAPH_SCHEMES[variant.scheme].calibrated:
            calibration = variant.calibration or spec.calibration
            samples = sample_params(spec, self._store, calibration, where="calibration")
            inputs["calibration"] = self._add("sample", samples, shared.checkpoint, variant=name)
            if variant.exclude == "auto" or self._propose:
                ranking = self._add(
                    "sensitivity",
                    {**params, "task": spec.task, "limits": quality_params(spec, variant)},
                    {**inputs, "samples": shared.samples},
                    variant=name,
                )
                if variant.exclude == "auto":
                    inputs["sensitivity"] = ranking
        return self._add("quantize_graph", params, inputs, variant=name)

    def _add_target(self, name: str, target: GraphTarget, shared: _Shared, made: _Made) -> None:
        params, place = package_params(self._spec, name, target), (name, target.name)
        parts = {
            **shared.checkpoint,
            "samples": shared.samples,
            "signature": shared.export,
            "verdict": made.verdict,
        }
        rehearsed = {"engine": made.twin, "samples": shared.samples, "signature": shared.export}
        if isinstance(target, GraphOnnxRuntimeTarget):
            # What a CPU runs is what was measured; a GPU's provider fuses Q/DQ itself, in its own way.
            engine = made.twin if target.provider == "cpu" else made.graph
            package = self._add("package_graph", params, {**parts, "engine": engine}, place=place)
            self._add(
                "rehearse_graph",
                {**params, "server": self._server},
                {**rehearsed, "package": package},
                place=place,
            )
            return
        repository = self._add("assemble_tensorrt", params, parts, place=place)
        rehearsal = self._add(
            "rehearse_tensorrt",
            {**params, "server": self._server},
            {**rehearsed, "package": repository},
            place=place,
        )
        compile_ = tensorrt_params(self._spec, target, self._store, version=_version_of(target))
        engine = self._add(
            "compile_tensorrt",
            compile_,
            {"graph": made.graph, "signature": shared.export, "samples": shared.samples},
            place=place,
        )
        self._add(
            "package_tensorrt",
            params,
            {"repository": repository, "engine": engine, "rehearsal": rehearsal, "verdict": made.verdict},
            place=place,
        )


def _version_of(target: TensorRtTarget | TensorRtRtxTarget) -> str:
    """The TensorRT that will build: the one in the server's image, where that is known, else the installed one."""
    known = TRITON_IMAGES[target.toolchain].tensorrt if isinstance(target, TensorRtTarget) else None
    return known or LIBRARIES[target.runtime].installed_version() or MISSING
