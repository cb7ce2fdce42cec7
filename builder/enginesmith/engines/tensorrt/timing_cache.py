"""The timing cache in the store: what TensorRT measured of its kernels, kept between builds and shared by all of them.

A file is one line with the digest of the rest, then TensorRT's own bytes: TensorRT takes damaged ones for an empty cache
without a word. Files are replaced as a whole, so readers need no lock; writers take one, because each adds to what is there.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_HEADER = b"enginesmith timing cache 1 "

Combine = Callable[[bytes, bytes], bytes]
"""From two caches to one with the measurements of both."""


def read_timing_cache(path: Path) -> bytes:
    """TensorRT's bytes, empty where there is no file. A damaged one is deleted, with a warning on stderr."""
    try:
        header, _, payload = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return b""
    if header == _HEADER + _digest(payload):
        return payload
    sys.stderr.write(f"warning: the timing cache {path} is damaged; it is thrown away\n")
    path.unlink(missing_ok=True)
    return b""


def add_to_timing_cache(path: Path, fresh: bytes, combine: Combine) -> int:
    """Add what a build measured to the file, whatever other builders wrote meanwhile; its new size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        kept = read_timing_cache(path)
        payload = combine(fresh, kept) if kept else fresh
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_bytes(_HEADER + _digest(payload) + b"\n" + payload)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path.stat().st_size


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode("ascii")
