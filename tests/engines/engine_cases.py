"""Steps run as functions: tiny checkpoints quantized by ModelOpt, lowered, and compared with PyTorch.

Windows are random token ids: a tiny random model has no use for text, and every embedding row is met.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoint_factory import VOCAB_SIZE

from enginesmith.engines.onnxruntime.lower import run as lower
from enginesmith.verify.measure import teacher_forced
from enginesmith.verify.scores import Scores, agreement, scores_of_windows

QUANTIZE_DEFAULTS: Mapping[str, Any] = {
    "group_size": 32,
    "alpha": 0.5,
    "alpha_step": 0.5,  # Three candidates: enough for a real search, cheap.
    "kv_cache": "none",
    "lm_head": "none",
    "exclude": [],
    "calibration": {"corpus": {"builtin": "english"}, "samples": 2, "length": 32, "seed": 0},
    "location": {"corpus_path": None},
}


@dataclass(frozen=True)
class Context:
    """A step's context without a build."""

    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)
    on_progress: Callable[[float | None, str], None] = lambda _fraction, _note: None

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.on_progress(fraction, note)


def quantized(checkpoint: Path, out: Path, scheme: str, **params: Any) -> Path:
    """``out``, filled by the quantize step; ``params`` replace ``QUANTIZE_DEFAULTS``."""
    from enginesmith.quantize import run

    out.mkdir()
    run(Context({**QUANTIZE_DEFAULTS, "scheme": scheme, **params}, {"checkpoint": checkpoint}, out))
    return out


def lowered(checkpoint: Path, out: Path, *, mode: str = "fast") -> Path:
    """``out``, filled by the lower step."""
    out.mkdir()
    lower(Context({"mode": mode}, {"checkpoint": checkpoint}, out))
    return out


def token_windows(count: int = 12, length: int = 33, *, seed: int = 7) -> npt.NDArray[np.int64]:
    """int64 [count, length] of random ordinary tokens."""
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, (count, length))


@dataclass(frozen=True)
class Closeness:
    """How far an engine's logits are from PyTorch's; deltas are absolute."""

    positions: int
    top1_agreement: float
    mean_logprob_delta: float
    max_logit_delta: float
    median_logit_delta: float
    """Half of the positions have no logit that is further off."""


def closeness(
    engine: Path, windows: npt.NDArray[np.int64], reference: Scores, *, graph: str = "exact.onnx"
) -> Closeness:
    """How far the engine's ``graph`` is from ``reference``, which has scored ``windows``."""
    description = json.loads((engine / "engine.json").read_text())
    logits_of_tokens = teacher_forced(engine / graph, description)
    scores = scores_of_windows(windows, logits_of_tokens, reference=reference)
    seen = agreement(reference, scores)
    of_position = np.abs(scores.kept_logits - reference.kept_logits).max(axis=1)
    return Closeness(
        positions=seen.positions,
        top1_agreement=seen.top1_agreement,
        mean_logprob_delta=seen.mean_logprob_delta,
        max_logit_delta=seen.max_logit_delta,
        median_logit_delta=float(np.median(of_position)),
    )


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; None removes one."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Let ``edit`` change the torch tensors of ``model.safetensors`` in place; the dictionary may gain and lose names."""
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )
