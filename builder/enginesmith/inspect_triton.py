"""What is in a Triton model directory and in a model repository: configuration, versions and why they were let through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.errors import SourceError
from enginesmith.inspect_checkpoint import named
from enginesmith.inspect_report import Inspection, Listing

CONFIG_FILE, RELEASE_FILE = "config.pbtxt", "release.json"


def inspect_triton_model(directory: Path) -> Inspection:
    """What is in the Triton model ``directory``.

    Raises:
        SourceError: its configuration or a release's record is damaged.
    """
    config = _config(directory)
    versions = versions_in(directory)
    served = served_versions(config, versions)
    releases = {
        name: read_json_object(path / RELEASE_FILE)
        for name, path in versions.items()
        if (path / RELEASE_FILE).exists()
    }
    rows = [
        {
            "version": int(name),
            "served": name in served,
            "published": releases.get(name, {}).get("published"),
            "not_rehearsed": releases.get(name, {}).get("not_rehearsed"),
            "files": len(files := _files(path)),
            "bytes": sum(file.stat().st_size for file in files),
        }
        for name, path in versions.items()
    ]
    release = releases.get(served[-1], {}) if served else {}
    listings = (
        Listing("inputs and outputs", _interface(config)),
        Listing("versions", rows),
        *_evidence(release.get("evidence")),
    )
    facts = {**_settings(config), **_origin(release.get("evidence"))}
    return Inspection("Triton model", directory, facts, listings)


def inspect_triton_repository(directory: Path) -> Inspection:
    """The models in the Triton model repository ``directory``.

    Raises:
        SourceError: the configuration of one is damaged.
    """
    rows = []
    for path in models_in(directory):
        config, versions = _config(path), versions_in(path)
        served = served_versions(config, versions)
        rows.append(
            {
                "model": path.name,
                "backend": config.backend or config.platform,
                "versions": len(versions),
                "served": ", ".join(served),
                "max_batch_size": config.max_batch_size,
                "bytes": sum(file.stat().st_size for name in served for file in _files(versions[name])),
            }
        )
    return Inspection(
        "Triton model repository", directory, {"models": len(rows)}, (Listing("models in it", rows),)
    )


def models_in(directory: Path) -> list[Path]:
    """The model directories of a repository."""
    return sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))


def _config(directory: Path) -> Any:
    from enginesmith.triton.config import parse_config

    path = directory / CONFIG_FILE
    try:
        return parse_config(path.read_text(encoding="utf-8"), origin=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error


def versions_in(directory: Path) -> dict[str, Path]:
    """The version directories of a model, the oldest first."""
    found = [path for path in directory.iterdir() if path.is_dir() and path.name.isdecimal()]
    return {path.name: path for path in sorted(found, key=lambda path: int(path.name))}


def served_versions(config: Any, versions: Mapping[str, Path]) -> list[str]:
    """The versions that the policy chooses among those that are there, the oldest first."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "specific":
        return [name for name in versions if int(name) in policy.specific.versions]
    if choice == "all":
        return list(versions)
    return list(versions)[-(policy.latest.num_versions or 1) :]


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def _interface(config: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "as": side,
            "dtype": _data_type(tensor).removeprefix("TYPE_"),
            "shape": list(tensor.dims),
            "optional": bool(getattr(tensor, "optional", False)),
        }
        for side, tensors in (("input", config.input), ("output", config.output))
        for tensor in tensors
    ]


def _data_type(tensor: Any) -> str:
    field = type(tensor).DESCRIPTOR.fields_by_name["data_type"]
    return str(field.enum_type.values_by_number[tensor.data_type].name)


def _settings(config: Any) -> dict[str, Any]:
    batching = config.dynamic_batching
    facts: dict[str, Any] = {
        "backend": config.backend or config.platform,
        "max_batch_size": config.max_batch_size,
        "instances": sum(max(1, group.count) for group in config.instance_group),
        "dynamic_batching": config.HasField("dynamic_batching"),
        "max_queue_delay_us": batching.max_queue_delay_microseconds,
        "response_cache": bool(config.response_cache.enable),
        "warmup_requests": len(config.model_warmup),
        "ensemble_of": [step.model_name for step in config.ensemble_scheduling.step],
        "parameters": {name: one.string_value for name, one in sorted(config.parameters.items())},
    }
    return named({name: value or None for name, value in facts.items()})


def _origin(evidence: Any) -> dict[str, Any]:
    if not isinstance(evidence, Mapping):
        return {}
    kept = ("enginesmith", "spec", "variant", "target", "scheme")
    facts = {("built_by_enginesmith" if name == "enginesmith" else name): evidence.get(name) for name in kept}
    if (kv_cache_bytes := _facts_of(evidence, "package").get("kv_cache_bytes")) is not None:
        facts["kv_cache_bytes_per_instance"] = kv_cache_bytes
    return facts


def _facts_of(evidence: Mapping[str, Any], step: str) -> Mapping[str, Any]:
    steps = evidence.get("steps")
    made = steps.get(step) if isinstance(steps, Mapping) else None
    facts = made.get("facts") if isinstance(made, Mapping) else None
    return facts if isinstance(facts, Mapping) else {}


def _evidence(evidence: Any) -> tuple[Listing, ...]:
    """The steps behind the served version, and what they measured."""
    steps = evidence.get("steps") if isinstance(evidence, Mapping) else None
    if not isinstance(steps, Mapping):
        return ()
    made = [
        {
            "step": name,
            "key": str(step.get("key"))[:12],
            "seconds": round(float(step.get("duration_s") or 0), 1),
        }
        for name, step in steps.items()
    ]
    measured = [
        {"figure": figure, "measured": value}
        for name in ("measure", "measure_graph")
        for figure, value in _facts_of(evidence, name).get("quality", {}).items()
    ]
    return Listing("quality", measured), Listing("steps behind it", made)
