"""The arguments that give a tritonserver a response cache, where a model of its repository asks for one.

A model asks with ``response_cache.enable``; a server without ``--cache-config`` ignores that silently.
"""

from __future__ import annotations

from pathlib import Path

from enginesmith.errors import SourceError
from enginesmith.triton.config import parse_config
from enginesmith.triton.installation import ServerInstallation

DEFAULT_CACHE_BYTES = 64 << 20


def cache_bytes_for(repository: Path, wanted_bytes: int | None = None) -> int:
    """``wanted_bytes``; where it is None, the default if a model of ``repository`` asks for a cache, else 0."""
    if wanted_bytes is not None:
        return wanted_bytes
    return DEFAULT_CACHE_BYTES if any(map(_asks, sorted(repository.glob("*/config.pbtxt")))) else 0


def _asks(path: Path) -> bool:
    try:
        config = parse_config(path.read_text(encoding="utf-8"), origin=str(path))
    except (SourceError, OSError, UnicodeDecodeError):
        # The server will say what is wrong with it, or it is newer than our message.
        return False
    return bool(config.response_cache.enable)


def cache_arguments(size_bytes: int, installation: ServerInstallation | None = None) -> tuple[str, ...]:
    """Arguments of tritonserver for a local cache of ``size_bytes``; none for 0."""
    if not size_bytes:
        return ()
    directory = installation.cache_directory if installation else None
    where = (f"--cache-directory={directory}",) if directory else ()
    return (f"--cache-config=local,size={size_bytes}", *where)
