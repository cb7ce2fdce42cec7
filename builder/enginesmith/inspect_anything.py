"""Finds out what a path or a store key names, and looks into it.

Owns how a thing is recognized: by the files that it has, never by its name alone. What is in each kind is the business
of the ``inspect_*`` modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.errors import OperatorError, SourceError, StoreError
from enginesmith.inspect_report import Inspection, Listing
from enginesmith.store import Artifact, ArtifactStore, Damage

MANIFEST_FILE = "manifest.json"
_SHORTEST_PREFIX = 8
_ALLOWED = (
    "an ONNX file, a checkpoint (Hugging Face, safetensors, TensorRT-LLM), a directory with an engine (ONNX Runtime, "
    "TensorRT, TensorRT-LLM), a Triton model or repository, an artifact of the store"
)

Inspector = Callable[[Path], Inspection]


def inspect_anything(what: str, *, store: Callable[[], ArtifactStore], repository: Path) -> Inspection:
    """What ``what`` is and holds: a path, the first digits of a key of ``store``, or a model of ``repository``.

    Raises:
        OperatorError: nothing is there, the digits fit several artifacts, or it is nothing that can be looked into.
        SourceError, StoreError: it is damaged.
    """
    for path in (Path(what), repository / what):
        try:
            if path.exists() and (path == Path(what) or (path / "config.pbtxt").is_file()):
                return inspect_path(path)
        except OSError as error:
            raise OperatorError(f"{path} cannot be looked into: {error.strerror}") from error
    if re.fullmatch(r"[0-9a-f]+", what):
        return _inspect_key(what, store())
    raise OperatorError(
        f"{what} is no file or directory, no key of the store and no model in {repository}",
        hint="give a path, at least 8 hexadecimal digits of a key (`enginesmith plan SPEC` lists them), or a published model's name",
    )


def inspect_path(path: Path) -> Inspection:
    """What is at ``path``.

    Raises:
        OperatorError: it is nothing that can be looked into.
        SourceError, StoreError: it is damaged.
    """
    entry = path.parent if path.name == "files" else path
    if (entry / MANIFEST_FILE).is_file() and (entry / "files").is_dir():
        return _inspect_entry(entry)
    inspector = _inspector_of_directory(path) if path.is_dir() else _inspector_of_file(path)
    if inspector is None:
        seen = ", ".join(sorted(one.name for one in path.iterdir())[:8]) if path.is_dir() else "another file"
        raise OperatorError(
            f"{path} is nothing that can be looked into; seen: {seen or 'nothing'}",
            hint=f"allowed: {_ALLOWED}",
        )
    return inspector(path)


def _inspector_of_file(path: Path) -> Inspector | None:
    from enginesmith.inspect_checkpoint import inspect_safetensors
    from enginesmith.inspect_onnx import inspect_onnx

    if path.suffix == ".safetensors":
        return inspect_safetensors
    if path.suffix == ".onnx":
        return inspect_onnx
    if path.name in (
        "config.pbtxt",
        "engine.json",
        "model.plan",
        "config.json",
        "model.safetensors.index.json",
    ):
        return lambda file: inspect_path(file.parent)
    if path.suffix in (".engine", ".plan"):
        raise OperatorError(
            f"{path} can only be read by the TensorRT that wrote it, on the GPU that it is for",
            hint="give its directory, where engine.json or config.json says what is in it",
        )
    return None


def _inspector_of_directory(path: Path) -> Inspector | None:
    from enginesmith import inspect_checkpoint as checkpoints
    from enginesmith import inspect_engines as engines
    from enginesmith import inspect_triton as triton
    from enginesmith.inspect_onnx import inspect_onnx

    def has(name: str) -> bool:
        return any(path.glob(name))

    if has("config.pbtxt"):
        return triton.inspect_triton_model
    if has("engine.json") and (has("model.plan") or "bindings" in read_json_object(path / "engine.json")):
        return engines.inspect_tensorrt_engine
    if has("engine.json") and has("model.onnx"):
        return engines.inspect_onnx_runtime_engine
    if has("model.onnx"):
        return lambda directory: inspect_onnx(directory / "model.onnx")
    if has("config.json"):
        config = read_json_object(path / "config.json")
        if "build_config" in config:
            return engines.inspect_tensorrt_llm_engines
        if "architecture" in config and "mapping" in config:
            return checkpoints.inspect_tensorrt_llm_checkpoint
    if has("config.json") or has("*.safetensors"):
        return checkpoints.inspect_checkpoint
    return triton.inspect_triton_repository if triton.models_in(path) else None


def _inspect_key(prefix: str, store: ArtifactStore) -> Inspection:
    if len(prefix) < _SHORTEST_PREFIX:
        raise OperatorError(
            f"{prefix} has {len(prefix)} digits; the first {_SHORTEST_PREFIX} of a key are needed",
            hint="`enginesmith plan SPEC` shows the first 12 of each",
        )
    entries = sorted((store.root / "artifacts" / prefix[:2]).glob(f"{prefix}*"))
    if not entries:
        raise OperatorError(
            f"the store {store.root} has no artifact whose key begins with {prefix}",
            hint="`enginesmith plan SPEC` lists keys, and which are cached; --store names another store",
        )
    if len(entries) > 1:
        listed = "\n".join(f"  {entry.name[:16]}  {_kind_of(entry)}" for entry in entries[:8])
        raise OperatorError(
            f"{len(entries)} artifacts have a key that begins with {prefix}:\n{listed}",
            hint="give more digits",
        )
    return _inspect_found(store.inspect(entries[0].name), entries[0])


def _kind_of(entry: Path) -> str:
    try:
        return str(read_json_object(entry / MANIFEST_FILE).get("kind"))
    except SourceError:
        return "damaged"


def _inspect_entry(entry: Path) -> Inspection:
    """An artifact by its place: ``<store>/artifacts/<aa>/<key>``."""
    entry = entry.resolve()
    store = ArtifactStore(entry.parent.parent.parent)
    if store.entry(entry.name) != entry:
        raise OperatorError(
            f"{entry} is an artifact outside of its store, where it cannot be checked",
            hint=f"inspect {entry / 'files'}/..., or the store",
        )
    return _inspect_found(store.inspect(entry.name), entry)


def _inspect_found(found: Artifact | Damage | None, entry: Path) -> Inspection:
    if isinstance(found, Damage):
        raise StoreError(
            f"the artifact {found.key[:12]} is damaged: {found.reason}",
            hint="build again: it will be made anew",
        )
    if found is None:
        raise OperatorError(f"the artifact {entry.name[:12]} was removed meanwhile", hint="build again")
    inner = _inspector_of_directory(found.path)
    rows = [{"file": name, "bytes": record.size} for name, record in sorted(found.files.items())]
    return Inspection(
        f"artifact of the step {found.kind}",
        entry,
        {
            "key": found.key,
            "created": datetime.fromtimestamp(found.created_unix_s, UTC).isoformat(timespec="seconds"),
            "duration_s": round(found.duration_s, 1),
            "peak_memory_bytes": found.peak_rss_bytes,
            "size_bytes": found.size_bytes,
            "inputs": {role: key[:12] for role, key in (found.parts.get("inputs") or {}).items()},
            "tools": found.parts.get("tools") or {},
            "params": found.parts.get("params") or {},
            "facts": found.facts,
        },
        (Listing("files", rows),),
        parts=() if inner is None else (inner(found.path),),
    )
