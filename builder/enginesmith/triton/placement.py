"""Puts immutable files in a second place without copying them where the file system allows it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Another file system, one without hard links, another user's file, or too many links to it.
_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.EMLINK})


def place_file(source: Path, target: Path) -> None:
    """Make ``target`` the same bytes as ``source``: a hard link, else a flushed copy. ``target`` must not exist."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)
        flush(target)


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


def flush(path: Path) -> None:
    """Return when the file or directory at ``path`` is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
