"""TensorRT-LLM's ``config.json``: what ``PretrainedConfig`` and its subclasses read in 1.2.

Keys: ``models/modeling_utils.py``, ``models/llama/config.py``, ``models/qwen/config.py``, ``layers/moe.py``. RoPE is
always written; ModelOpt's exporter loses it with transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from enginesmith.engines.tensorrt_llm.decoder import Decoder, Experts
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.engines.tensorrt_llm.plan import ConversionPlan
from enginesmith.engines.tensorrt_llm.quantization import Quantization
from enginesmith.errors import SourceError, SpecError

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DEFAULT_EXCLUSIONS = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
    "*fused_a",
)
"""What TensorRT-LLM excludes when no list is given. A list replaces them, so ours begins with them."""


def checkpoint_config(plan: ConversionPlan) -> dict[str, Any]:
    """The document for ``config.json``."""
    decoder = plan.decoder
    document: dict[str, Any] = {
        "architecture": decoder.architecture,
        "dtype": DTYPES[plan.dtype],
        "logits_dtype": "float32",
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_size": decoder.head_dim,
        "qk_layernorm": decoder.qk_norm,
        # The expert plugin wants the gate spelled out; the dense layer implies it.
        "hidden_act": "swiglu" if decoder.experts else "silu",
        "norm_epsilon": decoder.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": decoder.max_positions,
        "rotary_base": decoder.rope_base,
        "rotary_scaling": dict(decoder.rope_scaling) if decoder.rope_scaling else None,
        "attn_bias": decoder.qkv_bias,
        "mlp_bias": decoder.mlp_bias,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": plan.mapping.document(),
        "quantization": quantization_document(plan.quantization, decoder, plan.mapping),
    }
    if decoder.experts is not None:
        document["moe"] = _moe(decoder.experts)
    if decoder.architecture.startswith("Qwen"):
        document |= _qwen(decoder)
    windows = attention_windows(decoder)
    if windows is not None:
        document["runtime_defaults"] = {"max_attention_window": windows}
    return document


def attention_windows(decoder: Decoder) -> list[int] | None:
    """The sliding window of every layer in tokens, or None where no layer has one that the context can exceed."""
    widths = [min(window or decoder.max_positions, decoder.max_positions) for window in decoder.windows]
    return widths if any(width < decoder.max_positions for width in widths) else None


def quantization_document(quantization: Quantization, decoder: Decoder, mapping: Mapping) -> dict[str, Any]:
    """The ``quantization`` section: ``QuantConfig``, in which an unknown key is an error.

    Raises:
        SpecError: the excluded layers cannot be named for a pipeline of several stages.
    """
    algorithm = quantization.algorithm
    document: dict[str, Any] = {
        "quant_algo": None if algorithm == "none" else algorithm,
        "kv_cache_quant_algo": quantization.kv_algorithm,
    }
    if quantization.grouped:
        document |= {"group_size": quantization.group_size, "has_zero_point": False, "pre_quant_scale": True}
    if algorithm != "none":
        document["exclude_modules"] = _exclusions(quantization, decoder, mapping)
    return document


def _exclusions(quantization: Quantization, decoder: Decoder, mapping: Mapping) -> list[str]:
    """The modules that stay in 16 bits, by TensorRT-LLM's names.

    It numbers the layers of every stage from 0 and has one list for all stages. So a layer's name stands for one
    layer of each stage, and the list is right only if those are excluded together.
    """
    defaults = list(DEFAULT_EXCLUSIONS)
    if not decoder.tied and quantization.of("lm_head") != "none":
        defaults.remove("*lm_head")
    excluded: dict[str, int] = {}
    kept: dict[str, int] = {}
    for stage in range(mapping.pipeline):
        for local, layer in enumerate(mapping.stage_layers(stage, decoder.layers)):
            for module, source in _modules(decoder, layer):
                name = f"transformer.layers.{local}.{module}"
                (excluded if quantization.of(source) == "none" else kept)[name] = layer
    if (
        decoder.experts is not None
        and decoder.experts.shared_intermediate
        and any(name.endswith(".mlp") for name in excluded)
    ):
        raise SourceError(
            f"TensorRT-LLM cannot leave the experts of {decoder.architecture} in 16 bits while the rest is quantized",
            hint="quantize the experts as well, or nothing",
        )
    clash = next((name for name in sorted(excluded) if name in kept), None)
    if clash is not None:
        raise SpecError(
            f"with pipeline parallelism {mapping.pipeline}, {clash} names both layer {excluded[clash]}, which is excluded "
            f"from quantization, and layer {kept[clash]}, which is not; TensorRT-LLM cannot tell them apart",
            hint="choose pipeline parallelism 1, or exclude the same layers of every stage",
        )
    return [*defaults, *sorted(excluded)]


def _modules(decoder: Decoder, layer: int) -> Iterator[tuple[str, str]]:
    """TensorRT-LLM's quantizable modules of a layer, each with a source layer that decides for it."""
    query, _, _, output = decoder.attention(layer)
    yield "attention.qkv", query.name
    yield "attention.dense", output.name
    if decoder.experts is None:
        gate, up, down = decoder.mlp(layer)
        yield "mlp.fc", gate.name
        yield "mlp.gate", up.name
        yield "mlp.proj", down.name
        return
    yield "mlp", decoder.expert(layer, 0)[0].name
    if decoder.experts.shared_intermediate:
        gate, _, down = decoder.shared_expert(layer)
        yield "mlp.shared_expert.fc", gate.name
        yield "mlp.shared_expert.proj", down.name


def _moe(experts: Experts) -> dict[str, Any]:
    # ExpertScaleNormalizationMode: 0 leaves the router's probabilities, 1 scales those of the chosen to a sum of 1.
    return {
        "num_experts": experts.count,
        "top_k": experts.per_token,
        "normalization_mode": int(experts.renormalize),
    }


def _qwen(decoder: Decoder) -> dict[str, Any]:
    document: dict[str, Any] = {
        "qwen_type": decoder.model_type,
        "seq_length": 8192,  # Read only with use_logn_attn, but read always.
        "use_logn_attn": False,
        "tie_word_embeddings": decoder.tied,
    }
    if decoder.experts is not None:
        document |= {
            "moe_intermediate_size": decoder.experts.intermediate,
            "moe_shared_expert_intermediate_size": decoder.experts.shared_intermediate,
        }
    return document
