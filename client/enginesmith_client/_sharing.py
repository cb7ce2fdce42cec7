"""Whether a transport uses shared memory. Apart from ``_shared_memory``, whose imports most clients do not need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enginesmith_client._settings import ConnectionSettings

if TYPE_CHECKING:
    from enginesmith_client._shared_memory import SharedMemory


def shared_memory_over(wire: Any, settings: ConnectionSettings) -> SharedMemory | None:
    """The shared memory that ``settings`` ask for, if they do; ``wire`` performs operations."""
    if settings.shared_memory_bytes is None:
        return None
    from enginesmith_client._shared_memory import SharedMemory

    return SharedMemory(wire, settings.shared_memory_bytes)
