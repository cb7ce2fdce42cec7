"""What a decoder looks like, read from a Hugging Face ``config.json`` of either transformers generation.

Owns the differences between the supported architectures. Knows nothing of ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.validate import (
    MOE_ARCHITECTURES,
    QK_NORM_ARCHITECTURES,
    sparse_layers,
)
from enginesmith.errors import SourceError
from enginesmith.platforms import ARCHITECTURES

_ROPE_SCALING_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SUPPORTED_ROPE_TYPES = tuple(_ROPE_SCALING_KEYS)
_CONFIG_HINT = "compare it with the config.json that the model was published with"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding with its scaling."""

    theta: float
    kind: str
    scaling: Mapping[str, float]

    def inverse_frequencies(self, head_dim: int) -> npt.NDArray[np.float32]:
        """Inverse frequencies, float32 ``[head_dim / 2]``.

        ``llama3``: the piecewise interpolation published with Llama 3.1; frequencies between the two wavelength
        bounds are blended linearly. Computed in float32, as transformers does.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        if self.kind == "linear":
            return (frequencies / np.float32(self.scaling["factor"])).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def _llama3(self, frequencies: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        factor, low, high = (self.scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original_length = self.scaling["original_max_position_embeddings"]
        wavelengths = 2 * np.pi / frequencies
        blend = (original_length / wavelengths - low) / (high - low)
        smoothed = (1 - blend) * frequencies / factor + blend * frequencies
        scaled = np.where(wavelengths > original_length / low, frequencies / factor, smoothed)
        return np.where(wavelengths < original_length / high, frequencies, scaled).astype(np.float32)

    def caches(
        self, head_dim: int, positions: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Cosines and sines, each float32 ``[positions, head_dim / 2]``."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies(head_dim))
        return np.cos(angles), np.sin(angles)


@dataclass(frozen=True)
class MixtureOfExperts:
    """How the layers in ``sparse_layers`` choose among their experts."""

    experts: int
    experts_per_token: int
    renormalize: bool
    """Whether the weights of the chosen experts are scaled to add up to one."""
    shared_expert: bool
    sparse_layers: frozenset[int]


@dataclass(frozen=True)
class Architecture:
    """The shape of one decoder-only model."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    max_positions: int
    rope: Rope
    tied_embeddings: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Sliding attention window of each layer in tokens, the token itself included; None for full attention."""
    moe: MixtureOfExperts | None = None


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Raises:
        SourceError: the architecture, its activation or its RoPE scaling is not supported, or a key is missing.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    if name not in ARCHITECTURES:
        raise SourceError(
            f"architecture {name} cannot be lowered to ONNX Runtime; supported: {', '.join(ARCHITECTURES)}"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise SourceError(
            f"activation {activation!r} of {name} cannot be lowered to ONNX Runtime; supported: silu"
        )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Architecture(
            name=name,
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=_head_dim(name, config),
            vocab_size=int(config["vocab_size"]),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            max_positions=int(config["max_position_embeddings"]),
            rope=_rope(config),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=name in QK_NORM_ARCHITECTURES,
            windows=_windows(name, config),
            moe=_mixture_of_experts(name, config),
        )
    except KeyError as error:
        raise SourceError(f"config.json of {name} lacks the key {error}", hint=_CONFIG_HINT) from error
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"config.json of {name} holds a value of the wrong kind: {error}", hint=_CONFIG_HINT
        ) from error


def _head_dim(name: str, config: Mapping[str, Any]) -> int:
    # Qwen3 is the one whose default does not follow from the other sizes.
    default = 128 if name == "Qwen3ForCausalLM" else config["hidden_size"] // config["num_attention_heads"]
    return int(config.get("head_dim") or default)


def _mixture_of_experts(name: str, config: Mapping[str, Any]) -> MixtureOfExperts | None:
    if name not in MOE_ARCHITECTURES:
        return None
    mixtral = name == "MixtralForCausalLM"
    # transformers 5 writes num_local_experts for Qwen3-MoE, transformers 4 wrote num_experts.
    experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    layers = int(config["num_hidden_layers"])
    return MixtureOfExperts(
        experts=int(experts),
        experts_per_token=int(config["num_experts_per_tok"]),
        renormalize=mixtral or bool(config.get("norm_topk_prob", False)),
        shared_expert=name == "Qwen2MoeForCausalLM",
        sparse_layers=frozenset(range(layers)) if mixtral else sparse_layers(config, layers),
    )


def _rope(config: Mapping[str, Any]) -> Rope:
    """RoPE from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind not in _ROPE_SCALING_KEYS:
        raise SourceError(
            f"RoPE scaling {kind!r} cannot be lowered to ONNX Runtime; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if (parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise SourceError(
            "partial rotary embeddings cannot be lowered to ONNX Runtime; supported: partial_rotary_factor 1"
        )
    return Rope(theta, kind, {key: float(parameters[key]) for key in _ROPE_SCALING_KEYS[kind]})


def _windows(name: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = int(config["num_hidden_layers"])
    # transformers' default; null switches the window off. Mixtral's default is none.
    window = config.get("sliding_window", None if name == "MixtralForCausalLM" else 4096)
    always = name in ("MistralForCausalLM", "MixtralForCausalLM")
    if window is None or not (always or config.get("use_sliding_window", False)):
        return (None,) * layers
    kinds = config.get("layer_types")
    if always or name == "Qwen3MoeForCausalLM":
        kinds = kinds or ["sliding_attention"] * layers
    if kinds is None:
        first = int(config.get("max_window_layers", 28))
        alternating = (
            name == "Qwen2MoeForCausalLM"
        )  # Every other layer below the bound, where Qwen2 has all above.
        slides = [
            layer % 2 == 0 and layer < first if alternating else layer >= first for layer in range(layers)
        ]
        kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
