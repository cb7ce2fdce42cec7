"""What is read from config.json, RoPE against transformers, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoint_factory import LLAMA3_ROPE

from enginesmith.engines.onnxruntime.architecture import (
    SUPPORTED_ROPE_TYPES,
    architecture_from_config,
)
from enginesmith.errors import SourceError
from enginesmith.platforms import ARCHITECTURES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}


def with_keys(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}


def test_sizes_that_follow_from_others() -> None:
    shape = architecture_from_config(with_keys(num_key_value_heads=None))
    assert (shape.kv_heads, shape.head_dim, shape.tied_embeddings, shape.qk_norm) == (4, 16, False, False)


def test_head_dim_left_out_is_128_for_qwen3_only() -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    sizes = {
        name: architecture_from_config(with_keys(architectures=[name], **moe)).head_dim
        for name in ARCHITECTURES
    }
    assert sizes == {name: 128 if name == "Qwen3ForCausalLM" else 16 for name in ARCHITECTURES}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, (8, 8, 8)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None, None, None)),
        ({"architectures": ["MistralForCausalLM"]}, (4096, 4096, 4096)),
        ({"architectures": ["LlamaForCausalLM"]}, (None, None, None)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}, (None, None, None)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 8, 8),
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "use_sliding_window": True},
            (None, None, None),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (8, None, None),
        ),
    ],
)
def test_windows_of_the_layers_are_transformers_own(
    changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    import transformers

    config = with_keys(**changes)
    assert architecture_from_config(config).windows == windows
    reference = getattr(transformers, config["architectures"][0].removesuffix("ForCausalLM") + "Config")(
        **config
    )
    kinds = getattr(reference, "layer_types", None) or ["sliding_attention"] * 3
    expected = getattr(reference, "sliding_window", None)
    assert windows == tuple(expected if kind == "sliding_attention" else None for kind in kinds)


ROPES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_parameters": LLAMA3_ROPE},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}},
    {"rope_theta": 1000000.0},
    {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {},
]


@pytest.mark.parametrize("keys", ROPES)
def test_rope_caches_are_those_of_transformers(keys: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = with_keys(head_dim=64, **keys)
    positions = torch.arange(600)[None]
    cosines, sines = LlamaRotaryEmbedding(LlamaConfig(**config))(torch.zeros(1), positions)

    seen_cosines, seen_sines = architecture_from_config(config).rope.caches(64, 600)

    # transformers repeats the half it needs for both halves of a head.
    np.testing.assert_allclose(seen_cosines, cosines[0, :, :32].numpy(), atol=1e-4)
    np.testing.assert_allclose(seen_sines, sines[0, :, :32].numpy(), atol=1e-4)


def test_every_rope_type_that_is_offered_is_compared_with_transformers() -> None:
    kinds = [
        parameters.get("rope_type") or parameters.get("type") or "default"
        for parameters in (keys.get("rope_parameters") or keys.get("rope_scaling") or {} for keys in ROPES)
    ]
    assert set(kinds) == set(SUPPORTED_ROPE_TYPES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel .* supported: LlamaForCausalLM, Mistral"),
        ({"architectures": None}, r"architecture \(none\)"),
        ({"hidden_act": "gelu"}, r"activation 'gelu' .* supported: silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"'yarn' .* default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, r"'dynamic'"),
        ({"partial_rotary_factor": 0.5}, r"partial rotary .* partial_rotary_factor 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial rotary"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks the key 'low_freq_factor'"),
        ({"rope_scaling": {"type": "linear"}}, r"lacks the key 'factor'"),
        ({"hidden_size": ...}, r"lacks the key 'hidden_size'"),
        ({"vocab_size": "many"}, r"wrong kind: .*'many'"),
        ({"intermediate_size": None}, r"wrong kind"),
    ],
)
def test_config_that_cannot_be_lowered_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        architecture_from_config(with_keys(**changes))


@pytest.mark.parametrize(
    ("changes", "sparse", "renormalize"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, {0, 1, 2}, True),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, {0, 1, 2}, False),
        ({"architectures": ["Qwen2MoeForCausalLM"], "mlp_only_layers": [1], "norm_topk_prob": True}, {0, 2}, True),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, {1}, False),
    ],
)  # fmt: skip
def test_experts_are_where_the_config_has_them(
    changes: dict[str, Any], sparse: set[int], renormalize: bool
) -> None:
    keys = {"num_local_experts": 4, "num_experts_per_tok": 2, **changes}
    moe = architecture_from_config(with_keys(**keys)).moe
    assert moe is not None
    assert (moe.experts, moe.experts_per_token) == (4, 2)
    assert (set(moe.sparse_layers), moe.renormalize) == (sparse, renormalize)


def test_dense_models_have_no_experts() -> None:
    assert architecture_from_config(LLAMA).moe is None
