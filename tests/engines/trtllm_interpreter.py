"""An interpreter of TensorRT-LLM checkpoints: ``config.json`` and every ``rank{i}.safetensors`` to logits, on the CPU.

It simulates all ranks of the 1.2 engine flow: column- and row-parallel layers with an all-reduce after the latter,
the vocabulary-parallel embedding and head, key-value heads that several ranks hold, pipeline stages that count
their layers from 0, experts cut by rows or given out. Each rank keeps its own residual stream, so what should be
replicated and is not shows in the logits. Weights are dequantized as the layers of ``quantization/layers.py`` do
and activations quantized as they do.

Written from the format (the names, shapes and rules that TensorRT-LLM's model classes load), knowing nothing of
the converter. Refuses what TensorRT-LLM refuses, and also tensors that no layer asks for.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from decoder_arithmetic import (
    FP8,
    Array,
    Rotation,
    attention,
    rms_norm,
    rounded_to_fp8,
    rounded_to_int8,
    routing_weights,
    sigmoid,
    silu,
)

from enginesmith.checkpoints.tensors import read_header

_EXCLUDED_BY_DEFAULT = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate"
)  # fmt: skip
_QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}


class CheckpointRefusedError(Exception):
    """TensorRT-LLM would not load this checkpoint, or would ignore a part of it."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype for a name that TensorRT-LLM or PyTorch uses."""
    return np.dtype(getattr(ml_dtypes, name, name))


