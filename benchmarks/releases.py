"""The published releases that are measured, with the evidence and the artifacts behind each.

A benchmark measures what is served, so it starts from the model repository: the version that ``config.pbtxt`` names,
and the keys in that version's ``release.json``, by which the store still has everything the release was made from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import say

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.errors import OperatorError, SpecError, StoreError
from enginesmith.publish.local import CONFIG_FILE, RELEASE_FILE
from enginesmith.spec import ModelSpec, load_spec
from enginesmith.store import Artifact, ArtifactStore
from enginesmith.triton.config import parse_config

CLI = (sys.executable, "-m", "enginesmith.cli")


@dataclass(frozen=True)
class Project:
    """What a benchmark works on: a spec, where it is built, and where it is published."""

    spec: ModelSpec
    spec_path: Path
    store: Path
    repository: Path
    variants: tuple[str, ...]
    quick: bool
    """Short settings, to see whether a script works; its figures are not for the record."""

    def cli(self, *arguments: str) -> list[str]:
        """A command line of enginesmith on this project's store."""
        return [*CLI, "--store", str(self.store), *arguments]

    def build_command(self) -> list[str]:
        """The command line that builds and publishes the variants."""
        chosen = [part for variant in self.variants for part in ("--variant", variant)]
        return self.cli("build", str(self.spec_path), *chosen, "--publish", str(self.repository))


@dataclass(frozen=True)
class Release:
    """One published version of one variant."""

    model: str
    variant: str
    scheme: str
    version: int
    directory: Path
    """The version directory: engine, tokenizer, ``serving.json``."""
    serving: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]
    """Key, facts and tools of every step behind it; those that variants share are named ``shared <kind>``."""

    def facts(self, kind: str) -> Mapping[str, Any]:
        """What a step of this release found."""
        facts: Mapping[str, Any] = self.steps[kind]["facts"]
        return facts

    def artifact(self, kind: str, store: ArtifactStore) -> Artifact:
        """What a step of this release made.

        Raises:
            StoreError: the store no longer has it.
        """
        key = self.steps[kind]["key"]
        found = store.inspect(key)
        if not isinstance(found, Artifact):
            raise StoreError(
                f"the store {store.root} has no sound artifact {key[:12]} ({kind} of {self.model})",
                hint="build and publish again with this store: enginesmith build SPEC --publish DIR",
            )
        return found


def add_project_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--spec", type=Path, default=Path("models/smollm2-135m.yaml"), metavar="FILE")
    parser.add_argument("--store", type=Path, default=Path(".enginesmith"), metavar="DIR")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME", help="only this variant; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="short settings, for development; not for the record"
    )


def project_from(arguments: argparse.Namespace) -> Project:
    """The project that the options name.

    Raises:
        SpecError: the spec is wrong, or has no such variant.
    """
    spec = load_spec(arguments.spec)
    if unknown := sorted(set(arguments.variant) - set(spec.variants)):
        raise SpecError(
            f"{spec.name} has no variant {', '.join(unknown)}; it has: {', '.join(spec.variants)}"
        )
    variants = tuple(arguments.variant) or tuple(spec.variants)
    return Project(spec, arguments.spec, arguments.store, arguments.repository, variants, arguments.quick)


def published_releases(project: Project) -> list[Release]:
    """The served release of every variant; those that were never published are built first.

    Raises:
        OperatorError: the build failed, or a release is damaged.
    """
    if missing := [name for name in project.variants if not _config_path(project, name).is_file()]:
        say(f"not published yet: {', '.join(missing)}; building")
        build(project)
    return [_release(project, name) for name in project.variants]


def build(project: Project) -> None:
    """Bring the store and the repository up to date through the command line; its progress goes to stderr.

    Raises:
        OperatorError: it failed.
    """
    done = subprocess.run(project.build_command(), stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise OperatorError(
            f"enginesmith build ended with status {done.returncode}", hint="its own message is above"
        )


def baseline_of(releases: Sequence[Release]) -> Release:
    """The unquantized variant, whose engine computes in FP32.

    Raises:
        SpecError: there is none.
    """
    for release in releases:
        if release.scheme == "none":
            return release
    raise SpecError(
        "ratios need an unquantized variant as their peer; none is among "
        + ", ".join(release.variant for release in releases),
        hint="keep a variant of scheme none, and name it with --variant too",
    )


def artifacts_of(releases: Sequence[Release], store: ArtifactStore) -> Iterator[tuple[str, str, Artifact]]:
    """Every step behind ``releases`` once: its kind, its variant ("" for shared steps), its artifact."""
    seen: set[str] = set()
    for release in releases:
        for kind in release.steps:
            artifact = release.artifact(kind, store)
            if artifact.key not in seen:
                seen.add(artifact.key)
                shared = kind.startswith("shared ")
                yield kind.removeprefix("shared "), "" if shared else release.variant, artifact


def _config_path(project: Project, variant: str) -> Path:
    return project.repository / project.spec.triton_name(variant) / CONFIG_FILE


def _release(project: Project, variant: str) -> Release:
    path = _config_path(project, variant)
    config = parse_config(path.read_text(encoding="utf-8"), origin=str(path))
    (version,) = config.version_policy.specific.versions
    directory = path.parent / str(version)
    evidence = read_json_object(directory / RELEASE_FILE)["evidence"]
    return Release(
        model=config.name,
        variant=variant,
        scheme=evidence["scheme"],
        version=int(version),
        directory=directory,
        serving=read_json_object(directory / "serving.json"),
        steps=evidence["steps"],
    )
