"""Garbage collection: what the last plan of no spec needs leaves the store.

Knows the records of plans; ``store`` does the removing.
"""

from __future__ import annotations

from collections.abc import Sequence

from enginesmith.errors import StoreError
from enginesmith.records import read_roots
from enginesmith.store import ArtifactStore, GcReport


def collect_garbage(
    store: ArtifactStore, *, older_than_days: float = 0, forget: Sequence[str] = (), dry_run: bool = False
) -> GcReport:
    """Remove every artifact that no recorded plan needs; ``forget`` names specs whose plans no longer count.

    Raises:
        StoreError: there is no store, a record cannot be read, or ``forget`` names a spec that is not recorded.
    """
    if not store.root.is_dir():
        raise StoreError(
            f"there is no store at {store.root}", hint="name it with --store or ENGINESMITH_STORE"
        )
    with store.lock("roots", timeout_s=-1):
        roots = read_roots(store)
        names = sorted({root.name for root in roots})
        if unknown := sorted(set(forget) - set(names)):
            raise StoreError(
                f"the store has no plan of {', '.join(unknown)}; it has: {', '.join(names) or 'none'}",
                hint="give the name that stands in the spec",
            )
        keep = frozenset(key for root in roots if root.name not in forget for key in root.keys)
        report = store.gc(keep, older_than_days=older_than_days, dry_run=dry_run)
        for root in roots:
            if root.name in forget and not dry_run:
                root.file.unlink()
    return report
