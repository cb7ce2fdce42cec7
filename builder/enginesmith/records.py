"""What the store remembers of plans: which artifacts each spec needs, and what each step was last made of.

``roots/`` keeps ``gc`` from removing what a spec still needs; ``history/`` lets ``plan --explain`` name what changed.
Written by ``build``, read by ``plan`` and ``gc``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.durable import write_json_atomically
from enginesmith.errors import StoreError
from enginesmith.store import ArtifactStore


@dataclass(frozen=True)
class Root:
    """The artifacts that the last plan of one spec needs."""

    name: str
    spec_path: str | None
    places: Mapping[str, tuple[str, ...]]
    """Keys by place: "" (shared by all variants), ``variant`` or ``variant@target``."""
    file: Path

    @property
    def keys(self) -> frozenset[str]:
        """Every key that this root keeps."""
        return frozenset(key for keys in self.places.values() for key in keys)


def remember_root(
    store: ArtifactStore,
    name: str,
    *,
    spec_path: Path | None,
    places: Mapping[str, tuple[str, ...]],
    all_places: frozenset[str],
) -> None:
    """Record what a plan needs. Variants and targets of the spec that this plan leaves out keep what they had."""
    place = hashlib.sha256(str(spec_path).encode()).hexdigest()[:8]
    file = store.root / "roots" / f"{name}-{place}.json"
    with store.lock("roots", timeout_s=-1), store.disk_errors("recording the plan"):
        known = _read_root(file).places if file.exists() else {}
        merged = {place: keys for place, keys in known.items() if place in all_places} | dict(places)
        document = {
            "name": name,
            "spec_path": None if spec_path is None else str(spec_path),
            "places": merged,
        }
        write_json_atomically(file, document)


def read_roots(store: ArtifactStore) -> tuple[Root, ...]:
    """Every recorded root.

    Raises:
        StoreError: one cannot be read; removing artifacts by the others alone could remove what it needs.
    """
    return tuple(_read_root(file) for file in sorted((store.root / "roots").glob("*.json")))


def remember_build(
    store: ArtifactStore, *, spec_name: str, place: str, kind: str, parts: Mapping[str, Any]
) -> None:
    """Record what the last finished step of this place in this spec was made of."""
    with store.disk_errors("recording a finished step"):
        write_json_atomically(_history_file(store, spec_name, place, kind), parts)


def last_build(store: ArtifactStore, *, spec_name: str, place: str, kind: str) -> Mapping[str, Any] | None:
    """The parts that ``remember_build`` recorded, or None."""
    try:
        document = json.loads(_history_file(store, spec_name, place, kind).read_bytes())
    except (OSError, ValueError):
        return None  # Only an explanation depends on it.
    return document if isinstance(document, dict) else None


def _history_file(store: ArtifactStore, spec_name: str, place: str, kind: str) -> Path:
    return store.root / "history" / spec_name / f"{kind}@{place}.json"


def _read_root(file: Path) -> Root:
    try:
        document = json.loads(file.read_bytes())
        places = {place: tuple(keys) for place, keys in document["places"].items()}
        return Root(document["name"], document["spec_path"], places, file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"cannot read {file}: {error}", hint="delete the file and build its spec again"
        ) from error
