"""The ``measure_graph`` step: the engine that will be served, against the original model and against the FP32 engine.

``export``     the FP32 engine against the original model: is the graph right? Only for scheme none.
``quality``    the engine against the original model: what does the variant cost altogether?
``company``    rows that the runtime pads and joins against each of them alone: do neighbours change them?
``throughput`` the engine against the FP32 engine, in turns, as a fact of this machine.

Nothing is judged here; ``enginesmith.graphs.gate`` does.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import GateError
from enginesmith.graphs.agreement import agreement
from enginesmith.graphs.signature import MODEL_FILE, Signature, read_signature
from enginesmith.steps import StepContext
from enginesmith.triton.models.graph_onnxruntime.graph_runtime import GraphRuntime
from enginesmith.verify.verdict import MEASUREMENTS_FILE

Arrays = Mapping[str, npt.NDArray[Any]]
Batches = Sequence[Arrays]

COMPANY_ROWS = 32
"""Rows that are also run alone."""
_CONSTANT = 1e-6
"""Rows whose values differ by less than this share of the largest are the same."""
WARM_UP_RUNS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 60
BUDGET_S = 2.0
"""About as long as the rounds with one shape take."""


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``measurements.json``; the facts are the same figures.

    Raises:
        GateError: the original model's own outputs are not finite.
        StoreError: the signature cannot be read.
    """
    params, inputs = context.params, context.inputs
    signature = read_signature(inputs["engine"])
    samples, reference = load_batches(inputs["samples"] / "batches"), _reference(inputs["export"], signature)
    engine = GraphRuntime(inputs["engine"])
    outputs = []
    for index, batch in enumerate(samples):
        context.progress(0.5 * index / len(samples), f"batch {index + 1} of {len(samples)}")
        outputs.append(engine.run(batch))
    quality = plain(agreement(_by_name(reference), _by_name(outputs), task=params["task"]))
    context.progress(0.5, "rows alone and together")
    company = _company(engine, samples, task=params["task"])
    context.progress(0.6, "throughput")
    is_baseline = inputs["engine"] == inputs["baseline"]
    baseline = engine if is_baseline else GraphRuntime(inputs["baseline"])
    measurements: dict[str, Any] = {
        "samples": sum(map(_rows, samples)),
        "export": quality if params["scheme"] == "none" else None,
        "quality": quality,
        "outputs": {name: _health(batches) for name, batches in _by_name(outputs).items()},
        "company": company,
        "engine_bytes": _graph_bytes(inputs["engine"]),
        "fp32_bytes": _graph_bytes(inputs["baseline"]),
        "emulated": bool(engine.engine.get("emulated", False)),
        "throughput": throughput_figures(engine, baseline, samples),
    }
    (context.out / MEASUREMENTS_FILE).write_text(json.dumps(measurements, indent=2) + "\n", encoding="utf-8")
    return measurements


