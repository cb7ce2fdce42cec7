"""SHA-256 of files, trees and enginesmith's own source, remembered so that planning stays fast.

Owns how bytes on disk become digests. Knows nothing of steps or artifacts. ``plan`` and ``store`` build on it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from enginesmith.errors import SourceError, StoreError, ToolchainError

_CHUNK_BYTES = 1 << 22
# A file written this recently may be written again within the same time stamp, unseen.
_RACY_WINDOW_S = 2.0


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(directory: Path, digests: FileDigests | None = None) -> str:
    """The SHA-256 of a directory's relative paths and contents.

    ``__pycache__`` and names that begin with a dot do not count. Links to files count as the file.

    Raises:
        SourceError: the tree holds a link to a directory or a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(_files_below(directory), key=lambda path: path.relative_to(directory).as_posix()):
        try:
            content = digests.digest(path) if digests else file_digest(path)
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        digest.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def source_digest(module: str) -> str:
    """The SHA-256 of a module's file or of a package's whole directory, found without importing it.

    Raises:
        ToolchainError: there is no such module.
    """
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is not None and found.submodule_search_locations:
        for location in found.submodule_search_locations:
            base = Path(location, *rest)
            if base.is_dir():
                return tree_digest(base)
            if rest and base.with_suffix(".py").is_file():
                return file_digest(base.with_suffix(".py"))
    elif found is not None and found.origin and not rest:
        return file_digest(Path(found.origin))
    raise ToolchainError(
        f"the source of {module} was not found", hint=f"install {top} again: its files are incomplete"
    )


def _files_below(directory: Path) -> Iterator[Path]:
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__" and not name.startswith(".")]
        for name in directories:
            if (link := Path(parent, name)).is_symlink():
                raise SourceError(
                    f"{link} is a link to a directory, which is not followed",
                    hint="copy the directory's files there",
                )
        for name in names:
            if not name.startswith("."):
                yield Path(parent, name)


class FileDigests:
    """A memory of file digests by (path, size, mtime, inode), shared by processes through one SQLite file.

    Safe to use from several threads. Losing the file costs time only.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._guard = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def digest(self, path: Path) -> str:
        """The SHA-256 of the file at ``path``; read only if it is unknown or has changed since."""
        path = path.absolute()
        before = path.stat()
        known = self.remembered(path, before)
        if known is not None:
            return known
        digest = file_digest(path)
        after = path.stat()
        settled = time.time() - after.st_mtime > _RACY_WINDOW_S
        if settled and _identity(before) == _identity(after):
            self.remember(path, digest)
        return digest

    def remembered(self, path: Path, status: os.stat_result) -> str | None:
        """The remembered digest of ``path`` in exactly this state, without reading the file."""
        row = self._execute(
            "SELECT sha256 FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?",
            str(path),
            *_identity(status),
        )
        return row[0] if row else None

    def remember(self, path: Path, digest: str) -> None:
        """Record that ``path`` as it is now has this digest."""
        identity = _identity(path.stat())
        self._execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", str(path), *identity, digest)

    def close(self) -> None:
        """Close the database; a later use opens it again."""
        with self._guard:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> FileDigests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _execute(self, statement: str, *values: Any) -> Any:
        try:
            with self._guard:
                if self._connection is None:
                    self._connection = self._open()
                return self._connection.execute(statement, values).fetchone()
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
                return None  # Nothing is lost but time: the next reader hashes the file again.
            raise StoreError(
                f"the memory of file digests {self._database} cannot be used: {error}",
                hint="delete that file; it is made anew",
            ) from error

    def _open(self) -> sqlite3.Connection:
        try:
            self._database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the store {self._database.parent}: {error.strerror}",
                hint="choose another with --store",
            ) from error
        connection = sqlite3.connect(
            self._database, timeout=60, isolation_level=None, check_same_thread=False
        )
        connection.execute(
            "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode TEXT, sha256 TEXT) WITHOUT ROWID"
        )
        return connection


def _identity(status: os.stat_result) -> tuple[int, int, str]:
    # Inode numbers may exceed the 63 bits of an SQLite integer.
    return status.st_size, status.st_mtime_ns, str(status.st_ino)
