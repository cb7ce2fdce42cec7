"""The ``assemble_tensorrt`` step: the Triton repository of a TensorRT deployment, complete but for the engine.

Needs no GPU and no TensorRT, so that it can be rehearsed before anyone waits for an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginesmith.steps import StepContext
from enginesmith.triton.graph.package import facts_of, write_repository


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the repository. Facts: ``models``, ``package_bytes``.

    Raises:
        GateError: the variant has no passed verdict.
        SpecError: batches that could not be formed.
        SourceError: the checkpoint has no tokenizer.
    """
    return facts_of(context.out, write_repository(context))
