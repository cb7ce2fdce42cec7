"""The ONNX graph of a decoder-only language model.

Inputs and outputs have the names and shapes of onnxruntime-genai's models:

======================================  =======  =============================================
name                                    type     shape
======================================  =======  =============================================
input_ids                               int64    [batch, sequence]
attention_mask                          int64    [batch, past + sequence]; rows are right-padded
past_key_values.{layer}.key / .value    float32  [batch, kv_heads, capacity, head_dim]
logits (output)                         float32  [batch, kept, vocab]
present.{layer}.key / .value (output)   float32  [batch, kv_heads, capacity, head_dim]
======================================  =======  =============================================

``logits_to_keep`` is an optional input (an initializer that a caller may override): 0 keeps the logits of
every position, n those of the last n. Past and present may share memory; GroupQueryAttention then writes
each row's new keys in place at the length that ``attention_mask`` gives for that row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.engines.onnxruntime.architecture import Architecture
from enginesmith.engines.onnxruntime.experts import FeedForwardWriter
from enginesmith.engines.onnxruntime.graph import MICROSOFT, Array, Graph
from enginesmith.engines.onnxruntime.linear import (
    Linear,
    read_float,
    read_linear,
    read_scalar_scale,
    stack,
)
from enginesmith.engines.onnxruntime.linear_writer import LinearWriter, quantize_rows

HEAD_BLOCK = 32
"""Columns per scale of the 8-bit output head that fast mode adds."""


@dataclass(frozen=True)
class Numerics:
    """What the runtime adds to the checkpoint's own quantization."""

    accuracy_level: int
    """MatMulNBits: 1 keeps FP32 activations, 4 quantizes them to INT8 inside the kernel."""
    int8_head: bool
    """Quantize an unquantized output head to 8 bits, weights only."""


EXACT = Numerics(accuracy_level=1, int8_head=False)
FAST = Numerics(accuracy_level=4, int8_head=True)


