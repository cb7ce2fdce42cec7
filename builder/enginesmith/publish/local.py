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

What a configuration reads beside the version directories (warm-up data, the names of classes) is shared by all versions.
Such a file is named by its content, enters before the configuration that names it, and is never changed.

A package may hold several models that refer to each other, such as the parts of an ensemble. All are staged before
any is visible, and a model becomes visible after those that it refers to.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.digests import file_digest
from enginesmith.durable import fsync_directory, write_durably
from enginesmith.errors import GateError, OperatorError
from enginesmith.triton.config import config_text, parse_config, serve_only_version
from enginesmith.triton.placement import contents_digest, place_file, place_tree, tree_contents

RELEASE_FILE = "release.json"
CONFIG_FILE = "config.pbtxt"
LOCK_FILE = ".publish.lock"
LOCK_TIMEOUT_S = 600.0
_ENGINE_FILES: Mapping[str, tuple[str, ...]] = {
    "tensorrtllm": ("rank*.engine", "config.json"),
    "tensorrt": ("model.plan", "engine.json"),
    "tensorrt_rtx": ("model.plan", "engine.json"),
}
"""What a rehearsal without a GPU cannot run, by the backend that runs it or, in our Python model, by its parameter ``runtime``."""


@dataclass(frozen=True)
class Publication:
    """What ``publish`` did."""

    model: str
    version: int
    path: Path
    """The version directory in the repository."""
    changed: bool
    """False when the repository served exactly these bytes already."""
    parts: tuple[Publication, ...] = ()
    """Of a package with several models: what was done with each, in order; the last is the one named above."""


@dataclass(frozen=True)
class _Model:
    """One model directory of a package."""

    directory: Path
    contents: Mapping[str, str]
    """SHA-256 by path, relative to ``directory``."""
    config: ModelConfig
    not_rehearsed: tuple[str, ...] = ()
    """The files of version 1 that no rehearsal ran."""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def digest(self) -> str:
        return contents_digest(self.contents)

    @property
    def shared(self) -> Mapping[str, str]:
        """SHA-256 of the files that all versions share."""
        return {
            name: digest
            for name, digest in self.contents.items()
            if name != CONFIG_FILE and not name.startswith("1/")
        }


@dataclass(frozen=True)
class _Release:
    """A model of the package and where it goes."""

    model: _Model
    path: Path
    """The version directory in the repository."""
    known: bool
    """The repository holds this version already."""
    first: bool
    """The repository does not hold the model yet."""

    @property
    def version(self) -> int:
        return int(self.path.name)


def publish(package_dir: Path, repository: Path, *, evidence: Mapping[str, Any]) -> Publication:
    """Make the package in ``package_dir`` the served version of its models in ``repository``.

    Args:
        package_dir: the ``package`` step's artifact: a directory with one or more model directories in it.
        repository: the model repository; made if it does not exist.
        evidence: plain JSON, kept in ``release.json``. ``evidence["rehearsal"]`` must be the content of the
            ``rehearse`` step's ``rehearsal.json`` for these very bytes, and passed. What it names under
            ``not_rehearsed`` may have come later, if it is the engine of a model of TensorRT or TensorRT-LLM.

    Raises:
        GateError: the package was not rehearsed, or not as these bytes.
        OperatorError: the repository cannot be written.
    """
    models = _in_order(_read_package(package_dir, _rehearsal(evidence).get("not_rehearsed", ())))
    _require_rehearsed(models, evidence)
    repository = repository.resolve()
    with _disk_errors(models[-1].name, repository):
        repository.mkdir(parents=True, exist_ok=True)
        with _exclusive(repository), _staging_beside(repository) as staging:
            return _publish_locked(models, repository, staging, evidence)


