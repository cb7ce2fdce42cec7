"""Publishes a package into a model repository on a local file system.

How a reader never sees half a version, with tritonserver as the reader (behaviour measured on 2.51):

* Triton takes every directory in a repository's root for a model, and one that is not makes a server that starts
  in that moment exit. It takes every directory of a model whose name *begins* with digits for a version. So new
  directories are filled in a hidden directory beside the repository and enter it complete, by one ``rename``.
* The published ``config.pbtxt`` names the one version to serve (``version_policy``). A new version directory is
  invisible until that file is replaced, which switches version and configuration together. It is the pointer.

Version directories are never changed. Each holds a ``release.json`` with the digest of every file and the evidence
that the release was verified; Triton ignores it. All versions are kept. Publishers on one repository wait for each
other; what a killed one left behind is removed or completed by the next.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from enginesmith.digests import file_digest
from enginesmith.durable import fsync_directory, write_durably
from enginesmith.errors import GateError, OperatorError
from enginesmith.triton.config import config_text, parse_config, serve_only_version
from enginesmith.triton.placement import contents_digest, place_tree, tree_contents

RELEASE_FILE = "release.json"
CONFIG_FILE = "config.pbtxt"
LOCK_FILE = ".publish.lock"
LOCK_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Publication:
    """What ``publish`` did."""

    model: str
    version: int
    path: Path
    """The version directory in the repository."""
    changed: bool
    """False when the repository served exactly these bytes already."""


@dataclass(frozen=True)
class _Package:
    directory: Path
    contents: Mapping[str, str]
    """SHA-256 by path, relative to ``directory``."""

    @property
    def model(self) -> str:
        return self.directory.name

    @property
    def digest(self) -> str:
        return contents_digest(self.contents)


def publish(package_dir: Path, repository: Path, *, evidence: Mapping[str, Any]) -> Publication:
    """Make the package in ``package_dir`` the served version of its model in ``repository``.

    Args:
        package_dir: the ``package`` step's artifact: a directory with one model directory in it.
        repository: the model repository; made if it does not exist.
        evidence: plain JSON, kept in ``release.json``. ``evidence["rehearsal"]`` must be the content of the
            ``rehearse`` step's ``rehearsal.json`` for these very bytes, and passed.

    Raises:
        GateError: the package was not rehearsed, or not as these bytes.
        OperatorError: the repository cannot be written.
    """
    package = _read_package(package_dir)
    _require_rehearsed(package, evidence)
    repository = repository.resolve()
    with _disk_errors(package.model, repository):
        repository.mkdir(parents=True, exist_ok=True)
        with _exclusive(repository), _staging_beside(repository) as staging:
            return _publish_locked(package, repository / package.model, staging, evidence)


def _publish_locked(
    package: _Package, model: Path, staging: Path, evidence: Mapping[str, Any]
) -> Publication:
    releases = _releases(model)
    known = [version for version, digest in releases.items() if digest == package.digest]
    version = known[-1] if known else max(releases, default=0) + 1
    path = model / str(version)
    config = _published_config(package, version)
    if known and _text(model / CONFIG_FILE) == config:
        return Publication(package.model, version, path, changed=False)
    if not known:
        staged = staging / str(version)
        _stage_version(package, staged, version=version, evidence=evidence)
        if not releases:
            _reveal_model(staged, config, model)
            return Publication(package.model, version, path, changed=True)
        staged.rename(path)
        fsync_directory(model)
    write_durably(staging / CONFIG_FILE, config)
    os.replace(staging / CONFIG_FILE, model / CONFIG_FILE)
    fsync_directory(model)
    return Publication(package.model, version, path, changed=True)


def _read_package(package_dir: Path) -> _Package:
    models = [path.parent for path in package_dir.glob(f"*/{CONFIG_FILE}")]
    if len(models) != 1 or not (models[0] / "1").is_dir():
        raise OperatorError(
            f"{package_dir} is not a package: expected one model directory with {CONFIG_FILE} and 1/, found {len(models)}",
            hint="publish what the package step made",
        )
    return _Package(models[0], tree_contents(models[0]))


def _require_rehearsed(package: _Package, evidence: Mapping[str, Any]) -> None:
    rehearsal = evidence.get("rehearsal")
    if not isinstance(rehearsal, Mapping) or rehearsal.get("passed") is not True:
        raise GateError(
            f"{package.model} has no passed rehearsal and cannot be published",
            hint="build it: the rehearse step must pass",
        )
    if rehearsal.get("package_digest") != package.digest:
        raise GateError(
            f"{package.model} is not what was rehearsed: its digest is {package.digest}, rehearsed was {rehearsal.get('package_digest')}",
            hint="build again; if this repeats, check the store with enginesmith gc and the disk for errors",
        )


def _releases(model: Path) -> dict[int, str]:
    """The digest of every published version, oldest first."""
    if not model.exists():
        return {}
    versions = sorted(
        int(entry.name) for entry in model.iterdir() if entry.is_dir() and entry.name.isdecimal()
    )
    releases = {}
    for version in versions:
        path = model / str(version) / RELEASE_FILE
        try:
            releases[version] = str(json.loads(path.read_text(encoding="utf-8"))["digest"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise OperatorError(
                f"version {version} of {model} was not published by enginesmith, or its {RELEASE_FILE} is damaged",
                hint=f"move {model} away, or publish into another repository; nothing was changed",
            ) from error
    if not releases:
        raise OperatorError(
            f"{model} exists and holds no published version", hint=f"move {model} away; nothing was changed"
        )
    return releases


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _published_config(package: _Package, version: int) -> str:
    path = package.directory / CONFIG_FILE
    return config_text(
        serve_only_version(parse_config(path.read_text(encoding="utf-8"), origin=str(path)), version)
    )


def _stage_version(package: _Package, staged: Path, *, version: int, evidence: Mapping[str, Any]) -> None:
    """Fill ``staged`` completely and flush it."""
    source = package.directory / "1"
    place_tree(source, staged)
    files = {
        name.removeprefix("1/"): digest for name, digest in package.contents.items() if name.startswith("1/")
    }
    for name, digest in files.items():
        # A link is the bytes that were hashed; a copy is other bytes until proven.
        if not (staged / name).samefile(source / name) and file_digest(staged / name) != digest:
            raise OperatorError(
                f"{name} changed while it was copied to {staged.parent}",
                hint="check the disk, then publish again",
            )
    release = {
        "format": 1,
        "model": package.model,
        "version": version,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": package.digest,
        "files": files,
        "config": (package.directory / CONFIG_FILE).read_text(encoding="utf-8"),
        "evidence": evidence,
    }
    write_durably(staged / RELEASE_FILE, json.dumps(release, indent=1, sort_keys=True) + "\n")
    for directory in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        fsync_directory(directory)


def _reveal_model(staged_version: Path, config: str, model: Path) -> None:
    """A model's first version enters the repository together with its directory and configuration."""
    staged = staged_version.parent / "model"
    staged.mkdir()
    staged_version.rename(staged / staged_version.name)
    write_durably(staged / CONFIG_FILE, config)
    fsync_directory(staged)
    staged.rename(model)
    fsync_directory(model.parent)


@contextmanager
def _exclusive(repository: Path) -> Iterator[None]:
    # A plain file in the root of a repository is ignored by Triton.
    lock = FileLock(repository / LOCK_FILE)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout as error:
        raise OperatorError(
            f"another publisher has held {repository} for {LOCK_TIMEOUT_S:g} s",
            hint="wait for it to end, then publish again",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _staging_beside(repository: Path) -> Iterator[Path]:
    staging = repository.parent / f".{repository.name}.publishing"
    # Whatever is there was left by a killed publisher: the lock is ours.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        if staging.stat().st_dev != repository.stat().st_dev:
            raise OperatorError(
                f"{repository} is the root of a file system, so a version cannot be prepared beside it and moved in whole",
                hint=f"use a directory inside it, e.g. {repository / 'models'}",
            )
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _disk_errors(model: str, repository: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OperatorError(
            f"cannot publish {model} into {repository}: {error.strerror} ({error.filename})",
            hint="what was published before is untouched; free space or fix the permissions, then publish again",
        ) from error
