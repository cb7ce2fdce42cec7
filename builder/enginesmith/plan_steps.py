"""A step of a plan and its key: the digest of everything that decides the step's result.

Knows how a key is made, not which steps there are; ``enginesmith.plan_llm`` and ``enginesmith.plan_graph`` know that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enginesmith.digests import source_digest
from enginesmith.explain import place_of
from enginesmith.steps import StepKind, StepName

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


def canonical_json(document: Any) -> str:
    """The one JSON text of a document: keys sorted, no spaces. Refuses NaN and infinity."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def step_key(parts: Mapping[str, Any]) -> str:
    """The SHA-256 of everything that decides a step's result."""
    return hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogatepass")).hexdigest()


class StepCollector:
    """Collects the steps of one plan; looks each tool and each module up once."""

    def __init__(self, kinds: Mapping[StepName, StepKind]) -> None:
        self._kinds = kinds
        self._steps: list[Step] = []
        self._tool_versions: dict[str, str] = {}
        self._code_digests: dict[str, str] = {}

    @property
    def steps(self) -> tuple[Step, ...]:
        """What was added, inputs before users."""
        return tuple(self._steps)

    def add(
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
