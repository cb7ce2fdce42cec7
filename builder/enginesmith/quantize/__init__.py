"""The ``quantize`` step: a Hugging Face checkpoint to ModelOpt's unified quantized checkpoint.

Flow: choose the layers (``recipe``), calibrate with ModelOpt (``calibration``), make the model equal to what
the files can say (``snapping``), write it (``export``). See docs/quantization.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith import heap
from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.corpora import corpus_sha256, load_documents, token_windows
from enginesmith.quantize.calibration import calibrate
from enginesmith.quantize.export import export
from enginesmith.quantize.recipe import Recipe, choose_layers
from enginesmith.quantize.snapping import snap
from enginesmith.steps import StepContext
from enginesmith.torch_models import linear_names, load_model, require_modelopt, storage_dtype


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the quantized checkpoint; facts: layers, bytes, the corpus and the time of each phase.

    Raises:
        SpecError: an exclude matches nothing, or the group size or the head does not fit this model.
        SourceError: the corpus or the checkpoint cannot be used.
        GateError: calibration met NaN or Inf.
        ToolchainError: ModelOpt has another version.
    """
    require_modelopt()
    recipe = Recipe.from_params(context.params)
    checkpoint = context.inputs["checkpoint"]
    clock = _Clock()
    windows, corpus_digest = _calibration_windows(context) if recipe.needs_activations else (None, None)
    context.progress(0.0, "loading the model")
    heap.map_large_blocks()
    model = load_model(checkpoint)
    clock.lap("load")
    layers = choose_layers(model, recipe)
    calibrate(model, recipe, layers, windows=windows, progress=context.progress)
    clock.lap("calibrate")
    context.progress(None, "rounding to what the checkpoint can store")
    snap(model, layers, dtype=storage_dtype(checkpoint))
    clock.lap("snap")
    context.progress(None, "writing the checkpoint")
    export(model, layers, checkpoint=checkpoint, out=context.out)
    clock.lap("export")
    written = CheckpointTensors(context.out)
    return {
        "scheme": recipe.scheme.name,
        "quantized_layers": len(layers),
        "excluded_layers": [name for name in linear_names(model) if name not in set(layers)],
        "weight_bytes": sum(written.nbytes(name) for name in written.names()),
        "corpus_sha256": corpus_digest,
        "seconds": clock.seconds,
    }


def _calibration_windows(context: StepContext) -> tuple[Any, str]:
    calibration = context.params["calibration"]
    corpus_path = (context.params.get("location") or {}).get("corpus_path")
    documents = load_documents(calibration["corpus"], Path(corpus_path) if corpus_path else None)
    windows = token_windows(
        documents,
        context.inputs["checkpoint"],
        count=calibration["samples"],
        length=calibration["length"],
        seed=calibration["seed"],
    )
    return windows, corpus_sha256(documents)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
