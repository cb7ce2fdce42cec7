"""What of a spec can be built and served, but probably not as its author hopes. ``plan`` and ``build`` say it; nothing refuses it."""

from __future__ import annotations

from enginesmith.graph_spec import GraphSpec
from enginesmith.spec_file import Spec

QUEUE_POLICY = (
    "serving.dynamic_batching.queue_policy with serving.instances 1: tritonserver 2.51 then lets some requests wait 500 ms "
    "(docs/graph-serving.md, Batches); leave queue_policy out, or set serving.instances to 2"
)


def advice(spec: Spec) -> tuple[str, ...]:
    """A sentence for each thing that ``spec`` should rather not ask for; each says what to write instead."""
    return (QUEUE_POLICY,) if _waits_for_its_only_instance(spec) else ()


def _waits_for_its_only_instance(spec: Spec) -> bool:
    """Whether tritonserver hands out requests only when the instance is free, and sometimes forgets to look whether it is."""
    if not isinstance(spec, GraphSpec) or spec.serving.instances > 1:
        return False
    batching = spec.serving.dynamic_batching
    return batching is not None and batching.queue_policy.says_anything
