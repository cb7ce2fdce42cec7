"""The arithmetic of a decoder in float64, without weights: what two readings of one model must agree on.

Float64 because rounding activations is discontinuous: in float32 two orders of a sum now and then round to two
codes, and no tolerance could tell that from a fault. In float64 they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
FP8 = ml_dtypes.float8_e4m3fn
FP8_MAX = 448.0


def rms_norm(value: Array, weight: Array, epsilon: float) -> Array:
    """Over the last axis."""
    result: Array = value / np.sqrt(np.mean(value**2, axis=-1, keepdims=True) + epsilon) * weight
    return result


def silu(value: Array) -> Array:
    return value / (1 + np.exp(-value))


def sigmoid(value: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-value))
    return result


def softmax(value: Array) -> Array:
    exponents = np.exp(value - value.max(axis=-1, keepdims=True))
    result: Array = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def rounded_to_fp8(value: Array) -> Array:
    """The nearest E4M3 value, clipped at the largest."""
    result: Array = np.clip(value, -FP8_MAX, FP8_MAX).astype(FP8).astype(np.float64)
    return result


def rounded_to_int8(value: Array) -> Array:
    """The nearest whole number in [-128, 127], ties to even."""
    result: Array = np.clip(np.rint(value), -128, 127)
    return result


@dataclass(frozen=True)
class Rotation:
    """RoPE over the whole head, in halves (not interleaved)."""

    theta: float
    scaling: dict[str, Any] | None
    """``type`` or ``rope_type`` with its parameters."""

    def __call__(self, heads: Array) -> Array:
        """``heads`` [tokens, heads, head_dim], rotated by position."""
        half = heads.shape[-1] // 2
        angles = np.arange(len(heads))[:, None, None] * self._frequencies(2 * half)
        left, right = heads[..., :half], heads[..., half:]
        cosine, sine = np.cos(angles), np.sin(angles)
        return np.concatenate([left * cosine - right * sine, right * cosine + left * sine], axis=-1)

    def _frequencies(self, head_dim: int) -> Array:
        frequencies: Array = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        scaling = self.scaling or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return frequencies
        factor = scaling["factor"]
        if kind == "linear":
            return frequencies / factor
        assert kind == "llama3", kind
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        blend = np.clip((turns - low) / (high - low), 0, 1)
        result: Array = frequencies * (blend + (1 - blend) / factor)
        return result


def attention(query: Array, key: Array, value: Array) -> Array:
    """Causal attention: query [tokens, heads, d], key and value [tokens, kv_heads, d] to [tokens, heads * d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    mixed = np.einsum("hqk,khd->qhd", softmax(scores), value)
    return mixed.reshape(len(query), -1)


def routing_weights(logits: Array, chosen: int, *, renormalize: bool) -> Array:
    """float64 [tokens, experts]: the softmax at the ``chosen`` largest, zero elsewhere."""
    probabilities = softmax(logits)
    weights = np.zeros_like(probabilities)
    largest = np.argsort(-probabilities, axis=-1, kind="stable")[:, :chosen]
    np.put_along_axis(weights, largest, np.take_along_axis(probabilities, largest, axis=-1), axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights
