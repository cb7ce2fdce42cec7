"""Quantization schemes as data: what a variant's ``scheme`` means, independent of any runtime.

A scheme names a ModelOpt recipe and the numbers that describe its result. Runtimes decide in
``enginesmith.platforms`` whether they can execute it; nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SchemeName = Literal["none", "int8_sq", "int8_wo", "int4_awq", "w4a8_awq", "fp8"]
KvCacheName = Literal["none", "fp8", "int8"]

KV_CACHE_ALGORITHMS: Mapping[str, KvCacheName] = {"FP8": "fp8", "INT8": "int8"}
"""``kv_cache_quant_algo`` of ModelOpt and TensorRT-LLM, and what a spec calls it."""
KV_CACHE_BOUNDS: Mapping[str, float] = {"fp8": 448.0, "int8": 127.0}
"""The largest code of a quantized KV cache: the stored scale of a range is amax / bound."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantize the linear layers of a model."""

    name: SchemeName
    title: str
    modelopt_config: str | None
    """The name of the ModelOpt preset that is the recipe's base, or None for no quantization."""
    quant_algo: str | None
    """``quant_algo`` in ModelOpt's ``hf_quant_config.json``."""
    weight_bits: int
    activation_bits: int
    grouped: bool = False
    """Weights have one scale per group of input channels, so the group size must divide them."""


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", "unquantized", None, None, 16, 16),
        Scheme("int8_sq", "W8A8 SmoothQuant", "INT8_SMOOTHQUANT_CFG", "W8A8_SQ_PER_CHANNEL", 8, 8),
        Scheme("int8_wo", "INT8 weights only", "INT8_WEIGHT_ONLY_CFG", "W8A16", 8, 16),
        Scheme("int4_awq", "INT4 AWQ", "INT4_AWQ_CFG", "W4A16_AWQ", 4, 16, grouped=True),
        Scheme("w4a8_awq", "INT4 AWQ, FP8 activations", "W4A8_AWQ_BETA_CFG", "W4A8_AWQ", 4, 8, grouped=True),
        Scheme("fp8", "FP8 (E4M3)", "FP8_DEFAULT_CFG", "FP8", 8, 8),
    )
}

GraphSchemeName = Literal["none", "fp16", "bf16", "int8", "fp8"]


@dataclass(frozen=True)
class GraphScheme:
    """One way to store and compute the heavy operators of an ONNX graph."""

    name: GraphSchemeName
    title: str
    bits: int
    calibrated: bool = False
    """Activations have ranges that are measured on samples."""


GRAPH_SCHEMES: Mapping[GraphSchemeName, GraphScheme] = {
    scheme.name: scheme
    for scheme in (
        GraphScheme("none", "FP32, as it came", 32),
        GraphScheme("fp16", "FP16, strongly typed", 16),
        GraphScheme("bf16", "BF16, strongly typed", 16),
        GraphScheme("int8", "INT8, explicit Q/DQ", 8, calibrated=True),
        GraphScheme("fp8", "FP8 (E4M3), explicit Q/DQ", 8, calibrated=True),
    )
}