class DecoderWriter:
    """Writes one decoder into a graph, layer by layer, reading each tensor when it is needed."""

    def __init__(
        self, graph: Graph, tensors: CheckpointTensors, architecture: Architecture, numerics: Numerics
    ) -> None:
        self._graph = graph
        self._tensors = tensors
        self._shape = architecture
        self._numerics = numerics
        self._linear = LinearWriter(graph, numerics.accuracy_level)
        self._feed_forward = FeedForwardWriter(graph, tensors, architecture, self._linear)
        self._quantized_cache = any(name.endswith(".k_scale") for name in tensors.names())
        self._int8_cache = (tensors.quantization or {}).get("kv_cache_quant_algo") == "INT8"

    def write_inputs(self) -> str:
        """Declare the inputs and write the shared nodes; returns the hidden states after the embedding."""
        graph, shape = self._graph, self._shape
        graph.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        graph.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        graph.weight(graph.input("logits_to_keep", TensorProto.INT64, [1]), np.array([0], np.int64))
        lengths = graph.node("ReduceSum", ["attention_mask", graph.vector([1])], "mask/lengths", keepdims=0)
        last = graph.node("Sub", [lengths, graph.scalar(1, np.int64)], "mask/last")
        graph.node("Cast", [last], "mask/seqlens_k", to=TensorProto.INT32)
        total = graph.node("Shape", ["attention_mask"], "mask/shape", start=1, end=2)
        total = graph.node("Squeeze", [total, graph.vector([0])], "mask/total_int64")
        graph.node("Cast", [total], "mask/total", to=TensorProto.INT32)
        if self._quantized_cache:
            self._write_positions()
        cosines, sines = shape.rope.caches(shape.head_dim, shape.max_positions)
        graph.weight("rope/cos", cosines)
        graph.weight("rope/sin", sines)
        embedding = graph.weight("embedding", read_float(self._tensors, "model.embed_tokens.weight"))
        gathered = graph.node("Gather", [embedding, "input_ids"], "embedding/gathered")
        return graph.node("Cast", [gathered], "embedding/output", to=TensorProto.FLOAT)

    def write_layer(self, layer: int, hidden: str, delta: str | None) -> tuple[str, str]:
        """One decoder layer. ``hidden`` is the residual stream, ``delta`` what the layer before adds to it."""
        name = f"model.layers.{layer}"
        hidden, normed = self._add_and_norm(f"{name}.input_layernorm", hidden, delta)
        attended = self._attention(layer, normed)
        hidden, normed = self._add_and_norm(f"{name}.post_attention_layernorm", hidden, attended)
        return hidden, self._feed_forward.write(layer, normed)

    def write_head(self, hidden: str, delta: str) -> None:
        """The final norm, the selection of positions and the output head."""
        graph = self._graph
        _, normed = self._add_and_norm("model.norm", hidden, delta)
        start = graph.node("Neg", ["logits_to_keep"], "head/start")
        end = graph.vector([np.iinfo(np.int64).max])
        kept = graph.node("Slice", [normed, start, end, graph.vector([1])], "head/kept")
        logits = self._head(kept)
        graph.node("Identity", [logits], "logits")
        graph.output("logits", TensorProto.FLOAT, ["batch", "kept", self._shape.vocab_size])

    def _head(self, value: str) -> str:
        tied = self._shape.tied_embeddings and "lm_head.weight" not in self._tensors
        if tied and not self._numerics.int8_head:
            # The embedding's own bytes; onnxruntime folds the cast and the transposition when it loads the graph.
            weight = self._graph.node("Cast", ["embedding"], "lm_head/weight_f32", to=TensorProto.FLOAT)
            weight = self._graph.node("Transpose", [weight], "lm_head/weight_f32_t", perm=[1, 0])
            return self._graph.node("MatMul", [value, weight], "lm_head/output")
        if tied:
            head = Linear("plain", self._tensors.read("model.embed_tokens.weight"), None)
        else:
            head = read_linear(self._tensors, "lm_head")
        if head.kind == "plain" and self._numerics.int8_head:
            codes, scales = _quantize_in_slices(head.weight)
            return self._linear.matmul_nbits(
                codes, scales, value, "lm_head", bits=8, block=HEAD_BLOCK, columns=head.weight.shape[1]
            )
        return self._linear.write(head, value, "lm_head")

    def _add_and_norm(self, name: str, hidden: str, delta: str | None) -> tuple[str, str]:
        """The new residual stream and its RMS norm."""
        graph, epsilon = self._graph, self._shape.norm_epsilon
        scale = graph.weight(f"{name}/scale", self._read_float(f"{name}.weight"))
        if delta is None:
            normed = graph.node(
                "SimplifiedLayerNormalization", [hidden, scale], f"{name}/output", axis=-1, epsilon=epsilon
            )
            return hidden, normed
        outputs = [f"{name}/output", "", "", f"{name}/residual"]
        graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [hidden, delta, scale],
            outputs,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return outputs[3], outputs[0]

    def _attention(self, layer: int, value: str) -> str:
        name = f"model.layers.{layer}.self_attn"
        q, k, v = self._qkv(name, value)
        shape, window = self._shape, self._shape.windows[layer]
        caches = self._declare_cache(layer)
        attributes = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "scale": 1.0 / math.sqrt(shape.head_dim),
        }
        rotary = ["rope/cos", "rope/sin"]
        if self._quantized_cache:
            q, k = (self._rotate(f"{name}.{part}", tensor) for part, tensor in (("q", q), ("k", k)))
            k, v = (
                self._through_cache(f"{name}.{part}_proj.{part}_scale", tensor)
                for part, tensor in (("k", k), ("v", v))
            )
            rotary = []
        if window is not None:
            attributes["local_window_size"] = window
        outputs = [f"{name}/attended", *(past.replace("past_key_values", "present") for past in caches)]
        self._graph.nodes(
            "GroupQueryAttention",
            [q, k, v, *caches, "mask/seqlens_k", "mask/total", *rotary],
            outputs,
            domain=MICROSOFT,
            do_rotary=int(bool(rotary)),
            rotary_interleaved=0,
            **attributes,
        )
        return self._linear.write(read_linear(self._tensors, f"{name}.o_proj"), outputs[0], f"{name}.o_proj")

    def _qkv(self, name: str, value: str) -> tuple[str, str, str]:
        """Query, key and value; key and value are empty when the query holds all three packed."""
        layers = [read_linear(self._tensors, f"{name}.{part}_proj") for part in "qkv"]
        separate = self._shape.qk_norm or self._quantized_cache
        packed = None if separate else stack(layers)
        if packed is not None:
            return self._linear.write(packed, value, f"{name}.qkv_proj"), "", ""
        parts = {
            part: self._linear.write(layer, value, f"{name}.{part}_proj")
            for part, layer in zip("qkv", layers, strict=True)
        }
        if self._shape.qk_norm:
            parts |= {part: self._head_norm(f"{name}.{part}_norm", parts[part]) for part in "qk"}
        return parts["q"], parts["k"], parts["v"]

    def _head_norm(self, name: str, value: str) -> str:
        """RMS norm over each head (Qwen3)."""
        graph = self._graph
        split = graph.vector([0, 0, -1, self._shape.head_dim])
        heads = graph.node("Reshape", [value, split], f"{name}/heads")
        scale = graph.weight(f"{name}/scale", self._read_float(f"{name}.weight"))
        normed = graph.node(
            "SimplifiedLayerNormalization",
            [heads, scale],
            f"{name}/normed",
            axis=-1,
            epsilon=self._shape.norm_epsilon,
        )
        return graph.node("Reshape", [normed, graph.vector([0, 0, -1])], f"{name}/output")

    def _declare_cache(self, layer: int) -> list[str]:
        shape: list[int | str] = ["batch", self._shape.kv_heads, "capacity", self._shape.head_dim]
        names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        for name in names:
            self._graph.input(name, TensorProto.FLOAT, shape)
            self._graph.output(name.replace("past_key_values", "present"), TensorProto.FLOAT, shape)
        return names

    def _write_positions(self) -> None:
        """position_ids [batch, sequence]: each row ends at its own length."""
        graph = self._graph
        sequence = graph.node("Shape", ["input_ids"], "mask/sequence", start=1, end=2)
        offsets = graph.node(
            "Range",
            [
                graph.scalar(0, np.int64),
                graph.node("Squeeze", [sequence, graph.vector([0])], "mask/sequence_scalar"),
                graph.scalar(1, np.int64),
            ],
            "mask/offsets",
        )
        lengths = graph.node("Unsqueeze", ["mask/lengths", graph.vector([1])], "mask/lengths_column")
        # The new tokens of a row are the last `sequence` of its mask; a first pass with right padding starts at 0.
        first = graph.node(
            "Max",
            [graph.node("Sub", [lengths, sequence], "mask/first_signed"), graph.scalar(0, np.int64)],
            "mask/first",
        )
        graph.node("Add", [first, offsets], "mask/position_ids")

    def _rotate(self, name: str, value: str) -> str:
        heads = self._shape.heads if name.endswith(".q") else self._shape.kv_heads
        inputs = [value, "mask/position_ids", "rope/cos", "rope/sin"]
        return self._graph.node(
            "RotaryEmbedding",
            inputs,
            f"{name}/rotated",
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=self._shape.head_dim,
        )

    def _through_cache(self, scale_name: str, value: str) -> str:
        """``value`` rounded to INT8 or FP8 as the cache of the target runtime stores it."""
        scale = read_scalar_scale(self._tensors, scale_name)
        return self._linear.round_trip(value, scale, scale_name, int8=self._int8_cache)

    def _read_float(self, name: str) -> npt.NDArray[np.float32]:
        return read_float(self._tensors, name).astype(np.float32)


def _quantize_in_slices(
    weight: Array, rows_per_slice: int = 8192
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """``quantize_rows`` in bounded memory."""
    slices = [
        quantize_rows(weight[start : start + rows_per_slice].astype(np.float32), HEAD_BLOCK)
        for start in range(0, weight.shape[0], rows_per_slice)
    ]
    return np.concatenate([codes for codes, _ in slices]), np.concatenate([scales for _, scales in slices])
