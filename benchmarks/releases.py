"""The published releases that are measured, and the artifacts behind each.

A benchmark measures what is served: the version directory that ``config.pbtxt`` names. The command line brings it up to
date first, so the plan's artifacts in the store are those that it was made from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import say

from enginesmith.build import title_of
from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.errors import OperatorError, SpecError, StoreError
from enginesmith.plan import Plan, make_plan
from enginesmith.plan_steps import Step
from enginesmith.publish.local import CONFIG_FILE
from enginesmith.spec import ModelSpec
from enginesmith.spec_file import load_spec
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
    artifacts: Mapping[str, Artifact]
    """What every step behind it made, by kind; those that variants share are named ``shared <kind>``."""

    def facts(self, kind: str) -> Mapping[str, Any]:
        """What a step of this release found."""
        return self.artifacts[kind].facts


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
    if not isinstance(spec, ModelSpec):
        raise SpecError(f"{spec.name} has task {spec.task}; this benchmark asks text-generation models")
    if unknown := sorted(set(arguments.variant) - set(spec.variants)):
        raise SpecError(
            f"{spec.name} has no variant {', '.join(unknown)}; it has: {', '.join(spec.variants)}"
        )
    variants = tuple(arguments.variant) or tuple(spec.variants)
    return Project(spec, arguments.spec, arguments.store, arguments.repository, variants, arguments.quick)


def published_releases(project: Project) -> list[Release]:
    """The served release of every variant, after whatever was missing or out of date has been built and published.

    Raises:
        OperatorError: the build failed.
        StoreError: the store is damaged.
    """
    done = subprocess.run(project.build_command(), stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise OperatorError(
            f"enginesmith build ended with status {done.returncode}", hint="its own message is above"
        )
    store = ArtifactStore(project.store, warn=say)
    plan = make_plan(project.spec, store, variants=project.variants)
    return [_release(project, plan, variant, store) for variant in plan.variants]


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


def artifacts_of(releases: Sequence[Release]) -> list[tuple[str, str, Artifact]]:
    """Every step behind ``releases`` once: its kind, its variant ("" for shared steps), its artifact."""
    found: dict[str, tuple[str, str, Artifact]] = {}
    for release in releases:
        for kind, artifact in release.artifacts.items():
            variant = "" if kind.startswith("shared ") else release.variant
            found.setdefault(artifact.key, (kind.removeprefix("shared "), variant, artifact))
    return list(found.values())


def _release(project: Project, plan: Plan, variant: str, store: ArtifactStore) -> Release:
    path = project.repository / project.spec.triton_name(variant) / CONFIG_FILE
    config = parse_config(path.read_text(encoding="utf-8"), origin=str(path))
    (version,) = config.version_policy.specific.versions
    directory = path.parent / str(version)
    return Release(
        model=config.name,
        variant=variant,
        scheme=project.spec.variants[variant].scheme,
        version=int(version),
        directory=directory,
        serving=read_json_object(directory / "serving.json"),
        artifacts={
            step.kind if step.variant else f"shared {step.kind}": _artifact(step, store)
            for step in plan.steps
            if step.variant in (None, variant)
        },
    )


def _artifact(step: Step, store: ArtifactStore) -> Artifact:
    found = store.inspect(step.key)
    if not isinstance(found, Artifact):
        raise StoreError(
            f"the store {store.root} has no sound artifact {step.key[:12]} ({title_of(step)}), although it was just built",
            hint="did the code or the spec change meanwhile? Run the benchmark again",
        )
    return found
