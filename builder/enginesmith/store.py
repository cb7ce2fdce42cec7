"""The artifact store: finished steps, by key, immutable and verified when read.

    artifacts/<aa>/<key>/   manifest.json and files/, read-only, moved into place by one rename
    staging/<key>.<random>/ a step in the making; gone when its builder is
    locks/<key>.lock        held while a key is staged, so that two builders never make one step twice
    quarantine/             entries that were found damaged
    logs/, roots/, history/ what steps printed, what gc must keep, what `plan --explain` compares with

Knows nothing of what the steps do. ``build`` writes here, ``plan`` only looks.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from enginesmith.digests import FileDigests, file_digest
from enginesmith.durable import fsync_directory, write_durably
from enginesmith.errors import StoreError

_LOCK_POLL_S = 0.05
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FREE_SPACE_HINT = "free some space (`enginesmith gc` removes what no spec needs) and run the same command again: finished steps are kept"


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A finished step. ``path`` holds its files: read only."""

    key: str
    kind: str
    path: Path
    parts: Mapping[str, Any]
    """What the key was made of."""
    facts: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    created_unix_s: float
    duration_s: float
    peak_rss_bytes: int

    @property
    def size_bytes(self) -> int:
        """The bytes of all files together."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True)
class Damage:
    """An entry whose bytes are not those that were committed. ``reason`` names the file."""

    key: str
    entry: Path
    reason: str


@dataclass(frozen=True)
class GcReport:
    """What a collection removed, or would remove."""

    removed: tuple[str, ...]
    freed_bytes: int
    kept: int
    busy: tuple[str, ...]
    """Unreferenced, but a builder is working on them."""


class ArtifactStore:
    """The store in directory ``root``; made on first use. ``warn`` gets one line for each damaged entry."""

    def __init__(self, root: Path, *, warn: Callable[[str], None] = lambda _: None) -> None:
        self.root = root.absolute()
        self.digests = FileDigests(self.root / "digests.sqlite")
        self._warn = warn

    def inspect(self, key: str, *, verify: Literal["quick", "full"] = "quick") -> Artifact | Damage | None:
        """The artifact, what is wrong with it, or None where there is none. Changes nothing.

        ``quick`` compares sizes and remembered digests; ``full`` reads every byte.
        """
        entry = self.entry(key)
        try:
            document = json.loads((entry / "manifest.json").read_bytes())
            artifact = _artifact_from_manifest(document, entry)
        except FileNotFoundError:
            return Damage(key, entry, f"{entry / 'manifest.json'} is missing") if entry.exists() else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Damage(key, entry, f"{entry / 'manifest.json'} cannot be read: {error}")
        if artifact.key != key:
            return Damage(
                key, entry, f"{entry / 'manifest.json'} is that of another key, {artifact.key[:12]}"
            )
        reason = self._difference(artifact, verify)
        return Damage(key, entry, reason) if reason else artifact

    def get(self, key: str, *, verify: Literal["quick", "full"] = "quick") -> Artifact | None:
        """The artifact of ``key``, or None. A damaged entry is quarantined, reported, and counts as missing."""
        found = self.inspect(key, verify=verify)
        if isinstance(found, Damage):
            try:
                with self.lock(key, timeout_s=0):
                    return self._get_locked(key, verify)
            except Timeout:
                return None  # A builder holds it, and will look at the entry itself.
        return found

    @contextmanager
    def staging(
        self,
        key: str,
        *,
        on_wait: Callable[[], None] = lambda: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Staging]:
        """A place to make ``key``, under its lock. Whatever is not committed is removed.

        Waits while another builder makes the same key (``on_wait`` is called once); look at ``existing`` first.

        Raises:
            filelock.Timeout: ``cancelled`` became true while waiting.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self.lock(key, timeout_s=0))
                busy = False
            except Timeout:
                busy = True
            if busy:
                on_wait()
                stack.enter_context(self.lock(key, timeout_s=-1, cancelled=cancelled))
            for stale in (self.root / "staging").glob(f"{key}.*"):
                shutil.rmtree(stale, ignore_errors=True)
            place = self.root / "staging" / f"{key}.{secrets.token_hex(4)}"
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            with self.disk_errors("starting a step"):
                for name in ("entry/files", "scratch"):
                    (place / name).mkdir(parents=True)
            yield Staging(self, key, place, self._get_locked(key, "quick"))

    @contextmanager
    def lock(
        self, key: str, *, timeout_s: float, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Hold the lock of ``key`` against every other thread and process.

        Raises:
            filelock.Timeout: it was not free within ``timeout_s`` (-1: forever), or ``cancelled`` became true.
        """
        with self.disk_errors("locking the store"):
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "locks" / f"{key}.lock")
            lock.acquire(timeout=timeout_s, poll_interval=_LOCK_POLL_S, cancel_check=cancelled)
        try:
            yield
        finally:
            lock.release()

    def clean_staging(self) -> None:
        """Remove what killed builders left in staging; what a living one works on stays."""
        with suppress(FileNotFoundError):
            for place in list((self.root / "staging").iterdir()):
                with suppress(Timeout), self.lock(place.name.split(".")[0], timeout_s=0):
                    shutil.rmtree(place, ignore_errors=True)

    def gc(
        self, keep_keys: Collection[str], *, older_than_days: float = 0, dry_run: bool = False
    ) -> GcReport:
        """Remove every artifact whose key is not in ``keep_keys``, and quarantined entries; never a locked one.

        Call it under ``lock("roots")``, so that no build starts to rely on an artifact meanwhile.
        """
        latest = time.time() - older_than_days * 86_400
        removed: list[str] = []
        busy: list[str] = []
        kept = freed_bytes = 0
        if not dry_run:
            self.clean_staging()
        for entry in self._entries():
            if entry.name in keep_keys or entry.stat().st_mtime > latest:
                kept += 1
                continue
            try:
                with self.lock(entry.name.split(".")[0], timeout_s=0):
                    freed_bytes += _remove_entry(entry, self.root, dry_run=dry_run)
                    removed.append(entry.name)
            except Timeout:
                busy.append(entry.name)
        return GcReport(tuple(removed), freed_bytes, kept, tuple(busy))

    def is_quarantined(self, key: str) -> bool:
        """Whether an entry of ``key`` was once found damaged and is kept aside."""
        return any((self.root / "quarantine").glob(f"{key}.*"))

    def entry(self, key: str) -> Path:
        """Where the entry of ``key`` is or would be."""
        return self.root / "artifacts" / key[:2] / key

    def log_path(self, key: str) -> Path:
        """Where the output of the step with this key is kept."""
        return self.root / "logs" / f"{key}.log"

    @contextmanager
    def disk_errors(self, action: str, *, needed: Path | None = None) -> Iterator[None]:
        """Turn operating system errors into one StoreError; for a full disk it says how much ``needed`` holds."""
        try:
            yield
        except Timeout:
            raise  # It is an OSError too, and means a lock.
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise self.disk_full(action, needed) from error
            raise StoreError(
                f"{action} failed: {error}", hint=f"check the permissions and the disk of {self.root}"
            ) from error

    def disk_full(self, action: str, needed: Path | None = None) -> StoreError:
        """The error for a full disk, with what is needed and what is free."""
        size = f" for {_size_bytes(needed):,} bytes" if needed else ""
        free = shutil.disk_usage(self.root).free if self.root.exists() else 0
        return StoreError(
            f"the disk is full: {action} needs room{size}, {free:,} bytes are free in {self.root}",
            hint=_FREE_SPACE_HINT,
        )

    def _entries(self) -> list[Path]:
        return sorted([*self.root.glob("artifacts/*/*"), *self.root.glob("quarantine/*")])

    def _get_locked(self, key: str, verify: Literal["quick", "full"]) -> Artifact | None:
        found = self.inspect(key, verify=verify)
        if not isinstance(found, Damage):
            return found
        aside = self.root / "quarantine" / f"{key}.{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}"
        with self.disk_errors("moving a damaged entry aside"):
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(found.entry, aside)
        self._warn(
            f"store entry {key[:12]} is damaged: {found.reason}; it was moved to {aside} and will be built again"
        )
        return None

    def _difference(self, artifact: Artifact, verify: Literal["quick", "full"]) -> str | None:
        """How the files differ from the manifest, or None. Names the first file that does."""
        try:
            present = {path.relative_to(artifact.path).as_posix() for path in _regular_files(artifact.path)}
        except StoreError as error:
            return error.message
        if extra := sorted(present - set(artifact.files)):
            return f"{artifact.path / extra[0]} does not belong there"
        for name, record in artifact.files.items():
            path = artifact.path / name
            try:
                if name not in present:
                    return f"{path} is missing"
                if (size := path.stat().st_size) != record.size:
                    return f"{path} has {size} bytes, recorded were {record.size}"
                digest = file_digest(path) if verify == "full" else self.digests.digest(path)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}"
            if digest != record.sha256:
                return f"{path} has SHA-256 {digest[:12]}..., recorded was {record.sha256[:12]}..."
        return None


class Staging:
    """A step in the making: write into ``files``, use ``scratch`` freely, then ``commit``."""

    def __init__(self, store: ArtifactStore, key: str, place: Path, existing: Artifact | None) -> None:
        self.key = key
        self.place = place
        self.files = place / "entry" / "files"
        self.scratch = place / "scratch"
        self.existing = existing
        """The artifact, where another builder finished it first."""
        self._store = store

    def commit(
        self,
        *,
        kind: str,
        parts: Mapping[str, Any],
        facts: Mapping[str, Any],
        duration_s: float,
        peak_rss_bytes: int,
    ) -> Artifact:
        """Make ``files`` the artifact: durable, read-only, and visible all at once.

        Raises:
            StoreError: the disk is full or cannot be written; the store is as it was.
        """
        entry, target = self.place / "entry", self._store.entry(self.key)
        shutil.rmtree(self.scratch, ignore_errors=True)
        with self._store.disk_errors(f"committing step {kind}", needed=self.files):
            records = self._seal()
            manifest = {
                "key": self.key,
                "kind": kind,
                "parts": parts,
                "facts": facts,
                "files": {name: asdict(record) for name, record in records.items()},
                "created_unix_s": time.time(),
                "duration_s": duration_s,
                "peak_rss_bytes": peak_rss_bytes,
            }
            write_durably(
                entry / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(entry, target)
            fsync_directory(target.parent)
        for name, record in records.items():
            self._store.digests.remember(target / "files" / name, record.sha256)
        return _artifact_from_manifest(manifest, target)

    def _seal(self) -> dict[str, FileRecord]:
        records: dict[str, FileRecord] = {}
        for path in sorted(_regular_files(self.files)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            path.chmod(0o444)
            records[path.relative_to(self.files).as_posix()] = FileRecord(
                path.stat().st_size, file_digest(path)
            )
        for directory in {
            self.files,
            *(self.files / parent for name in records for parent in Path(name).parents),
        }:
            fsync_directory(directory)
        return records


def _artifact_from_manifest(document: Mapping[str, Any], entry: Path) -> Artifact:
    return Artifact(
        key=document["key"],
        kind=document["kind"],
        path=entry / "files",
        parts=document["parts"],
        facts=document["facts"],
        files={name: FileRecord(**record) for name, record in document["files"].items()},
        created_unix_s=document["created_unix_s"],
        duration_s=document["duration_s"],
        peak_rss_bytes=document["peak_rss_bytes"],
    )


def _regular_files(directory: Path) -> Iterator[Path]:
    """Every file below, without ``__pycache__``. A link would let bytes change that the manifest vouches for."""
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__"]
        for name in (*names, *directories):
            if Path(parent, name).is_symlink():
                raise StoreError(
                    f"{Path(parent, name)} is a link; artifacts hold plain files only",
                    hint="the step must copy the file",
                )
        yield from (Path(parent, name) for name in names)


def _size_bytes(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def _remove_entry(entry: Path, root: Path, *, dry_run: bool) -> int:
    """Remove an entry so that a reader sees all of it or nothing; returns its bytes."""
    size = _size_bytes(entry)
    if not dry_run:
        doomed = root / "staging" / f"{entry.name.split('.')[0]}.{secrets.token_hex(4)}"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        os.replace(entry, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        (root / "logs" / f"{entry.name}.log").unlink(missing_ok=True)
    return size
