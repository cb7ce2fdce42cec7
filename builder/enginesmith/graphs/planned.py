"""Files of the user that a step reads, held against their digests in the plan.

What a step makes is kept under a key with these digests: made of other content, it would be taken for what it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.digests import file_digest, tree_digest
from enginesmith.errors import SourceError


def check_planned(params: Mapping[str, Any]) -> None:
    """Return if the files that ``params`` (of the steps ``sample`` and ``export``) name are those of the plan.

    Raises:
        SourceError: one changed, or is gone.
    """
    location = params["location"]
    planned: dict[Path, str] = {}
    for key, digest in (("module", "module_sha256"), ("onnx", "onnx_sha256"), ("file", "file_sha256")):
        if location.get(key) and params.get(digest):
            planned[Path(location[key])] = params[digest]
    for name, digest in params.get("onnx_data", {}).items():
        planned[Path(location["onnx"]).parent / name] = digest
    for name, digest in params.get("files", {}).items():
        planned[Path(location["base_dir"]) / Path(name).expanduser()] = digest
    for path, digest in planned.items():
        _check(path, digest)


def _check(path: Path, planned: str) -> None:
    try:
        seen = tree_digest(path) if path.is_dir() else file_digest(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if seen != planned:
        raise SourceError(
            f"{path} changed after the build was planned: its content was {planned}, now it is {seen}",
            hint="run the build again",
        )