class _Rank:
    """The tensors of one rank; every one must be asked for once."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointRefusedError(f"{path.name} is missing")
        self._path = path
        self._entries = read_header(path)
        self._asked: set[str] = set()

    def raw(self, name: str) -> npt.NDArray[Any]:
        """Tensor ``name`` as stored."""
        if name not in self._entries:
            raise CheckpointRefusedError(f"{self._path.name}: required but not provided: {name}")
        self._asked.add(name)
        entry = self._entries[name]
        data = np.fromfile(entry.file, np.uint8, entry.end - entry.begin, offset=entry.begin)
        return data.view(numpy_dtype(_DTYPES[entry.dtype])).reshape(entry.shape)

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        """Tensor ``name``, which must be of a floating type, in float64."""
        stored = self.raw(name)
        if self._entries[name].dtype not in ("BF16", "F16", "F32"):
            raise CheckpointRefusedError(f"{self._path.name}: {name} is {self._entries[name].dtype}")
        if shape is not None and stored.shape != shape:
            raise CheckpointRefusedError(f"{self._path.name}: {name} has shape {stored.shape}, not {shape}")
        return stored.astype(np.float64)

    def has(self, name: str) -> bool:
        return name in self._entries

    def refuse_surplus(self) -> None:
        surplus = sorted(self._entries.keys() - self._asked)
        if surplus:
            raise CheckpointRefusedError(
                f"{self._path.name}: no layer asks for {surplus[0]} ({len(surplus)} such)"
            )


@dataclass(frozen=True)
class _Linear:
    """One linear layer of one rank. ``product`` maps [tokens, in] to [tokens, out] without the bias."""

    product: Callable[[Array], Array]
    bias: Array | None

    def column(self, value: Array) -> Array:
        return self.product(value) if self.bias is None else self.product(value) + self.bias


class Interpreter:
    """A loaded checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._config = config = json.loads((directory / "config.json").read_text())
        mapping = config["mapping"]
        self._tp, self._pp = mapping["tp_size"], mapping["pp_size"]
        self._moe_ep = mapping.get("moe_ep_size", 1)
        if mapping["world_size"] != self._tp * self._pp:
            raise CheckpointRefusedError("world_size differs from tp_size * pp_size")
        self._quantization = config.get("quantization") or {}
        if unknown := self._quantization.keys() - _QUANTIZATION_KEYS:
            raise CheckpointRefusedError(f"QuantConfig has no {sorted(unknown)[0]}")
        self._ranks = [_Rank(directory / f"rank{rank}.safetensors") for rank in range(self._tp * self._pp)]
        if (directory / f"rank{len(self._ranks)}.safetensors").exists():
            raise CheckpointRefusedError("more rank files than world_size")
        self._rotation = Rotation(config.get("rotary_base", 10000.0), config.get("rotary_scaling"))
        self._heads = config["num_attention_heads"]
        self._kv_heads = config.get("num_key_value_heads", self._heads)
        self._head_size = config.get("head_size") or config["hidden_size"] // self._heads

    def logits(self, tokens: npt.NDArray[np.int64]) -> Array:
        """float64 [tokens, vocabulary] of one prompt.

        Raises:
            CheckpointRefusedError: a tensor is missing, surplus or of another shape or type than its layer's.
        """
        streams = self._all_reduced([self._embedded(rank, tokens) for rank in range(self._tp)])
        layers = np.array_split(np.arange(self._config["num_hidden_layers"]), self._pp)
        for stage in range(self._pp):
            ranks = [self._ranks[stage * self._tp + rank] for rank in range(self._tp)]
            for layer in range(len(layers[stage])):
                streams = self._layer(ranks, f"transformer.layers.{layer}", streams)
        last = self._ranks[-self._tp :]
        parts = []
        for rank, stream in zip(last, streams, strict=True):
            normed = self._norm(rank, "transformer.ln_f", stream)
            parts.append(self._linear(rank, "lm_head").column(normed))
        for loaded in self._ranks:
            loaded.refuse_surplus()
        # Rows beyond the vocabulary are padding; without them a head could be cut anywhere.
        whole = np.concatenate(parts, axis=1)
        if not self._config["vocab_size"] <= whole.shape[1] < self._config["vocab_size"] + self._tp:
            raise CheckpointRefusedError(f"lm_head has {whole.shape[1]} rows in all")
        return whole[:, : self._config["vocab_size"]]

    def _all_reduced(self, parts: list[Array]) -> list[Array]:
        total = np.sum(parts, axis=0)
        return [total] * len(parts)

    def _embedded(self, rank: int, tokens: npt.NDArray[np.int64]) -> Array:
        """This rank's part of the sum that is the embedding."""
        table = self._ranks[rank].floats("transformer.vocab_embedding.weight")
        hidden, vocabulary = self._config["hidden_size"], self._config["vocab_size"]
        if not self._config.get("use_parallel_embedding", False):
            assert table.shape == (vocabulary, hidden)
            return table[tokens] if rank == 0 else np.zeros((len(tokens), hidden))
        if self._config.get("embedding_sharding_dim", 0) == 1:
            part = np.zeros((len(tokens), hidden))
            width = hidden // self._tp
            part[:, rank * width : (rank + 1) * width] = table[tokens]
            return part
        if len(table) != -(-vocabulary // self._tp):
            raise CheckpointRefusedError(f"vocab_embedding of rank {rank} has {len(table)} rows")
        local = tokens - rank * len(table)
        mine = (local >= 0) & (local < len(table))
        looked_up: Array = np.where(mine[:, None], table[np.clip(local, 0, len(table) - 1)], 0.0)
        return looked_up

    def _layer(self, ranks: list[_Rank], name: str, streams: list[Array]) -> list[Array]:
        attended = [
            self._attention(rank, f"{name}.attention", self._norm(rank, f"{name}.input_layernorm", stream))
            for rank, stream in zip(ranks, streams, strict=True)
        ]
        deltas = self._row(ranks, f"{name}.attention.dense", attended)
        streams = [stream + delta for stream, delta in zip(streams, deltas, strict=True)]
        normed = [
            self._norm(rank, f"{name}.post_layernorm", stream)
            for rank, stream in zip(ranks, streams, strict=True)
        ]
        feed_forward = self._experts if ranks[0].has(f"{name}.mlp.router.weight") else self._gated_mlp
        deltas = feed_forward(ranks, f"{name}.mlp", normed)
        return [stream + delta for stream, delta in zip(streams, deltas, strict=True)]

    def _norm(self, rank: _Rank, name: str, value: Array) -> Array:
        weight = rank.floats(f"{name}.weight", (self._config["hidden_size"],))
        return rms_norm(value, weight, self._config["norm_epsilon"])

    def _attention(self, rank: _Rank, name: str, value: Array) -> Array:
        fused = self._linear(rank, f"{name}.qkv").column(value)
        heads = self._heads // self._tp
        kv_heads = -(-self._kv_heads // self._tp)
        split = fused.reshape(len(value), heads + 2 * kv_heads, self._head_size)
        query, key, values = np.split(split, [heads, heads + kv_heads], axis=1)
        if self._config.get("qk_layernorm", False):
            query, key = (
                rms_norm(part, rank.floats(f"{name}.{kind}_layernorm.weight"), self._config["norm_epsilon"])
                for part, kind in ((query, "q"), (key, "k"))
            )
        query, key = self._rotation(query), self._rotation(key)
        key, values = self._cached(rank, name, key), self._cached(rank, name, values)
        return attention(query, key, values)

    def _cached(self, rank: _Rank, name: str, value: Array) -> Array:
        algorithm = self._quantization.get("kv_cache_quant_algo")
        if algorithm is None:
            return value
        scale = rank.floats(f"{name}.kv_cache_scaling_factor", (1,))
        # ModelOpt also writes the two that were merged; the builder ignores them.
        for part in "kv":
            own = f"{name}.{part}_cache_scaling_factor"
            if rank.has(own) and rank.floats(own, (1,)) > scale:
                raise CheckpointRefusedError(f"{own} is larger than the merged scale")
        return {"FP8": rounded_to_fp8, "INT8": rounded_to_int8}[algorithm](value / scale) * scale

    def _gated_mlp(self, ranks: list[_Rank], name: str, values: list[Array]) -> list[Array]:
        """The activation is applied to ``fc``; ``gate`` multiplies."""
        products = [
            silu(self._linear(rank, f"{name}.fc").column(value))
            * self._linear(rank, f"{name}.gate").column(value)
            for rank, value in zip(ranks, values, strict=True)
        ]
        return self._row(ranks, f"{name}.proj", products)

    def _row(self, ranks: list[_Rank], name: str, values: list[Array]) -> list[Array]:
        """A row-parallel layer: each rank's product of its columns, summed; then its own copy of the bias."""
        layers = [self._linear(rank, name) for rank in ranks]
        total = self._all_reduced([layer.product(value) for layer, value in zip(layers, values, strict=True)])
        biases = [np.zeros(1) if layer.bias is None else layer.bias for layer in layers]
        if "AWQ" in (self._quantization.get("quant_algo") or ""):
            # The group-wise kernel adds the bias before the all-reduce, so loading zeroes it on all but the first rank.
            biases = [biases[0]] * len(biases)
        return [part + bias for part, bias in zip(total, biases, strict=True)]

    def _experts(self, ranks: list[_Rank], name: str, values: list[Array]) -> list[Array]:
        """MoE: ``fc`` [experts, 2 * f, h] is up over gate; ranks hold slices of experts, or other experts, or both."""
        moe = self._config["moe"]
        share = moe["num_experts"] // self._moe_ep
        parts = []
        for index, (rank, value) in enumerate(zip(ranks, values, strict=True)):
            router = rank.floats(f"{name}.router.weight", (moe["num_experts"], self._config["hidden_size"]))
            weights = routing_weights(
                value @ router.T, moe["top_k"], renormalize=moe["normalization_mode"] == 1
            )
            fc, proj = rank.floats(f"{name}.fc.weight"), rank.floats(f"{name}.proj.weight")
            if len(fc) != share or len(proj) != share:
                raise CheckpointRefusedError(f"{name} of rank {index} holds {len(fc)} experts, not {share}")
            first = index % self._moe_ep * share
            total = np.zeros_like(value)
            for expert in range(share):
                up, gate = np.split(value @ fc[expert].T, 2, axis=1)
                total += weights[:, first + expert, None] * ((silu(gate) * up) @ proj[expert].T)
            parts.append(total + self._shared_expert(rank, name, value))
        return self._all_reduced(parts)

    def _shared_expert(self, rank: _Rank, name: str, value: Array) -> Array:
        if not rank.has(f"{name}.shared_expert_gate.weight"):
            return np.zeros_like(value)
        up, gate = np.split(self._linear(rank, f"{name}.shared_expert.fc").column(value), 2, axis=1)
        output = self._linear(rank, f"{name}.shared_expert.proj").product(silu(gate) * up)
        openness = rank.floats(f"{name}.shared_expert_gate.weight", (1, self._config["hidden_size"]))
        return output * sigmoid(value @ openness.T)

    def _linear(self, rank: _Rank, name: str) -> _Linear:
        bias = rank.floats(f"{name}.bias") if rank.has(f"{name}.bias") else None
        algorithm = self._quantization.get("quant_algo")
        excluded = self._quantization.get("exclude_modules") or _EXCLUDED_BY_DEFAULT
        plain = algorithm is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
        if plain or algorithm == "W8A16":  # The checkpoint of W8A16 is unquantized; trtllm-build rounds it.
            weight = rank.floats(f"{name}.weight")
            return _Linear(lambda value: value @ weight.T, bias)
        reader = {
            "W8A8_SQ_PER_CHANNEL": self._smoothquant,
            "W4A16_AWQ": self._awq,
            "W4A8_AWQ": self._awq_fp8,
            "FP8": self._fp8,
        }[algorithm]
        return _Linear(reader(rank, name), bias)

    def _smoothquant(self, rank: _Rank, name: str) -> Callable[[Array], Array]:
        codes = self._codes(rank, f"{name}.weight", np.dtype(np.int8))
        rows, columns = codes.shape
        row_scales = rank.floats(f"{name}.weights_scaling_factor", (rows,))
        scale = rank.floats(f"{name}.activation_scaling_factor", (1,))
        smoothing = rank.floats(f"{name}.prequant_scaling_factor", (columns,))
        return lambda value: rounded_to_int8(value * smoothing / scale) @ codes.T * (row_scales * scale)

    def _awq(self, rank: _Rank, name: str) -> Callable[[Array], Array]:
        weight, smoothing = self._int4(rank, name)
        return lambda value: (value * smoothing) @ weight.T

    def _awq_fp8(self, rank: _Rank, name: str) -> Callable[[Array], Array]:
        """The kernel turns INT4 into FP8 codes of one scale and multiplies them with FP8 activations."""
        weight, smoothing = self._int4(rank, name)
        second = rank.floats(f"{name}.weights_scaling_factor_2", (1,))
        scale = rank.floats(f"{name}.activation_scaling_factor", (1,))
        codes = rounded_to_fp8(weight / second)
        return lambda value: rounded_to_fp8(value * smoothing / scale) @ codes.T * (scale * second)

    def _int4(self, rank: _Rank, name: str) -> tuple[Array, Array]:
        """The weight [out, in] and the smoothing [in]; low nibbles are even rows."""
        packed = rank.raw(f"{name}.weight").view(np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1]).astype(np.int64)
        codes = np.where(nibbles > 7, nibbles - 16, nibbles)
        rows, columns = codes.shape
        group = self._quantization["group_size"]
        if columns % group:
            raise CheckpointRefusedError(f"{name} has {columns} inputs on a rank, not a multiple of {group}")
        scales = rank.floats(f"{name}.weights_scaling_factor", (rows, columns // group))
        scales = scales.astype(numpy_dtype(self._config["dtype"])).astype(np.float64)  # As when it is loaded.
        smoothing = np.ones(columns)
        if self._quantization.get("pre_quant_scale", False):
            smoothing = rank.floats(f"{name}.prequant_scaling_factor", (columns,))
        return codes * np.repeat(scales, group, axis=1), smoothing

    def _fp8(self, rank: _Rank, name: str) -> Callable[[Array], Array]:
        codes = self._codes(rank, f"{name}.weight", np.dtype(FP8))
        weight_scale = rank.floats(f"{name}.weights_scaling_factor", (1,))
        scale = rank.floats(f"{name}.activation_scaling_factor", (1,))
        return lambda value: rounded_to_fp8(value / scale) @ codes.T * (weight_scale * scale)

    def _codes(self, rank: _Rank, name: str, dtype: np.dtype[Any]) -> Array:
        stored = rank.raw(name)
        if stored.dtype == np.int8 and dtype == FP8:
            stored = stored.view(FP8)
        if stored.dtype != dtype:
            raise CheckpointRefusedError(f"{name} is {stored.dtype}, not {dtype}")
        return stored.astype(np.float64)
