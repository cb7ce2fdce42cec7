"""What tritonserver's Python backend keeps in shared memory: named after the process that starts the server, and removed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import psutil

_DIRECTORY = Path("/dev/shm")
_NAME = "enginesmith"


def new_prefix() -> str:
    """For the names of one server's segments (the backend's ``shm-region-prefix-name``)."""
    return f"{_NAME}-{os.getpid()}-{secrets.token_hex(4)}-"


def remove_segments(prefix: str) -> None:
    """Remove what a server that has ended left."""
    for segment in _DIRECTORY.glob(f"{prefix}*"):
        segment.unlink(missing_ok=True)


def remove_segments_of_the_dead() -> None:
    """Remove what servers left whose starters were killed: their own clean-up may have been cut short.

    Only names are removed. A server that still shuts down keeps what it has mapped.
    """
    for segment in _DIRECTORY.glob(f"{_NAME}-*-*"):
        starter = segment.name.split("-")[1]
        if starter.isdecimal() and not psutil.pid_exists(int(starter)):
            with contextlib.suppress(OSError):  # Somebody else's.
                segment.unlink(missing_ok=True)
