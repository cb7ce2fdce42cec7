"""The feed-forward part of a decoder layer as ONNX nodes: one gated MLP, or a mixture of experts.

Every expert computes every token and the routing weights, zero for experts that a token does not visit, add them
up. That costs more than a kernel that sorts tokens by expert, and is exact: this engine is the reference twin of
one that is served by another runtime.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.checkpoints.validate import moe_block
from enginesmith.engines.onnxruntime.architecture import Architecture, MixtureOfExperts
from enginesmith.engines.onnxruntime.graph import Graph
from enginesmith.engines.onnxruntime.linear import read_linear
from enginesmith.engines.onnxruntime.linear_writer import LinearWriter

_DENSE = ("gate_proj", "up_proj", "down_proj")


class FeedForwardWriter:
    """Writes the feed-forward part of each layer."""

    def __init__(
        self, graph: Graph, tensors: CheckpointTensors, architecture: Architecture, linear: LinearWriter
    ) -> None:
        self._graph = graph
        self._tensors = tensors
        self._shape = architecture
        self._linear = linear

    def write(self, layer: int, value: str) -> str:
        """What layer ``layer`` adds to the residual stream for ``value`` (float32 [batch, sequence, hidden])."""
        moe = self._shape.moe
        if moe is None or layer not in moe.sparse_layers:
            return self._gated(f"model.layers.{layer}.mlp", _DENSE, value)
        block, parts = moe_block(self._shape.name)
        name = f"model.layers.{layer}.{block}"
        weights = self._routing_weights(f"{name}.gate", moe, value)
        outputs = []
        for expert in range(moe.experts):
            output = self._gated(f"{name}.experts.{expert}", parts, value)
            weight = self._graph.node(
                "Gather", [weights, self._graph.vector([expert])], f"{name}/weight_{expert}", axis=-1
            )
            outputs.append(self._graph.node("Mul", [output, weight], f"{name}/weighted_{expert}"))
        if moe.shared_expert:
            outputs.append(self._shared_expert(name, value))
        return reduce(lambda left, right: self._graph.node("Add", [left, right], f"{right}/sum"), outputs)

    def _gated(self, name: str, parts: tuple[str, str, str], value: str) -> str:
        gate_part, up_part, down_part = parts
        gate = self._project(f"{name}.{gate_part}", value)
        up = self._project(f"{name}.{up_part}", value)
        sigmoid = self._graph.node("Sigmoid", [gate], f"{name}/sigmoid")
        activated = self._graph.node("Mul", [gate, sigmoid], f"{name}/silu")
        product = self._graph.node("Mul", [activated, up], f"{name}/product")
        return self._project(f"{name}.{down_part}", product)

    def _project(self, name: str, value: str) -> str:
        return self._linear.write(read_linear(self._tensors, name), value, name)

    def _routing_weights(self, name: str, moe: MixtureOfExperts, value: str) -> str:
        """float32 [batch, sequence, experts]: the softmax of the router at the chosen experts, zero at the others."""
        graph = self._graph
        probabilities = graph.node("Softmax", [self._project(name, value)], f"{name}/probabilities", axis=-1)
        chosen, indices = graph.nodes(
            "TopK",
            [probabilities, graph.vector([moe.experts_per_token])],
            [f"{name}/chosen", f"{name}/indices"],
            axis=-1,
        )
        if moe.renormalize:
            total = graph.node("ReduceSum", [chosen, graph.vector([-1])], f"{name}/total", keepdims=1)
            chosen = graph.node("Div", [chosen, total], f"{name}/renormalized")
        zeros = graph.node("Mul", [probabilities, graph.scalar(0.0, np.float32)], f"{name}/zeros")
        return graph.node("ScatterElements", [zeros, indices, chosen], f"{name}/weights", axis=-1)

    def _shared_expert(self, name: str, value: str) -> str:
        """The expert that every token visits, scaled by its own gate (Qwen2-MoE)."""
        output = self._gated(f"{name}.shared_expert", _DENSE, value)
        gate = self._project(f"{name}.shared_expert_gate", value)
        openness = self._graph.node("Sigmoid", [gate], f"{name}.shared_expert_gate/sigmoid")
        return self._graph.node("Mul", [output, openness], f"{name}.shared_expert/gated")
