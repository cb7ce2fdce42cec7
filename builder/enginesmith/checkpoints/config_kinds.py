"""Whether the keys of a ``config.json`` hold values of the right kind, before anything calculates with them.

Knows kinds only: which keys a model needs and which sizes fit together is judged where they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from enginesmith.errors import SourceError


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: object) -> bool:
    return _is_size(value) and value != 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_KINDS: tuple[tuple[str, Callable[[object], bool], tuple[str, ...]], ...] = (
    (
        "a whole number of at least 1",
        _is_positive,
        (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
            *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
        ),
    ),
    (
        "a whole number of 0 or more",
        _is_size,
        (
            *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace"),
            *("decoder_sparse_step", "max_window_layers", "sliding_window"),
        ),
    ),
    ("a number", _is_number, ("rms_norm_eps", "rope_theta", "partial_rotary_factor")),
    ("a list of names", _is_texts, ("architectures", "layer_types")),
    ("a list of layers", _is_sizes, ("mlp_only_layers",)),
    ("an object", _is_object, ("rope_parameters", "rope_scaling", "quantization_config")),
)


def check_kinds(config: Mapping[str, Any], path: Path) -> None:
    """Raise a SourceError that names the first key of the wrong kind; ``path`` is for the message. Null is no value."""
    for kind, fits, keys in _KINDS:
        for key in keys:
            value = config.get(key)
            if value is not None and not fits(value):
                raise SourceError(
                    f"{path}: {key} must be {kind}, seen: {value!r}",
                    hint="compare it with the config.json that the model was published with",
                )
