"""The ``package_tensorrt`` step: the rehearsed repository and the TensorRT engine become one package.

The engine is the only part that no rehearsal on a CPU can run, so what is known of it is held against what the repository
relies on: its inputs and outputs against the signature, its profiles against the limits of serving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.errors import GateError, SourceError
from enginesmith.graphs.signature import Signature, read_signature
from enginesmith.steps import StepContext
from enginesmith.triton.graph.deployment import Deployment, read_deployment
from enginesmith.triton.package_checks import require_passed
from enginesmith.triton.placement import contents_digest, place_file, place_tree, tree_contents, tree_files

PLAN_FILE, ENGINE_FILE = "model.plan", "engine.json"


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the package. Facts: ``models``, ``engine_bytes``, ``package_bytes``.

    Raises:
        GateError: the verdict or the rehearsal did not pass, the rehearsal is not of this repository, or the engine does not
            cover what the repository serves.
        SourceError: there is no engine, or its ``engine.json`` cannot be read.
    """
    repository, engine = context.inputs["repository"], context.inputs["engine"]
    require_passed(context.inputs["verdict"])
    _require_rehearsed(repository, context.inputs["rehearsal"])
    signature = read_signature(repository / str(context.params["model_name"]) / "1")
    deployment = read_deployment(context.params, signature)
    if not (engine / PLAN_FILE).is_file():
        raise SourceError(f"{PLAN_FILE} is missing in {engine}", hint="build the compile_tensorrt step again")
    _require_covered(_read(engine / ENGINE_FILE), deployment)
    for name in deployment.models:
        place_tree(repository / name, context.out / name)
    version = context.out / deployment.name / "1"
    for name in (PLAN_FILE, ENGINE_FILE):
        place_file(engine / name, version / name)
    return {
        "models": list(deployment.models),
        "engine_bytes": (version / PLAN_FILE).stat().st_size,
        "package_bytes": sum(file.stat().st_size for file in tree_files(context.out)),
    }


def package_digest(package: Path) -> str:
    """One SHA-256 for a package, as ``enginesmith.publish`` expects it: over its model's files, or over those of all."""
    models = [path.parent for path in sorted(package.glob("*/config.pbtxt"))]
    return contents_digest(tree_contents(models[0] if len(models) == 1 else package))


def _require_rehearsed(repository: Path, rehearsal: Path) -> None:
    report = _read(rehearsal / "rehearsal.json")
    digest = package_digest(repository)
    if report.get("passed") is not True:
        raise GateError(
            "the repository's rehearsal did not pass", hint="build it: the rehearse step must pass"
        )
    if report.get("package_digest") != digest:
        raise GateError(
            f"the repository is not what was rehearsed: its digest is {digest}, rehearsed was {report.get('package_digest')}",
            hint="build again: the rehearsal must be of this very repository",
        )


def _require_covered(engine: Mapping[str, Any], deployment: Deployment) -> None:
    problems = [*_binding_problems(engine, deployment.signature), *_profile_problems(engine, deployment)]
    if engine.get("runtime") != deployment.target.runtime:
        problems.append(f"it is for {engine.get('runtime')}, the target is {deployment.target.runtime}")
    if problems:
        raise GateError(
            f"the engine does not serve what {deployment.name} relies on: {'; '.join(problems)}",
            hint="build the compile_tensorrt step again: graph, signature and serving limits must be those of this build",
        )


def _binding_problems(engine: Mapping[str, Any], signature: Signature) -> list[str]:
    seen = {(one["name"], one["mode"]): str(one["dtype"]) for one in engine.get("bindings", ())}
    wanted = {(one.name, "input"): one.dtype for one in signature.inputs}
    wanted |= {(one.name, "output"): one.dtype for one in signature.outputs}
    return [
        f"{mode} {name} is {seen.get((name, mode), 'missing')}, expected {wanted.get((name, mode), 'none')}"
        for name, mode in sorted(seen.keys() | wanted.keys())
        if seen.get((name, mode)) != wanted.get((name, mode))
    ]


def _profile_problems(engine: Mapping[str, Any], deployment: Deployment) -> list[str]:
    """Why no profile takes every shape that is served; our models use the first."""
    profile: Mapping[str, Any] = next(iter(engine.get("profiles", ())), {})
    problems = []
    for which in ("min", "max"):
        for name, wanted in deployment.shapes(which).items():
            seen = tuple(profile.get(name, {}).get(which, ()))
            covers = len(seen) == len(wanted) and all(
                one <= other if which == "min" else one >= other
                for one, other in zip(seen, wanted, strict=True)
            )
            if not covers:
                problems.append(
                    f"the {which} shape of input {name} is {list(seen)}, {list(wanted)} is served"
                )
    return problems


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}", hint="build the step that made it again") from error
    return document
