"""How token vectors become one embedding: what a sentence-transformers checkpoint says, and the modules that do it.

The files are those of sentence-transformers: ``modules.json`` lists the modules in order, ``<path>/config.json``
holds the settings of each. What is not understood is refused by name, because leaving it out gives other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.checkpoints.tokenizer import MODULES_FILE, read_modules
from enginesmith.errors import SourceError

PoolingMode = Literal["mean", "cls", "max", "last"]
_MODES: Mapping[str, PoolingMode] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "max": "max",
    "max_tokens": "max",
    "lasttoken": "last",
}
"""By sentence-transformers' names: ``pooling_mode`` of its newer files, ``pooling_mode_*`` of its older ones."""
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Head:
    """What turns token vectors into an embedding."""

    pooling: PoolingMode
    normalize: bool
    source: str
    """Who says so: the spec, modules.json, or the default."""


def head_of(checkpoint: Path, *, pooling: PoolingMode | None, normalize: bool | None) -> Head:
    """The head of ``checkpoint``; ``pooling`` and ``normalize`` of the spec replace what its files say.

    Raises:
        SourceError: the files name a module or a way of pooling that this cannot do.
    """
    if not (checkpoint / MODULES_FILE).exists():
        source = "spec" if pooling is not None else "default"
        return Head(pooling or "mean", True if normalize is None else normalize, source)
    modules = read_modules(checkpoint)
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise SourceError(
            f"{checkpoint / MODULES_FILE} has a module {unknown[0]}, which the export does not know; known: Transformer, "
            "Pooling, Normalize",
            hint="export such a model yourself, and give it as source.module or source.onnx",
        )
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise SourceError(
            f"{checkpoint / MODULES_FILE} lists {', '.join(kinds)}; known: Transformer, Pooling and, after them, Normalize"
        )
    stored = None if pooling else _stored_mode(checkpoint / modules[1][1] / "config.json")
    mode: PoolingMode = pooling or stored or "mean"
    return Head(
        mode, "Normalize" in kinds if normalize is None else normalize, "spec" if pooling else MODULES_FILE
    )


def _stored_mode(path: Path) -> PoolingMode:
    settings = read_json_object(path)
    seen: Sequence[Any]
    if "pooling_mode" in settings:
        value = settings["pooling_mode"]
        seen = value if isinstance(value, list) else [value]
    else:
        prefix = "pooling_mode_"
        seen = [
            key.removeprefix(prefix)
            for key, value in settings.items()
            if key.startswith(prefix) and value is True
        ]
    match seen:
        case [str(mode)] if mode in _MODES:
            return _MODES[mode]
    raise SourceError(
        f"{path} pools by {', '.join(map(str, seen)) or 'nothing'}; known: one of {', '.join(dict.fromkeys(_MODES))}",
        hint="source.pooling of the spec replaces it, if another way is meant",
    )


class Pooling(nn.Module):  # type: ignore[misc]  # torch is not followed.
    """Token vectors float32 [batch, sequence, hidden] and their mask to [batch, hidden]."""

    def __init__(self, mode: PoolingMode) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, hidden: Any, mask: Any) -> Any:
        """``mask``: int64 [batch, sequence], 1 where there is a token."""
        if self.mode == "cls":
            return hidden[:, 0]
        kept = mask.unsqueeze(-1).to(hidden.dtype)
        if self.mode == "mean":
            return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        if self.mode == "max":
            # Not -inf: 0 * -inf is NaN, and half precision must be able to hold it.
            return (hidden + (kept - 1) * 1e4).max(1).values
        # The last token is the one with as many tokens before and with it as there are in all.
        last = (mask.cumsum(1) == mask.sum(1, keepdim=True)).to(hidden.dtype) * mask.to(hidden.dtype)
        return (hidden * last.unsqueeze(-1)).sum(1)


class Normalize(nn.Module):  # type: ignore[misc]  # torch is not followed.
    """Vectors [batch, hidden] of length 1."""

    def forward(self, vectors: Any) -> Any:
        """A zero vector stays zero."""
        return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=_SMALLEST_NORM)
