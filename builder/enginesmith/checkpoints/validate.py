"""Whether a checkpoint directory is one that the rest of the build can use, judged from headers and config alone.

Owns the list of supported architectures and the tensors each must have. Reads no tensor data, imports no torch.
``tensors`` has already refused files that are damaged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.config_kinds import check_kinds
from enginesmith.checkpoints.tensors import CONFIG_FILE, CheckpointTensors
from enginesmith.errors import SourceError
from enginesmith.platforms import ARCHITECTURES
from enginesmith.platforms import MOE_ARCHITECTURES as MOE_ARCHITECTURES

WEIGHT_DTYPES = ("BF16", "F16", "F32")
"""Dtypes of an unquantized checkpoint."""
QUANTIZED_DTYPES = ("I8", "U8", "F8_E4M3")
"""Further dtypes of the projection weights in a checkpoint that ModelOpt quantized."""

QK_NORM_ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Architectures that normalize every query and key head."""
_DEFAULT_KV_HEADS: Mapping[str, int] = {
    "MistralForCausalLM": 8,
    "Qwen2ForCausalLM": 32,
    "Qwen3ForCausalLM": 32,
    "MixtralForCausalLM": 8,
    "Qwen2MoeForCausalLM": 16,
    "Qwen3MoeForCausalLM": 4,
}
_ATTENTION_BIAS_KEY: Mapping[str, tuple[str, bool]] = {"Qwen2MoeForCausalLM": ("qkv_bias", True)}
_QKV_BIAS_ONLY = ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")
_BIASED_ON_REQUEST = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class CheckpointSummary:
    """What a valid checkpoint is. ``parameters`` counts a tied output head once and packed INT4 as two a byte."""

    architecture: str
    parameters: int
    weight_bytes: int
    dtype: str
    """The safetensors dtype that most of the weight bytes have."""


