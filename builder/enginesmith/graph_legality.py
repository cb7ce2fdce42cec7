"""Whether a graph spec can be built and served on its targets, before anyone waits for a build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from enginesmith.errors import SpecError
from enginesmith.graph_spec import GraphSpec
from enginesmith.graph_targets import TensorRtTarget
from enginesmith.platforms import TRITON_IMAGES


def check_graph_targets(spec: GraphSpec) -> None:
    """Return if every target of ``spec`` can execute its variants, as far as that is known without the model.

    Raises:
        SpecError: an unknown toolchain, or a scheme that the GPU cannot execute.
    """
    for target in spec.targets:
        if isinstance(target, TensorRtTarget) and target.toolchain not in TRITON_IMAGES:
            raise SpecError(
                f"target {target.name}: toolchain {target.toolchain!r} is not known; known: {', '.join(TRITON_IMAGES)}"
            )


def check_graph_legal(spec: GraphSpec, hf_config: Mapping[str, Any]) -> None:
    """Return if ``spec`` fits a checkpoint with this ``config.json``.

    Raises:
        SpecError: the architecture does not do the task, or a length is beyond the model's.
    """
    positions = hf_config.get("max_position_embeddings")
    if isinstance(positions, int) and spec.serving.max_sequence_length > positions:
        raise SpecError(
            f"serving.max_sequence_length is {spec.serving.max_sequence_length}, but the model knows only {positions} positions",
            hint=f"set serving.max_sequence_length to {positions} or less",
        )
