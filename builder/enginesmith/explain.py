"""Why a step has to run: what its key is made of, compared with the last build at the same place in the same spec.

Knows the store and its records; changes neither. ``plan --explain`` prints the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from enginesmith.records import last_build
from enginesmith.store import Artifact, ArtifactStore, Damage

_ABSENT = object()


@dataclass(frozen=True)
class Explanation:
    """What would happen to one step. ``reasons`` is empty when it is cached."""

    kind: str
    variant: str | None
    target: str | None
    key: str
    cached: bool
    reasons: tuple[str, ...]

    @property
    def place(self) -> str:
        """Whose step it is: ``""`` (all variants), ``variant`` or ``variant@target``."""
        return place_of(self.variant, self.target)


def place_of(variant: str | None, target: str | None) -> str:
    """The place of a step in its spec: ``""`` (all variants), ``variant`` or ``variant@target``."""
    return (variant or "") + (f"@{target}" if target else "")


def explain_step(
    store: ArtifactStore,
    *,
    spec_name: str,
    variant: str | None,
    target: str | None,
    kind: str,
    key: str,
    parts: Mapping[str, Any],
    input_kinds: Mapping[str, str],
) -> Explanation:
    """Whether the step is cached, and else every reason why it will run. ``input_kinds``: kind of step by key."""
    found = store.inspect(key)
    if isinstance(found, Artifact):
        return Explanation(kind, variant, target, key, True, ())
    if isinstance(found, Damage):
        reasons = [f"the artifact is damaged: {found.reason}"]
    else:
        last = last_build(store, spec_name=spec_name, place=place_of(variant, target), kind=kind)
        if last is None:
            reasons = ["never built"]
        else:
            reasons = list(_differences(last, parts, input_kinds)) or [
                "the artifact is no longer in the store"
            ]
        if store.is_quarantined(key):
            reasons.append("an earlier artifact of this key was damaged and is in quarantine")
    return Explanation(kind, variant, target, key, False, tuple(reasons))


def _differences(
    last: Mapping[str, Any], now: Mapping[str, Any], input_kinds: Mapping[str, str]
) -> Iterator[str]:
    for path, before, after in _changes(last.get("params", {}), now["params"], "params"):
        yield f"{path}: {_shown(before)} → {_shown(after)}"
    for tool, before, after in _changes(last.get("tools", {}), now["tools"], ""):
        yield f"tool {tool} {_shown(before)} → {_shown(after)}"
    if changed := [module for module, _, _ in _changes(last.get("code", {}), now["code"], "")]:
        yield f"enginesmith's code of this step changed ({', '.join(changed)})"
    for role, _, after in _changes(last.get("inputs", {}), now["inputs"], ""):
        kind = input_kinds.get(after, role) if isinstance(after, str) else role
        yield f"input {kind} changed" + ("" if kind == role else f" ({role})")


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    """The leaves that differ, with their dotted path. A leaf that one side lacks is ``_ABSENT`` there."""
    for name in sorted({*before, *after}):
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        path = f"{prefix}.{name}" if prefix and not name.startswith("enginesmith.") else name
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, path)
        elif old != new:
            yield path, old, new


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:24]}..."