@dataclass(frozen=True)
class MoeDimensions:
    """The experts of a mixture-of-experts model."""

    experts: int
    intermediate_size: int
    """Of each expert."""
    shared_intermediate_size: int | None
    """Of the expert that every token visits (Qwen2-MoE), or None where there is none."""
    sparse_layers: frozenset[int]
    """The layers that have experts; the others have one dense MLP."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes in ``config.json`` that decide tensor shapes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    moe: MoeDimensions | None = None


def validate_checkpoint(directory: Path) -> CheckpointSummary:
    """What the checkpoint in ``directory`` is, when nothing about its config and tensors is wrong.

    Raises:
        SourceError: names the file or tensor, what was expected and what was seen.
    """
    tensors = CheckpointTensors(directory)
    architecture = architecture_of(tensors.config, directory / CONFIG_FILE)
    dimensions = dimensions_of(tensors.config, architecture, directory / CONFIG_FILE)
    expected = expected_shapes(architecture, dimensions)
    quantized = tensors.quantization is not None
    for (
        name
    ) in tensors.names():  # First, because it explains a quantized checkpoint without its description best.
        _check_dtype(tensors, name, quantized=quantized)
    _check_names(tensors, expected, quantized=quantized, layers=dimensions.layers)
    packed = sum(_check_shape(tensors, name, shape) for name, shape in expected.items())
    bytes_by_dtype: Counter[str] = Counter()
    for name in tensors.names():
        bytes_by_dtype[tensors.dtype(name)] += tensors.nbytes(name)
    stored = sum(math.prod(tensors.shape(name)) for name in expected)
    return CheckpointSummary(
        architecture, stored + packed, bytes_by_dtype.total(), bytes_by_dtype.most_common(1)[0][0]
    )


def summarize_checkpoint(directory: Path) -> CheckpointSummary:
    """What the checkpoint in ``directory`` is, of whatever architecture; every shard must be there and whole.

    ``parameters`` counts stored elements: scales and packed integers as they lie in the files.

    Raises:
        SourceError: a file is missing or damaged, or the config names no architecture.
    """
    tensors = CheckpointTensors(directory)
    match tensors.config.get("architectures"):
        case [str(architecture)]:
            pass
        case seen:
            raise SourceError(f"{directory / CONFIG_FILE} must name one architecture, seen: {seen!r}")
    bytes_by_dtype: Counter[str] = Counter()
    for name in tensors.names():
        bytes_by_dtype[tensors.dtype(name)] += tensors.nbytes(name)
    stored = sum(math.prod(tensors.shape(name)) for name in tensors.names())
    return CheckpointSummary(
        architecture, stored, bytes_by_dtype.total(), bytes_by_dtype.most_common(1)[0][0]
    )


def architecture_of(config: Mapping[str, Any], path: Path) -> str:
    """The one supported architecture that a ``config.json`` names; ``path`` is for the message."""
    allowed = ", ".join(ARCHITECTURES)
    match config.get("architectures"):
        case [str(architecture)] if architecture in ARCHITECTURES:
            return architecture
        case [str(architecture)]:
            raise SourceError(
                f"{path} names architecture {architecture}, which is not supported; supported: {allowed}",
                hint="choose a model of a supported architecture",
            )
        case seen:
            raise SourceError(
                f"{path} must name one architecture, seen: {seen!r}; supported: {allowed}",
                hint='add "architectures": ["..."] as transformers writes it',
            )


def dimensions_of(config: Mapping[str, Any], architecture: str, path: Path) -> Dimensions:
    """The sizes in a ``config.json``, with the defaults that transformers gives to the keys left out."""

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise SourceError(f"{path}: {key} must be a whole number of at least 1, seen: {value!r}")
        return value

    check_kinds(config, path)
    heads, hidden_size = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", _kv_heads_default(config, architecture, heads))
    if heads % kv_heads:
        raise SourceError(f"{path}: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    # Qwen3 is the one whose default does not follow from the other sizes.
    head_dim = size("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden_size // heads)
    layers = size("num_hidden_layers")
    return Dimensions(
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get(*_ATTENTION_BIAS_KEY.get(architecture, ("attention_bias", False)))),
        mlp_bias=bool(config.get("mlp_bias", False)),
        moe=_moe_of(config, architecture, size, layers=layers),
    )


def _moe_of(
    config: Mapping[str, Any], architecture: str, size: Callable[[str], int], *, layers: int
) -> MoeDimensions | None:
    if architecture not in MOE_ARCHITECTURES:
        return None
    if architecture == "MixtralForCausalLM":
        sparse = range(layers)
        return MoeDimensions(size("num_local_experts"), size("intermediate_size"), None, frozenset(sparse))
    # transformers 5 writes num_local_experts for Qwen3-MoE, transformers 4 wrote num_experts.
    experts = size("num_experts" if "num_experts" in config else "num_local_experts")
    shared = size("shared_expert_intermediate_size") if architecture == "Qwen2MoeForCausalLM" else None
    return MoeDimensions(experts, size("moe_intermediate_size"), shared, sparse_layers(config, layers))


def sparse_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """The layers of a Qwen-MoE model that have experts, as its ``config.json`` says."""
    step, dense = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or []
    return frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _kv_heads_default(config: Mapping[str, Any], architecture: str, heads: int) -> int:
    if "num_key_value_heads" in config:  # null: as many as there are query heads
        return heads
    return _DEFAULT_KV_HEADS.get(architecture, heads)


def expected_shapes(architecture: str, dimensions: Dimensions) -> dict[str, _Shape]:
    """The shape of every tensor of an unquantized model, by name; without ``lm_head`` when it is tied."""
    hidden = dimensions.hidden_size
    shapes: dict[str, _Shape] = {
        "model.embed_tokens.weight": (dimensions.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not dimensions.tied:
        shapes["lm_head.weight"] = (dimensions.vocab_size, hidden)
    for layer in range(dimensions.layers):
        prefix = f"model.layers.{layer}"
        for name, shape in _attention_shapes(architecture, dimensions):
            shapes[f"{prefix}.{name}"] = shape
        for name, shape in _mlp_shapes(architecture, dimensions, layer):
            shapes[f"{prefix}.{name}"] = shape
    return shapes


def _attention_shapes(architecture: str, dimensions: Dimensions) -> Iterator[tuple[str, _Shape]]:
    hidden = dimensions.hidden_size
    query, key_value = dimensions.heads * dimensions.head_dim, dimensions.kv_heads * dimensions.head_dim
    qkv_bias = architecture == "Qwen2ForCausalLM" or (
        architecture in _BIASED_ON_REQUEST and dimensions.attention_bias
    )
    output_bias = qkv_bias and architecture not in _QKV_BIAS_ONLY
    for name, rows, columns, bias in (
        ("self_attn.q_proj", query, hidden, qkv_bias),
        ("self_attn.k_proj", key_value, hidden, qkv_bias),
        ("self_attn.v_proj", key_value, hidden, qkv_bias),
        ("self_attn.o_proj", hidden, query, output_bias),
    ):
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)
    if architecture in QK_NORM_ARCHITECTURES:
        yield "self_attn.q_norm.weight", (dimensions.head_dim,)
        yield "self_attn.k_norm.weight", (dimensions.head_dim,)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _mlp_shapes(architecture: str, dimensions: Dimensions, layer: int) -> Iterator[tuple[str, _Shape]]:
    hidden, intermediate = dimensions.hidden_size, dimensions.intermediate_size
    moe = dimensions.moe
    if moe is None or layer not in moe.sparse_layers:
        names = ("gate_proj", "up_proj", "down_proj")
        yield from _gated_mlp_shapes("mlp", names, hidden, intermediate)
        if architecture == "LlamaForCausalLM" and dimensions.mlp_bias:
            for name, rows in zip(names, (intermediate, intermediate, hidden), strict=True):
                yield f"mlp.{name}.bias", (rows,)
        return
    block, names = moe_block(architecture)
    yield f"{block}.gate.weight", (moe.experts, hidden)
    for expert in range(moe.experts):
        yield from _gated_mlp_shapes(f"{block}.experts.{expert}", names, hidden, moe.intermediate_size)
    if moe.shared_intermediate_size is not None:
        yield from _gated_mlp_shapes(f"{block}.shared_expert", names, hidden, moe.shared_intermediate_size)
        yield f"{block}.shared_expert_gate.weight", (1, hidden)


def moe_block(architecture: str) -> tuple[str, tuple[str, str, str]]:
    """Where a layer of a mixture-of-experts model keeps its experts, and what it calls gate, up and down."""
    if architecture == "MixtralForCausalLM":
        return "block_sparse_moe", ("w1", "w3", "w2")
    return "mlp", ("gate_proj", "up_proj", "down_proj")


def _gated_mlp_shapes(
    prefix: str, names: tuple[str, str, str], hidden: int, intermediate: int
) -> Iterator[tuple[str, _Shape]]:
    gate, up, down = names
    yield f"{prefix}.{gate}.weight", (intermediate, hidden)
    yield f"{prefix}.{up}.weight", (intermediate, hidden)
    yield f"{prefix}.{down}.weight", (hidden, intermediate)


def _check_names(
    tensors: CheckpointTensors, expected: Mapping[str, _Shape], *, quantized: bool, layers: int
) -> None:
    missing = sorted(expected.keys() - set(tensors.names()))
    if missing:
        raise SourceError(
            f"{tensors.directory} has no tensor {missing[0]}, which its {CONFIG_FILE} calls for ({len(missing)} tensors are missing)",
            hint=f"{CONFIG_FILE} and the weights may belong to different models, or a shard was left out",
        )
    for name in tensors.names():
        if name in expected or name == "lm_head.weight" or name.endswith(".rotary_emb.inv_freq"):
            continue  # A tied head may be stored as well; inv_freq is a constant that old exporters wrote.
        if quantized and name.endswith(("_scale", "_scale_2")):
            continue
        seen_layer = name.removeprefix("model.layers.").split(".")[0]
        if seen_layer.isdigit() and int(seen_layer) >= layers:
            raise SourceError(
                f"{tensors.entry(name).file} holds tensor {name}, but {CONFIG_FILE} says num_hidden_layers: {layers}",
                hint=f"{CONFIG_FILE} and the weights belong to different models",
            )
        raise SourceError(
            f"{tensors.entry(name).file} holds tensor {name}, which {CONFIG_FILE} does not call for; it would be ignored silently",
            hint=f"compare {CONFIG_FILE} with the model's own, e.g. attention_bias, mlp_bias and architectures",
        )


def _check_dtype(tensors: CheckpointTensors, name: str, *, quantized: bool) -> None:
    allowed = (*WEIGHT_DTYPES, *QUANTIZED_DTYPES) if quantized else WEIGHT_DTYPES
    if tensors.dtype(name) in allowed:
        return
    hint = "give the model's original weights; quantization is a step of the build"
    if not quantized and tensors.dtype(name) in QUANTIZED_DTYPES:
        hint += ". For a checkpoint that ModelOpt quantized, hf_quant_config.json must be beside it"
    raise SourceError(
        f"{tensors.entry(name).file}: tensor {name} has dtype {tensors.dtype(name)}; allowed: {', '.join(allowed)}",
        hint=hint,
    )


def _check_shape(tensors: CheckpointTensors, name: str, expected: _Shape) -> int:
    """How many parameters tensor ``name`` has beyond its stored elements (packed INT4), once its shape is right."""
    seen = tensors.shape(name)
    # ModelOpt packs two INT4 values of neighbouring output channels into one byte.
    packed = tensors.dtype(name) == "U8" and len(expected) == 2
    stored = (expected[0] // 2, expected[1]) if packed else expected
    if seen != stored:
        raise SourceError(
            f"{tensors.entry(name).file}: tensor {name} has shape {list(seen)}, {CONFIG_FILE} implies {list(stored)}",
            hint=f"{CONFIG_FILE} and the weights belong to different models",
        )
    return math.prod(expected) - math.prod(stored)
