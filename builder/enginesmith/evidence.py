"""What is known of one packaged variant: how it was made, what was measured, what judged it.

Travels with a publication, so that whoever serves the model can see why it was let through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from enginesmith import __version__
from enginesmith.errors import StoreError
from enginesmith.plan import Plan
from enginesmith.steps import REHEARSALS
from enginesmith.store import Artifact


def evidence_of(
    plan: Plan, variant: str, target: str | None, *, artifacts: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Plain JSON: keys, parameters, tools and facts of every step behind ``variant``, and the ``rehearsal`` itself.

    Raises:
        StoreError: the rehearsal cannot be read.
    """
    steps = plan.steps_of(variant, target)
    rehearse = next(step for step in steps if step.kind in REHEARSALS and step.target == target)
    rehearsal = artifacts[rehearse.key].path / "rehearsal.json"
    try:
        rehearsed = json.loads(rehearsal.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {rehearsal}: {error}", hint="build again") from error
    return {
        "enginesmith": __version__,
        "spec": plan.spec.name,
        "variant": variant,
        "target": target,
        "scheme": plan.spec.variants[variant].scheme,
        "rehearsal": rehearsed,
        "steps": {
            step.kind if step.variant else f"shared {step.kind}": {
                "key": step.key,
                "params": dict(step.parts["params"]),
                "tools": dict(step.tools),
                "facts": dict(artifacts[step.key].facts),
                "created_unix_s": artifacts[step.key].created_unix_s,
                "duration_s": artifacts[step.key].duration_s,
            }
            for step in steps
            if step.key in artifacts
        },
    }