def _publish_locked(
    models: Sequence[_Model], repository: Path, staging: Path, evidence: Mapping[str, Any]
) -> Publication:
    releases = [_plan_release(model, repository / model.name) for model in models]
    versions = {release.model.name: release.version for release in releases}
    for release in releases:
        if not release.known:
            _stage_version(release, staging / release.model.name / release.path.name, evidence=evidence)
    # A version is invisible until its configuration names it: the directories enter first, then the configurations.
    for release in releases:
        _share_files(release, staging)
        if not release.known and not release.first:
            (staging / release.model.name / release.path.name).rename(release.path)
            fsync_directory(release.path.parent)
    parts = tuple(
        _reveal(release, _published_config(release.model, versions), staging) for release in releases
    )
    if len(parts) == 1:
        return parts[0]
    return replace(parts[-1], changed=any(part.changed for part in parts), parts=parts)


def _plan_release(model: _Model, directory: Path) -> _Release:
    releases = _releases(directory)
    known = [version for version, digest in releases.items() if digest == model.digest]
    version = known[-1] if known else max(releases, default=0) + 1
    return _Release(model, directory / str(version), known=bool(known), first=not releases)


def _reveal(release: _Release, config: str, staging: Path) -> Publication:
    """Make a staged release what Triton serves."""
    model = release.path.parent
    done = Publication(release.model.name, release.version, release.path, changed=True)
    if release.first:
        _reveal_model(staging / release.model.name / release.path.name, config, model)
        return done
    if _text(model / CONFIG_FILE) == config:
        return replace(done, changed=False)
    write_durably(staging / CONFIG_FILE, config)
    os.replace(staging / CONFIG_FILE, model / CONFIG_FILE)
    fsync_directory(model)
    return done


def _read_package(package_dir: Path, not_rehearsed: Sequence[str]) -> list[_Model]:
    models = []
    for path in sorted(package_dir.glob(f"*/{CONFIG_FILE}")):
        config = parse_config(path.read_text(encoding="utf-8"), origin=str(path))
        contents = tree_contents(path.parent)
        excused = _excused(path.parent.name, config, contents, not_rehearsed)
        models.append(_Model(path.parent, contents, config, excused))
    if not models or not all((model.directory / "1").is_dir() for model in models):
        raise OperatorError(
            f"{package_dir} is not a package: expected model directories with {CONFIG_FILE} and 1/, found {len(models)}",
            hint="publish what the package step made",
        )
    return models


def _excused(
    model: str, config: ModelConfig, contents: Mapping[str, str], patterns: Sequence[str]
) -> tuple[str, ...]:
    """The files that a rehearsal may leave out: engines, and only where an engine's backend runs them."""
    runtime = config.parameters["runtime"].string_value if "runtime" in config.parameters else ""
    engines = _ENGINE_FILES.get(config.backend if config.backend != "python" else runtime, ())
    names = [pattern.removeprefix(f"{model}/1/") for pattern in patterns if pattern.startswith(f"{model}/1/")]
    return tuple(
        name.removeprefix("1/")
        for name in contents
        if any(fnmatch.fnmatchcase(name, f"1/{wanted}") for wanted in names if wanted in engines)
    )


def _in_order(models: Sequence[_Model]) -> list[_Model]:
    """Each model after those that its configuration names: the steps of an ensemble, the models that BLS calls."""
    waiting = {model.name: model for model in models}
    ordered: list[_Model] = []
    while waiting:
        free = [
            model for model in waiting.values() if not _named(model.config) & (waiting.keys() - {model.name})
        ]
        # A circle of references has no right order; any is as good.
        for model in free or list(waiting.values()):
            ordered.append(waiting.pop(model.name))
    return ordered


def _named(config: ModelConfig) -> set[str]:
    steps = {step.model_name for step in config.ensemble_scheduling.step}
    return steps | {parameter.string_value for parameter in config.parameters.values()}


def _rehearsal(evidence: Mapping[str, Any]) -> Mapping[str, Any]:
    rehearsal = evidence.get("rehearsal")
    return rehearsal if isinstance(rehearsal, Mapping) else {}


