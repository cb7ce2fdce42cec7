"""A unified Hugging Face checkpoint computed in float64: the other reading of what the interpreter computes.

``fused=False`` is ModelOpt's own arithmetic, comparable with PyTorch. ``fused=True`` is what a runtime computes that
multiplies q, k and v in one product, gate and up in another, and has one scale for the cache of keys and values:
where the checkpoint has several scales and the runtime one, the largest counts, and FP8 codes are rounded to it once
more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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

from enginesmith.checkpoints.tensors import CheckpointTensors

_Product = Callable[[Array], Array]
_EXPERT_PARTS = {True: ("w1", "w3", "w2"), False: ("gate_proj", "up_proj", "down_proj")}


class HuggingFaceArithmetic:
    """A loaded checkpoint of any supported dense or mixture-of-experts architecture, full attention."""

    def __init__(self, directory: Path, *, fused: bool) -> None:
        self._tensors = CheckpointTensors(directory)
        self._fused = fused
        config = self._tensors.config
        self._config = config
        self._heads, self._kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._head_dim = config.get("head_dim") or config["hidden_size"] // self._heads
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
        self._rotation = Rotation(theta, parameters)
        self._mixtral = config["architectures"] == ["MixtralForCausalLM"]
        quantization = self._tensors.quantization or {}
        self._algorithm = quantization.get("quant_algo")
        self._cache = quantization.get("kv_cache_quant_algo")

    def logits(self, tokens: npt.NDArray[np.int64]) -> Array:
        """float64 [tokens, vocabulary] of one prompt."""
        hidden = self._floats("model.embed_tokens.weight")[tokens]
        for layer in range(self._config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            hidden = hidden + self._attention(
                f"{name}.self_attn", self._norm(f"{name}.input_layernorm", hidden)
            )
            hidden = hidden + self._feed_forward(name, self._norm(f"{name}.post_attention_layernorm", hidden))
        hidden = self._norm("model.norm", hidden)
        if "lm_head.weight" in self._tensors:
            return self._apply("lm_head", hidden)
        return hidden @ self._floats("model.embed_tokens.weight").T

    def _floats(self, name: str) -> Array:
        return self._tensors.read(name).astype(np.float64)

    def _scale(self, name: str) -> float:
        return float(self._tensors.read(name).reshape(()))

    def _norm(self, name: str, value: Array) -> Array:
        return rms_norm(value, self._floats(f"{name}.weight"), self._config["rms_norm_eps"])

    def _attention(self, name: str, value: Array) -> Array:
        projections = [f"{name}.{part}_proj" for part in "qkv"]
        together = projections if self._fused else None
        query, key, values = (
            self._apply(projection, value, together=together).reshape(len(value), -1, self._head_dim)
            for projection in projections
        )
        if f"{name}.q_norm.weight" in self._tensors:
            query, key = self._norm(f"{name}.q_norm", query), self._norm(f"{name}.k_norm", key)
        query, key = self._rotation(query), self._rotation(key)
        if self._cache is not None:
            key, values = self._cached(name, key, values)
        return self._apply(f"{name}.o_proj", attention(query, key, values))

    def _cached(self, name: str, key: Array, value: Array) -> tuple[Array, Array]:
        scales = [self._scale(f"{name}.{part}_proj.{part}_scale") for part in "kv"]
        if self._fused:
            # ModelOpt's exporter for TensorRT-LLM never gives an FP8 cache a scale below 1.
            scales = [max(*scales, 1.0 if self._cache == "FP8" else 0.0)] * 2
        rounded = {"FP8": rounded_to_fp8, "INT8": rounded_to_int8}[self._cache or ""]
        first, second = (
            rounded(part / scale) * scale for part, scale in zip((key, value), scales, strict=True)
        )
        return first, second

    def _feed_forward(self, layer: str, value: Array) -> Array:
        block = f"{layer}.block_sparse_moe" if self._mixtral else f"{layer}.mlp"
        if f"{block}.gate.weight" not in self._tensors:
            return self._gated(block, _EXPERT_PARTS[False], value)
        weights = routing_weights(
            value @ self._floats(f"{block}.gate.weight").T,
            self._config["num_experts_per_tok"],
            renormalize=self._mixtral or self._config["norm_topk_prob"],
        )
        parts = _EXPERT_PARTS[self._mixtral]
        total = np.zeros_like(value)
        for expert in range(weights.shape[1]):
            output = self._gated(f"{block}.experts.{expert}", parts, value)
            total += weights[:, expert, None] * output
        if f"{block}.shared_expert_gate.weight" in self._tensors:
            openness = sigmoid(value @ self._floats(f"{block}.shared_expert_gate.weight").T)
            total += openness * self._gated(f"{block}.shared_expert", _EXPERT_PARTS[False], value)
        return total

    def _gated(self, name: str, parts: tuple[str, str, str], value: Array) -> Array:
        gate, up, down = (f"{name}.{part}" for part in parts)
        together = [gate, up] if self._fused else None
        activated = silu(self._apply(gate, value, together=together))
        return self._apply(down, activated * self._apply(up, value, together=together))

    def _apply(self, name: str, value: Array, *, together: Sequence[str] | None = None) -> Array:
        """The layer at ``name``; ``together`` names the layers that share its one product, itself included."""
        output = self._product(name, together or [name])(value)
        return output + self._floats(f"{name}.bias") if f"{name}.bias" in self._tensors else output

    def _product(self, name: str, together: Sequence[str]) -> _Product:
        if f"{name}.weight_scale" not in self._tensors:
            weight = self._floats(f"{name}.weight")
            return lambda value: value @ weight.T
        smoothing = (
            self._floats(f"{name}.pre_quant_scale")
            if f"{name}.pre_quant_scale" in self._tensors
            else np.float64(1)
        )
        if self._algorithm == "W8A16":
            weight = self._int8_as_stored_floats(name)
            return lambda value: value @ weight.T
        if self._algorithm == "W4A16_AWQ":
            weight = self._int4(name)
            return lambda value: (value * smoothing) @ weight.T
        scale = max(self._scale(f"{layer}.input_scale") for layer in together)
        if self._algorithm == "W8A8_SQ_PER_CHANNEL":
            codes, row_scales = self._floats(f"{name}.weight"), self._floats(f"{name}.weight_scale")
            return lambda value: rounded_to_int8(value * smoothing / scale) @ codes.T * row_scales * scale
        codes, second = self._fp8_codes(name, together)
        return lambda value: rounded_to_fp8(value * smoothing / scale) @ codes.T * (scale * second)

    def _int8_as_stored_floats(self, name: str) -> Array:
        """INT8 weights as TensorRT-LLM wants them: 16-bit floats, which its builder quantizes again."""
        codes, scales = self._tensors.read(f"{name}.weight"), self._tensors.read(f"{name}.weight_scale")
        weight = codes.astype(np.float32) * scales[:, None]
        if self._fused:
            weight = weight.astype(self._tensors.read("model.norm.weight").dtype)
        return weight.astype(np.float64)

    def _int4(self, name: str) -> Array:
        codes, scales = self._int4_codes(name), self._floats(f"{name}.weight_scale")
        return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)

    def _int4_codes(self, name: str) -> Array:
        packed = self._tensors.read(f"{name}.weight")
        codes = np.empty((2 * len(packed), packed.shape[1]))
        for offset, nibble in ((0, packed & 15), (1, packed >> 4)):
            codes[offset::2] = (nibble.astype(np.int64) ^ 8) - 8
        return codes

    def _fp8_codes(self, name: str, together: Sequence[str]) -> tuple[Array, float]:
        """FP8 codes [out, in] in float64, and their one scale."""
        if self._algorithm == "W4A8_AWQ":
            second = max(self._scale(f"{layer}.weight_scale_2") for layer in together)
            if self._fused:
                return rounded_to_fp8(self._int4(name) / second), second
            return self._fp8_codes_of_modelopt(name), second
        codes = self._tensors.read(f"{name}.weight")
        own = self._tensors.read(f"{name}.weight_scale").reshape(())
        largest = max(self._tensors.read(f"{layer}.weight_scale").reshape(()) for layer in together)
        if own != largest:
            codes = (codes.astype(np.float32) * own / largest).astype(FP8)
        return codes.astype(np.float64), float(largest)

    def _fp8_codes_of_modelopt(self, name: str) -> Array:
        """As ModelOpt 0.47 rounds them, in float32: INT4 values can lie in the very middle of two FP8 values."""
        scales = self._tensors.read(f"{name}.weight_scale")
        steps = np.float32(7) / (scales * np.float32(7))
        codes = self._int4_codes(name).astype(np.float32)
        values = codes / np.repeat(steps, codes.shape[1] // steps.shape[1], axis=1)
        amax = self._tensors.read(f"{name}.weight_scale_2").reshape(()) * np.float32(448)
        factor = np.float32(1) / amax * np.float32(448)
        return rounded_to_fp8((values * factor).astype(np.float64))


def relative_error(seen: Array, expected: Array) -> float:
    """The largest difference, relative to the largest expected value."""
    error: Any = np.abs(seen - expected).max() / np.abs(expected).max()
    return float(error)