def load_batches(directory: Path) -> list[dict[str, npt.NDArray[Any]]]:
    """The arrays by name of every ``.npz`` file in ``directory``, in order; never unpickles."""
    batches = []
    for path in sorted(directory.glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            batches.append({name: archive[name] for name in archive.files})
    assert batches, f"no batches in {directory}"
    return batches


def _reference(export: Path, signature: Signature) -> list[dict[str, npt.NDArray[Any]]]:
    """The original model's outputs per batch, in the signature's order.

    Raises:
        GateError: they are not finite.
    """
    names = [tensor.name for tensor in signature.outputs]
    reference = [{name: batch[name] for name in names} for batch in load_batches(export / "reference")]
    for name in names:
        if bad := sum(_non_finite(batch[name]) for batch in reference):
            raise GateError(
                f"output {name} of the original model itself holds {bad} values that are not finite",
                hint="check the model's weights and, where samples are random or from a file, their values",
            )
    return reference


def _by_name(batches: Batches) -> dict[str, list[npt.NDArray[Any]]]:
    return {name: [batch[name] for batch in batches] for name in batches[0]}


def _company(engine: GraphRuntime, samples: Batches, *, task: str) -> Mapping[str, float | None]:
    """Figures of rows that the runtime joins, as several requests at once are, against each of them alone."""
    rows = [row_alone(batch, index) for batch in samples for index in range(_rows(batch))]
    chosen = rows[:: math.ceil(len(rows) / COMPANY_ROWS)]
    joined, alone = engine.run_requests(chosen), [engine.run(row) for row in chosen]
    figures = plain(agreement(_by_name(alone), _by_name(joined), task=task))
    kept = ("relative_error", "max_abs_delta", "min_cosine")
    return {"rows": len(chosen), **{name: figures[name] for name in kept}}


def row_alone(batch: Arrays, index: int) -> dict[str, npt.NDArray[Any]]:
    """Row ``index`` of ``batch`` as a batch of its own, without the padding behind it that an attention mask shows."""
    row = {name: array[index : index + 1] for name, array in batch.items()}
    mask = row.get("attention_mask")
    if mask is None or not mask[0, 0]:
        return row
    length = int(np.flatnonzero(mask[0])[-1]) + 1
    return {name: array[:, :length] if array.shape == mask.shape else array for name, array in row.items()}


def throughput_figures(engine: GraphRuntime, baseline: GraphRuntime, samples: Batches) -> Mapping[str, Any]:
    """Samples per second of both with one sample and with a whole batch, each of middling size."""
    rows = [row_alone(batch, index) for batch in samples for index in range(_rows(batch))]
    return {
        "threads": engine.threads,
        "single": _in_turns(engine, baseline, _middling(rows)),
        "batched": _in_turns(engine, baseline, _middling(samples)),
    }


def _middling(batches: Sequence[Arrays]) -> Arrays:
    """The batch in the middle, by the number of its values."""
    by_size = sorted(batches, key=lambda batch: sum(array.size for array in batch.values()))
    return by_size[len(by_size) // 2]


def _in_turns(engine: GraphRuntime, baseline: GraphRuntime, batch: Arrays) -> Mapping[str, Any]:
    """Medians over rounds in which both run once, so that what else the machine does hits both."""
    runtimes = [engine] if engine is baseline else [engine, baseline]
    first_s = sum(_elapsed_s(runtime, batch) for runtime in runtimes for _ in range(WARM_UP_RUNS))
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET_S / (first_s / WARM_UP_RUNS))))
    elapsed_s = [[_elapsed_s(runtime, batch) for runtime in runtimes] for _ in range(rounds)]
    per_s = [_rows(batch) / statistics.median(own) for own in zip(*elapsed_s, strict=True)]
    return {
        "batch_size": _rows(batch),
        "shapes": {name: list(array.shape) for name, array in batch.items()},
        "rounds": rounds,
        "samples_per_s": per_s[0],
        "fp32_samples_per_s": per_s[-1],
        "speedup": per_s[0] / per_s[-1],
    }


def _elapsed_s(runtime: GraphRuntime, batch: Arrays) -> float:
    started_s = time.perf_counter()
    runtime.run(batch)
    return time.perf_counter() - started_s


def _health(batches: Sequence[npt.NDArray[Any]]) -> Mapping[str, int | bool]:
    """Of one output: how many values are not finite, and whether all samples have the same values."""
    return {"non_finite": sum(map(_non_finite, batches)), "constant": _is_constant(batches)}


def _non_finite(values: npt.NDArray[Any]) -> int:
    return int(values.size - np.isfinite(values).sum())


def _is_constant(batches: Sequence[npt.NDArray[Any]]) -> bool:
    """Whether every sample has the first one's values. Whole numbers, such as classes, may well be equal: never."""
    first = batches[0][0]
    if first.dtype.kind != "f" or sum(map(len, batches)) < 2:
        return False
    scale = float(np.abs(first).max())
    return all(
        batch.shape[1:] == first.shape and bool((np.abs(batch - first) <= _CONSTANT * scale).all())
        for batch in batches
    )


def plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    """``figures`` as JSON has them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _graph_bytes(directory: Path) -> int:
    """The graph with its weights."""
    return sum(file.stat().st_size for file in directory.glob(f"{MODEL_FILE}*"))


def _rows(batch: Arrays) -> int:
    return len(next(iter(batch.values())))