def _require_rehearsed(models: Sequence[_Model], evidence: Mapping[str, Any]) -> None:
    shown, rehearsal = models[-1].name, _rehearsal(evidence)
    if rehearsal.get("passed") is not True:
        raise GateError(
            f"{shown} has no passed rehearsal and cannot be published",
            hint="build it: the rehearse step must pass",
        )
    digest = _rehearsed_digest(models)
    if rehearsal.get("package_digest") != digest:
        raise GateError(
            f"{shown} is not what was rehearsed: its digest is {digest}, rehearsed was {rehearsal.get('package_digest')}",
            hint="build again; if this repeats, check the store with enginesmith gc and the disk for errors",
        )


def _rehearsed_digest(models: Sequence[_Model]) -> str:
    """What a rehearsal's ``package_digest`` must be: over one model's files, or over all files of several."""
    kept = {
        model.name: {
            name: digest
            for name, digest in model.contents.items()
            if name.removeprefix("1/") not in model.not_rehearsed
        }
        for model in models
    }
    if len(kept) == 1:
        return contents_digest(next(iter(kept.values())))
    return contents_digest(
        {f"{model}/{name}": digest for model, files in kept.items() for name, digest in files.items()}
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


def _published_config(model: _Model, versions: Mapping[str, int]) -> str:
    """The configuration that serves this version. Paths into version 1 of a package's models follow the version."""
    config = serve_only_version(model.config, versions[model.name])
    for parameter in config.parameters.values():
        for name, version in versions.items():
            if parameter.string_value.endswith(f"/{name}/1"):
                parameter.string_value = f"{parameter.string_value.removesuffix('1')}{version}"
                break
    return config_text(config)


def _stage_version(release: _Release, staged: Path, *, evidence: Mapping[str, Any]) -> None:
    """Fill ``staged`` completely and flush it."""
    model = release.model
    source = model.directory / "1"
    staged.parent.mkdir(exist_ok=True)
    place_tree(source, staged)
    files = {
        name.removeprefix("1/"): digest for name, digest in model.contents.items() if name.startswith("1/")
    }
    for name, digest in files.items():
        # A link is the bytes that were hashed; a copy is other bytes until proven.
        if not (staged / name).samefile(source / name) and file_digest(staged / name) != digest:
            raise OperatorError(
                f"{name} changed while it was copied to {staged.parent}",
                hint="check the disk, then publish again",
            )
    document = {
        "format": 1,
        "model": model.name,
        "version": release.version,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": model.digest,
        "files": files,
        "not_rehearsed": sorted(model.not_rehearsed),
        "config": (model.directory / CONFIG_FILE).read_text(encoding="utf-8"),
        "evidence": evidence,
    }
    write_durably(staged / RELEASE_FILE, json.dumps(document, indent=1, sort_keys=True) + "\n")
    for directory in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        fsync_directory(directory)


def _share_files(release: _Release, staging: Path) -> None:
    """Put what all versions share into the model's directory; into the staged one where there is none yet."""
    model = staging / release.model.name / "model" if release.first else release.path.parent
    for name, digest in release.model.shared.items():
        target = model / name
        if target.exists():
            if file_digest(target) != digest:
                raise OperatorError(
                    f"{target} was changed after it was published",
                    hint=f"move {target} away, then publish again; nothing was changed",
                )
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = staging / "shared"
        place_file(release.model.directory / name, staged)
        if file_digest(staged) != digest:
            raise OperatorError(
                f"{name} changed while it was copied to {model}", hint="check the disk, then publish again"
            )
        staged.rename(target)
        fsync_directory(target.parent)


def _reveal_model(staged_version: Path, config: str, model: Path) -> None:
    """A model's first version enters the repository together with its directory and configuration."""
    staged = staged_version.parent / "model"
    staged.mkdir(exist_ok=True)
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
