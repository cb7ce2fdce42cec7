"""Puts immutable files in a second place without copying them where the file system allows it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from enginesmith.digests import file_digest

# Another file system, one without hard links, another user's file, or too many links to it.
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.EMLINK})
_COPY_CHUNK_BYTES = 1 << 22


def place_file(source: Path, target: Path) -> None:
    """Make ``target`` the same bytes as ``source``: a hard link, else a read-only copy that is on disk.

    ``target`` must not exist.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        with source.open("rb") as old, target.open("xb") as new:
            shutil.copyfileobj(old, new, _COPY_CHUNK_BYTES)
            new.flush()
            os.fsync(new.fileno())
        target.chmod(0o444)


def place_tree(source: Path, target: Path) -> None:
    """``place_file`` for every file below ``source``, in a new directory ``target``."""
    target.mkdir()
    for file in tree_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place_file(file, place)


def tree_files(directory: Path) -> Iterator[Path]:
    """Every file below ``directory`` in a fixed order, without what Python compiles beside its sources."""
    for path in sorted(directory.rglob("*")):
        if "__pycache__" not in path.parts and not path.is_dir():
            yield path


def tree_contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file below ``directory``, by relative path."""
    return {file.relative_to(directory).as_posix(): file_digest(file) for file in tree_files(directory)}


def contents_digest(contents: Mapping[str, str]) -> str:
    """One SHA-256 for a whole tree: over the canonical JSON of ``tree_contents``."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
