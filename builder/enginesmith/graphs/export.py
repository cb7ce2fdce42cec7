"""The ``export`` step: one FP32 ONNX graph, its signature, and what the original model answers.

Flow: the source becomes an ``Original`` (``hf_models``, ``module_source``, ``onnx_source``); it answers the samples
and further shapes; ``torch_graph`` makes the graph; ONNX's checker and ``compare`` hold it against the original.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from enginesmith.errors import SourceError, SpecError
from enginesmith.graph_spec import TensorDtype
from enginesmith.graphs.compare import (
    GraphRunError,
    Probe,
    UnoptimizedGraph,
    compare,
    fixed_axis,
    lengths_of,
    probes_of,
    resized,
)
from enginesmith.graphs.graph_file import check_graph, described_outputs, write_graph
from enginesmith.graphs.original import Arrays, Original
from enginesmith.graphs.planned import check_planned
from enginesmith.graphs.samples import read_batches
from enginesmith.graphs.signature import MODEL_FILE, Signature
from enginesmith.steps import StepContext

EXPORT_FILE = "export.json"
REFERENCE_DIRECTORY = "reference"


def run(context: StepContext) -> Mapping[str, Any]:
    """Write graph, signature and references; the facts are those of ``export.json``.

    Raises:
        SourceError: a file changed since the plan; the model cannot be loaded, run or exported, or the graph fixes an axis that should be dynamic.
        SpecError: the spec's inputs, outputs or axes do not fit the model.
        StepFailedError: the exported graph computes something else than the model.
    """
    params = context.params
    check_planned(params)
    context.progress(None, "loading the model")
    original = _original(context)
    if bare := [tensor.name for tensor in original.inputs if len(tensor.shape) == 1]:
        raise SpecError(
            f"input {bare[0]} of {original.what} has no axis but the batch, and Triton wants one more",
            hint="give it one of length 1 in the model: [batch, 1]",
        )
    batches = read_batches(context.inputs["samples"])
    probes = probes_of(original, batches[0])
    context.progress(0.2, "running the original model")
    cases: list[tuple[Probe | None, Arrays, Arrays]] = [
        (None, batch, _answer(original, batch, None)) for batch in batches
    ]
    cases += [(probe, probe.feeds, _answer(original, probe.feeds, probe)) for probe in probes]
    _write_references(context.out, [expected for _, _, expected in cases[: len(batches)]])
    context.progress(0.4, "exporting")
    model = _graph(original, batches[0])
    outputs = described_outputs(model, [answer for _, _, answer in cases])
    write_graph(model, context.out)
    check_graph(context.out / MODEL_FILE)
    context.progress(0.7, "comparing the graph with the model")
    difference = compare(UnoptimizedGraph(context.out / MODEL_FILE), original, cases)
    Signature(
        params["task"], original.inputs, outputs, original.axes, original.labels, original.pad_id
    ).write(context.out)
    facts = {
        **original.facts,
        "opset": next(entry.version for entry in model.opset_import if not entry.domain),
        "nodes": len(model.graph.node),
        "max_abs_difference": difference.largest,
        "max_relative_error": difference.relative,
        "compared_lengths": [lengths_of(original.inputs, feeds) for _, feeds, _ in cases],
    }
    (context.out / EXPORT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def read_references(directory: Path) -> list[Arrays]:
    """The original model's outputs in an ``export`` artifact, by sample batch."""
    references: list[Arrays] = []
    for path in sorted((directory / REFERENCE_DIRECTORY).glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            references.append({name: archive[name] for name in archive.files})
    return references


def _original(context: StepContext) -> Original:
    params, location = context.params, context.params["location"]
    if location.get("onnx"):
        from enginesmith.graphs.onnx_source import original_of_file

        return original_of_file(Path(location["onnx"]), params)
    if location.get("module"):
        from enginesmith.graphs.module_source import original_of_module

        return original_of_module(Path(location["module"]), params)
    from enginesmith.graphs.hf_models import original_of_checkpoint

    return original_of_checkpoint(context.inputs["checkpoint"], params)


def _graph(original: Original, base: Arrays) -> Any:
    """The ``ModelProto``: an ONNX file's own, else traced from the module."""
    if original.is_graph:
        return original.exportable()
    from enginesmith.graphs.torch_graph import example_lengths, graph_of_original

    lengths = lengths_of(original.inputs, base) | example_lengths(original)
    return graph_of_original(original, resized(original.inputs, base, lengths))


def _answer(original: Original, feeds: Arrays, probe: Probe | None) -> dict[str, Any]:
    """The original's outputs: tensors of types that can be served, every one with the batch as its first axis, finite."""
    try:
        answer = original.run(feeds)
    except GraphRunError as error:
        if probe is not None and probe.axis is not None:
            raise fixed_axis(original, probe, str(error)) from error
        raise SourceError(
            f"{original.what} does not take the samples ({lengths_of(original.inputs, feeds)}): {error}",
            hint="compare the spec's inputs, axes and samples with what the model expects",
        ) from error
    batch = next(iter(feeds.values())).shape[0]
    for name, array in answer.items():
        kind = array.dtype.name if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        if kind not in get_args(TensorDtype):
            raise SourceError(
                f"output {name} of {original.what} is {kind}; allowed: {', '.join(get_args(TensorDtype))}",
                hint="convert it in the model, or leave it out of the model's outputs",
            )
        if array.ndim == 0 or array.shape[0] != batch:
            raise SourceError(
                f"output {name} of {original.what} has shape {list(array.shape)} for a batch of {batch}; its first axis must be "
                "the batch",
                hint="Triton batches requests along the first axis of every input and output",
            )
        if array.ndim == 1:
            raise SourceError(
                f"output {name} of {original.what} has no axis but the batch, and Triton wants one more",
                hint="give it one of length 1 in the model: [batch, 1]",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise SourceError(
                f"output {name} of {original.what} has NaN or Inf ({lengths_of(original.inputs, feeds)})",
                hint="check the model's weights, and that the samples are inputs that it is made for",
            )
    return answer


def _write_references(out: Path, references: Sequence[Arrays]) -> None:
    (out / REFERENCE_DIRECTORY).mkdir()
    for number, arrays in enumerate(references):
        np.savez(out / REFERENCE_DIRECTORY / f"{number:03d}.npz", **arrays)
