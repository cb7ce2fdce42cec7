"""From a spec to the steps that build it, each with a key that is known before it runs.

Owns the plan as a whole. Pure: no torch, no network, no writing but the memory of file digests.
``build`` runs a plan; ``Plan.explain`` says what would run and why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginesmith.checks import check_legal, read_hf_config
from enginesmith.errors import SpecError
from enginesmith.explain import Explanation, explain_step
from enginesmith.graph_legality import check_graph_legal, check_graph_targets
from enginesmith.graph_spec import GraphSpec
from enginesmith.legality import check_targets
from enginesmith.plan_graph import GraphPlanner
from enginesmith.plan_llm import LlmPlanner
from enginesmith.plan_steps import Step, StepCollector
from enginesmith.spec_file import Spec
from enginesmith.steps import PACKAGES, STEP_KINDS, StepKind, StepName
from enginesmith.store import Artifact, ArtifactStore


@dataclass(frozen=True)
class Plan:
    """The steps of one spec, inputs before users."""

    spec: Spec
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


def make_plan(
    spec: Spec,
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
    collector = StepCollector(kinds)
    if isinstance(spec, GraphSpec):
        check_graph_targets(spec)
        propose = goals is not None and "sensitivity" in goals
        steps = GraphPlanner(spec, store, collector, server=server, propose=propose).plan(chosen, targets)
    else:
        check_targets(spec)  # What no checkpoint could make legal, before anything is looked up.
        steps = LlmPlanner(spec, store, collector, server=server, engine_dir=engine_dir).plan(chosen, targets)
    plan = Plan(spec, steps if goals is None else _needed_for(goals, steps), steps)
    if not plan.variants:
        raise SpecError(
            f"nothing to do: none of the targets {', '.join(targets or known)} builds variant {', '.join(chosen)}"
            + ("" if goals is None else f" with a step {' or '.join(sorted(goals))}"),
            hint="targets choose their variants with the key variants",
        )
    check_with_checkpoint(plan, store)
    return plan


def check_with_checkpoint(plan: Plan, store: ArtifactStore) -> None:
    """Return if the plan fits its checkpoint, or where that is not at hand yet.

    Raises:
        SpecError: a combination that cannot be built from this checkpoint.
        SourceError: the checkpoint's ``config.json`` cannot be read.
    """
    spec = plan.spec
    if not spec.source.is_checkpoint:
        return
    config = _config_at_hand(spec, store, plan.step("fetch", None).key)
    if config is None:
        return
    if isinstance(spec, GraphSpec):
        check_graph_legal(spec, config)
    else:
        check_legal(spec, config)


def _needed_for(goals: Collection[StepName], steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of these kinds and all that they need, in order."""
    needed: set[str] = set()
    for step in reversed(steps):
        if step.kind in goals or step.key in needed:
            needed.update((step.key, *step.inputs.values()))
    return tuple(step for step in steps if step.key in needed)


def _config_at_hand(spec: Spec, store: ArtifactStore, fetch_key: str) -> dict[str, Any] | None:
    if spec.source.path is not None and (directory := spec.resolve(spec.source.path)).is_dir():
        return read_hf_config(directory)
    fetched = store.inspect(fetch_key)
    return read_hf_config(fetched.path) if isinstance(fetched, Artifact) else None
