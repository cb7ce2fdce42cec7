"""The ``package_trtllm`` step: the rehearsed repository and the engines become one package.

The engines are the only part that no rehearsal on a CPU can run, so what can be known of them is held against what the
repository relies on: their number and mapping, and the limits that they were compiled for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.errors import GateError, SourceError
from enginesmith.steps import StepContext
from enginesmith.triton.config import parse_config
from enginesmith.triton.placement import contents_digest, place_file, place_tree, tree_contents, tree_files
from enginesmith.triton.trtllm.assemble import LIMITS_FILE
from enginesmith.triton.trtllm.configs import ENGINE_BACKEND
from enginesmith.triton.trtllm.placeholders import placeholders

_AT_LEAST = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width")


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the package. Facts: ``models``, ``engine_bytes``, ``package_bytes``.

    Raises:
        GateError: the rehearsal is not of this repository or did not pass, the verdict did not pass, a placeholder is
            left, or the engines do not cover what the repository relies on.
        SourceError: there are no engines, or their ``config.json`` cannot be read.
    """
    repository, engines = context.inputs["repository"], context.inputs["engines"]
    _require_verdict(context.inputs.get("verdict"))
    _require_rehearsed(repository, context.inputs["rehearsal"])
    if found := placeholders(repository):
        raise GateError(f"a placeholder is left in the repository: {'; '.join(found)}", hint="build it again")
    model = _engine_model(repository)
    ranks = _require_covered(repository / model / "1" / LIMITS_FILE, engines)
    for part in sorted(path for path in repository.iterdir() if path.is_dir()):
        place_tree(part, context.out / part.name)
    version = context.out / model / "1"
    for file in (*ranks, engines / "config.json"):
        place_file(file, version / file.name)
    return {
        "models": sorted(path.name for path in context.out.iterdir()),
        "engine_bytes": sum(rank.stat().st_size for rank in ranks),
        "package_bytes": sum(file.stat().st_size for file in tree_files(context.out)),
    }


def _require_verdict(verdict: Path | None) -> None:
    """A checkpoint that no twin can measure has no verdict; one that has must have passed."""
    if verdict is not None and _read(verdict / "verdict.json").get("passed") is not True:
        raise GateError(
            "the checkpoint's twin did not pass its verification: the engines cannot be packaged",
            hint="see verdict.json of the verify step",
        )


def _require_rehearsed(repository: Path, rehearsal: Path) -> None:
    report = _read(rehearsal / "rehearsal.json")
    digest = contents_digest(tree_contents(repository))
    if report.get("passed") is not True:
        raise GateError(
            "the repository's rehearsal did not pass", hint="build it: the rehearse step must pass"
        )
    if report.get("package_digest") != digest:
        raise GateError(
            f"the repository is not what was rehearsed: its digest is {digest}, rehearsed was {report.get('package_digest')}",
            hint="build again: the rehearsal must be of this very repository",
        )


def _engine_model(repository: Path) -> str:
    """The name of the model that runs in TensorRT-LLM's backend."""
    names = [
        path.parent.name
        for path in sorted(repository.glob("*/config.pbtxt"))
        if parse_config(path.read_text(encoding="utf-8"), origin=str(path)).backend == ENGINE_BACKEND
    ]
    if len(names) != 1:
        raise SourceError(
            f"{repository} has {len(names)} models for the backend {ENGINE_BACKEND}; expected one",
            hint="build the assemble step again",
        )
    return names[0]


def _require_covered(limits_path: Path, engines: Path) -> list[Path]:
    """The engine files, when they serve what the repository relies on."""
    limits, config = _read(limits_path), _read(engines / "config.json")
    built = config.get("build_config", {})
    mapping = config.get("pretrained_config", {}).get("mapping", {})
    problems = [
        f"{name} is {built.get(name)}, the repository relies on {limits[name]}"
        for name in _AT_LEAST
        if not isinstance(built.get(name), int) or built[name] < limits[name]
    ]
    problems += [
        f"{name} is {mapping.get(name, 1)}, the repository relies on {limits[name]}"
        for name in ("tp_size", "pp_size")
        if mapping.get(name, 1) != limits[name]
    ]
    if limits["paged_context"] and built.get("plugin_config", {}).get("use_paged_context_fmha") is False:
        problems.append("use_paged_context_fmha is off; chunked context and the reuse of KV blocks need it")
    world_size = limits["tp_size"] * limits["pp_size"]
    ranks = [engines / f"rank{rank}.engine" for rank in range(world_size)]
    problems += [f"{rank.name} is missing" for rank in ranks if not rank.is_file()]
    if len(found := list(engines.glob("rank*.engine"))) > world_size:
        problems.append(f"there are {len(found)} engines, the mapping has {world_size} ranks")
    if problems:
        raise GateError(
            f"the engines do not cover the repository: {'; '.join(problems)}",
            hint="compile again with this target and these serving limits",
        )
    return ranks


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {path}: {error}", hint="build the step that makes it again"
        ) from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} does not hold a JSON object", hint="build the step that makes it again")
    return document
