"""The ``sensitivity`` step: which nodes lose most when they are quantized, and the fewest to leave in float.

Ranges and smoothing are calibrated once; then each unit (nodes that read one activation, as runtimes fuse them) is
quantized alone, and sets are left out until the limits hold. Every figure is measured against the float graph on
the evaluation samples. Writes ``sensitivity.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from enginesmith.graphs.agreement import agreement
from enginesmith.graphs.calibrate import load_batches, session_of
from enginesmith.graphs.editing import Array, EditableGraph, load_model
from enginesmith.graphs.exclusion import broken_limits, smallest_exclusion
from enginesmith.graphs.qdq import CalibratedUnit, calibrate, with_qdq
from enginesmith.graphs.quantizable import GraphRecipe, select
from enginesmith.graphs.quantize import SENSITIVITY_FILE, check_opset, glob_of
from enginesmith.graphs.signature import read_signature
from enginesmith.steps import StepContext

Figures = Mapping[str, float]

_EXACT_SESSION = {"session.disable_quant_qdq": "1"}
"""Q/DQ computed as written, in float: the numbers of the graph, not of one runtime's kernels."""


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the ranking and the proposal; facts: whether it meets the limits, its size, figures before and after.

    Raises:
        SpecError: an exclude matches nothing, or nothing is left to quantize.
        SourceError: the samples do not fit the graph.
        GateError: NaN or Inf in weights or activations.
    """
    params, source = context.params, context.inputs["graph"]
    model, signature = load_model(source), read_signature(source)
    check_opset(model, params["scheme"])
    patterns = () if params["exclude"] == "auto" else tuple(params["exclude"])
    recipe = GraphRecipe.from_params(params, exclude=patterns)
    names = [tensor.name for tensor in signature.inputs]
    calibration = calibrate(
        model,
        select(EditableGraph(model), recipe),
        recipe,
        batches=load_batches(context.inputs["calibration"], names),
        scratch=context.scratch / "calibration",
        progress=lambda _fraction, note: context.progress(None, note),
    )
    trial = Trial(
        model,
        recipe,
        batches=load_batches(context.inputs["samples"], names),
        outputs=[tensor.name for tensor in signature.outputs],
        task=params["task"],
        scratch=context.scratch / "trial",
    )
    document = _search(calibration.units, trial, params["limits"], context.progress)
    # In place of the spec's own patterns, which held for all that was measured.
    document["exclude"] = [*patterns, *map(glob_of, document["proposal"])]
    if patterns and document["met"]:
        document["verdict"] += ", beside those that exclude names"
    document |= {"scheme": recipe.scheme, "task": params["task"], "limits": dict(params["limits"])}
    path = Path(context.out) / SENSITIVITY_FILE
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    keys = ("met", "verdict", "proposal", "before", "after", "trials")
    return {key: document[key] for key in keys}


class Trial:
    """Measures the graph with some units quantized and the others in float."""

    def __init__(
        self,
        model: onnx.ModelProto,
        recipe: GraphRecipe,
        *,
        batches: Sequence[Mapping[str, Array]],
        outputs: Sequence[str],
        task: str,
        scratch: Path,
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._batches = batches
        self._outputs = list(outputs)
        self._task = task
        self._scratch = scratch
        self._reference = self._run(model)
        self.count = 0

    def measure(self, quantized: Sequence[CalibratedUnit]) -> dict[str, float]:
        """The figures of ``graphs.agreement`` against the float graph."""
        self.count += 1
        made, _ = with_qdq(self._model, quantized, self._recipe)
        return agreement(self._reference, self._run(made), task=self._task)

    def _run(self, model: onnx.ModelProto) -> dict[str, list[Array]]:
        session = session_of(model, self._scratch, config=_EXACT_SESSION)
        rows: dict[str, list[Array]] = {name: [] for name in self._outputs}
        for batch in self._batches:
            for name, values in zip(self._outputs, session.run(self._outputs, dict(batch)), strict=True):
                rows[name].append(values)
        return rows


@dataclass(frozen=True)
class Ranked:
    """A unit and the figures with only it quantized."""

    unit: CalibratedUnit
    figures: Figures

    @property
    def loss(self) -> float:
        """What orders the ranking; not a number counts as the worst."""
        error = self.figures["relative_error"]
        return error if error == error else float("inf")

    def document(self) -> dict[str, Any]:
        return {
            "nodes": [member.name for member in self.unit.unit.members],
            "op": self.unit.unit.members[0].op,
            "loss": self.loss,
            "figures": dict(self.figures),
        }


def _search(
    units: Sequence[CalibratedUnit],
    trial: Trial,
    limits: Mapping[str, float | None],
    progress: Callable[[float | None, str], None],
) -> dict[str, Any]:
    ranked = []
    for index, unit in enumerate(units):
        progress(index / (len(units) + 8), f"quantizing {unit.unit.name} alone ({index + 1} of {len(units)})")
        ranked.append(Ranked(unit, trial.measure([unit])))
    ranked.sort(key=lambda entry: entry.loss, reverse=True)
    order = [entry.unit for entry in ranked]

    def measure(excluded: frozenset[int]) -> dict[str, float]:
        progress(None, f"leaving {len(excluded)} of {len(order)} in float")
        return trial.measure([unit for index, unit in enumerate(order) if index not in excluded])

    found = smallest_exclusion(len(order), measure, limits)
    proposal = [member.name for index in sorted(found.excluded) for member in order[index].unit.members]
    return {
        "ranking": [entry.document() for entry in ranked],
        "met": found.met,
        "verdict": _verdict(found.met, found.after, limits, excluded=len(proposal)),
        "proposal": proposal,
        "before": dict(found.before),
        "after": dict(found.after),
        "trials": trial.count,
    }


def _verdict(met: bool, after: Figures, limits: Mapping[str, float | None], *, excluded: int) -> str:
    if not met:
        broken = "; ".join(broken_limits(after, limits))
        return f"no set meets the limits; even with all but the least sensitive in float: {broken}"
    if not excluded:
        return "the limits hold with nothing excluded"
    return f"the limits hold with {excluded} node{'s' if excluded > 1 else ''} in float"
