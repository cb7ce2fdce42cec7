"""What the decoder in a Hugging Face checkpoint looks like, and which tensors it must have.

Owns the differences between the supported architectures on the Hugging Face side, for dense and mixture-of-experts
models, with ``config.json`` of either transformers generation. Knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import CONFIG_FILE, CheckpointTensors
from enginesmith.checkpoints.validate import architecture_of, dimensions_of
from enginesmith.errors import SourceError

_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_CONFIG_HINT = "compare it with the config.json that the model was published with"
_QWEN_MOE = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in every layer."""

    count: int
    per_token: int
    intermediate: int
    """Rows of each expert's gate and up projections."""
    shared_intermediate: int
    """The same for the expert that sees every token; 0 when there is none."""
    renormalize: bool
    """Whether the weights of the chosen experts are scaled to a sum of 1."""
    prefix: str
    """The module below a layer: ``block_sparse_moe`` or ``mlp``."""
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Module:
    """One linear layer: its module path and the shape of its weight, ``[rows, columns]``, unpacked."""

    name: str
    rows: int
    columns: int
    bias: bool = False


@dataclass(frozen=True)
class Decoder:
    """The shape of one decoder-only model."""

    architecture: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_epsilon: float
    max_positions: int
    rope_base: float
    rope_scaling: Mapping[str, Any] | None
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Sliding attention window of each layer in tokens; None for full attention."""
    experts: Experts | None

    @property
    def head(self) -> str:
        """The tensor that the output head is made from."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def attention(self, layer: int) -> tuple[Module, Module, Module, Module]:
        """q, k, v and output projections of a layer."""
        base = f"model.layers.{layer}.self_attn"
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Module(f"{base}.q_proj", query, self.hidden, self.qkv_bias),
            Module(f"{base}.k_proj", key, self.hidden, self.qkv_bias),
            Module(f"{base}.v_proj", key, self.hidden, self.qkv_bias),
            Module(f"{base}.o_proj", self.hidden, query, self.output_bias),
        )

    def mlp(self, layer: int) -> tuple[Module, Module, Module]:
        """gate, up and down projections of a dense layer."""
        return self._gated(f"model.layers.{layer}.mlp", self.intermediate, bias=self.mlp_bias)

    def shared_expert(self, layer: int) -> tuple[Module, Module, Module]:
        """gate, up and down projections of the expert that sees every token."""
        assert self.experts is not None
        return self._gated(f"model.layers.{layer}.mlp.shared_expert", self.experts.shared_intermediate)

    def expert(self, layer: int, number: int) -> tuple[Module, Module, Module]:
        """gate, up and down projections of one expert."""
        assert self.experts is not None
        base = f"model.layers.{layer}.{self.experts.prefix}.experts.{number}"
        size = self.experts.intermediate
        return (
            Module(f"{base}.{self.experts.gate}", size, self.hidden),
            Module(f"{base}.{self.experts.up}", size, self.hidden),
            Module(f"{base}.{self.experts.down}", self.hidden, size),
        )

    def router(self, layer: int) -> str:
        """The module that chooses experts; its weight is ``[experts, hidden]``."""
        assert self.experts is not None
        return f"model.layers.{layer}.{self.experts.prefix}.gate"

    def linears(self, layer: int) -> list[Module]:
        """Every linear layer of a layer that a scheme may quantize."""
        modules = list(self.attention(layer))
        if self.experts is None:
            return [*modules, *self.mlp(layer)]
        for number in range(self.experts.count):
            modules.extend(self.expert(layer, number))
        if self.experts.shared_intermediate:
            modules.extend(self.shared_expert(layer))
        return modules

    def plain_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that no scheme quantizes, without the linear layers' biases."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        for layer in range(self.layers):
            base = f"model.layers.{layer}"
            yield f"{base}.input_layernorm.weight", (self.hidden,)
            yield f"{base}.post_attention_layernorm.weight", (self.hidden,)
            if self.qk_norm:
                yield f"{base}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{base}.self_attn.k_norm.weight", (self.head_dim,)
            if self.experts is not None:
                yield f"{self.router(layer)}.weight", (self.experts.count, self.hidden)
                if self.experts.shared_intermediate:
                    yield f"{base}.mlp.shared_expert_gate.weight", (1, self.hidden)

    def _gated(self, base: str, size: int, *, bias: bool = False) -> tuple[Module, Module, Module]:
        return (
            Module(f"{base}.gate_proj", size, self.hidden, bias),
            Module(f"{base}.up_proj", size, self.hidden, bias),
            Module(f"{base}.down_proj", self.hidden, size, bias),
        )


def decoder_of(tensors: CheckpointTensors) -> Decoder:
    """The decoder of a checkpoint: as its ``config.json`` says, with the names that its experts have.

    Mixtral's experts are ``block_sparse_moe.experts.N.w1`` on the hub; transformers 5 calls them
    ``mlp.experts.N.gate_proj`` in memory, and so do checkpoints that were exported from there.

    Raises:
        SourceError: as ``decoder_from_config``.
    """
    decoder = decoder_from_config(tensors.config, tensors.directory)
    if decoder.architecture != "MixtralForCausalLM" or decoder.experts is None:
        return decoder
    if f"{decoder.expert(0, 0)[0].name}.weight" in tensors:
        return decoder
    experts = replace(decoder.experts, prefix="mlp", gate="gate_proj", up="up_proj", down="down_proj")
    renamed = replace(decoder, experts=experts)
    return renamed if f"{renamed.expert(0, 0)[0].name}.weight" in tensors else decoder


def decoder_from_config(config: Mapping[str, Any], path: Path) -> Decoder:
    """The decoder that a ``config.json`` describes; ``path`` is the checkpoint directory, for messages.

    Raises:
        SourceError: something in it cannot be expressed in TensorRT-LLM's checkpoint format, or a key is missing.
    """
    file = path / CONFIG_FILE
    architecture = architecture_of(config, file)
    sizes = dimensions_of(config, architecture, file)
    _check_activation(config, file)
    biases = _biases(config, architecture, file)
    base, scaling = _rope(config, file)
    return Decoder(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        hidden=sizes.hidden_size,
        intermediate=sizes.intermediate_size,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=_head_dim(config, architecture, sizes.head_dim),
        vocab=sizes.vocab_size,
        norm_epsilon=float(config.get("rms_norm_eps") or 1e-6),  # null: transformers' default
        max_positions=_positive(config, file, keys=("max_position_embeddings",)),
        rope_base=base,
        rope_scaling=scaling,
        tied=sizes.tied,
        qkv_bias=biases[0],
        output_bias=biases[1],
        mlp_bias=biases[2],
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        windows=_windows(config, architecture, sizes.layers),
        experts=_experts(config, architecture, file),
    )


def _positive(config: Mapping[str, Any], file: Path, *, keys: tuple[str, ...]) -> int:
    """The value of the first of ``keys`` that ``config`` has."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if type(value) is int and value > 0:
                return value
            raise SourceError(f"{file}: {key} must be a whole number of at least 1, seen: {value!r}")
    raise SourceError(f"{file} lacks the key {keys[0]}", hint=_CONFIG_HINT)


def _check_activation(config: Mapping[str, Any], file: Path) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise SourceError(f"{file}: activation {activation!r} is not supported; supported: silu")


def _head_dim(config: Mapping[str, Any], architecture: str, default: int) -> int:
    if architecture == "Qwen3MoeForCausalLM" and config.get("head_dim") is None:
        return 128  # transformers' default; it does not follow from the other sizes.
    return default


def _biases(config: Mapping[str, Any], architecture: str, file: Path) -> tuple[bool, bool, bool]:
    """Whether q, k and v, the output projection, and the MLP have biases."""
    if architecture in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM"):
        qkv = config.get("qkv_bias", True) is not False
        if not qkv:
            raise SourceError(f"{file}: TensorRT-LLM gives Qwen2 projection biases, qkv_bias is false")
        return True, False, False
    attention = bool(config.get("attention_bias", False))
    if attention and architecture.startswith("Qwen3"):
        raise SourceError(f"{file}: TensorRT-LLM has no projection biases in Qwen3, attention_bias is true")
    if architecture != "LlamaForCausalLM":
        return False, False, False
    return attention, attention, bool(config.get("mlp_bias", False))


def _rope(config: Mapping[str, Any], file: Path) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in _ROPE_KEYS:
        raise SourceError(
            f"{file}: RoPE scaling {kind!r} is not supported in TensorRT-LLM engines; supported: {', '.join(_ROPE_KEYS)}"
        )
    if (parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise SourceError(
            f"{file}: partial rotary embeddings are not supported; partial_rotary_factor must be 1"
        )
    try:
        base = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
        values = {key: float(parameters[key]) for key in _ROPE_KEYS[kind]}
    except KeyError as error:
        raise SourceError(
            f"{file}: RoPE scaling {kind!r} lacks the key {error}", hint=_CONFIG_HINT
        ) from error
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"{file}: RoPE holds a value of the wrong kind: {error}", hint=_CONFIG_HINT
        ) from error
    if kind == "default":
        return base, None
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    # TensorRT-LLM has read either key, depending on the release.
    return base, {"type": kind, "rope_type": kind, **values}


def _windows(config: Mapping[str, Any], architecture: str, layers: int) -> tuple[int | None, ...]:
    mistral = architecture in ("MistralForCausalLM", "MixtralForCausalLM")
    default = 4096 if architecture != "MixtralForCausalLM" else None
    window = config.get("sliding_window", default)  # transformers' defaults; null switches the window off
    if not window or architecture == "LlamaForCausalLM":
        return (None,) * layers
    if not mistral and not config.get("use_sliding_window", False):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = 0 if mistral else int(config.get("max_window_layers", 28))
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _experts(config: Mapping[str, Any], architecture: str, file: Path) -> Experts | None:
    if architecture == "MixtralForCausalLM":
        return Experts(
            count=_positive(config, file, keys=("num_local_experts", "num_experts")),
            per_token=_positive(config, file, keys=("num_experts_per_tok",)),
            intermediate=_positive(config, file, keys=("intermediate_size",)),
            shared_intermediate=0,
            renormalize=True,
            prefix="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
        )
    if architecture not in _QWEN_MOE:
        return None
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise SourceError(
            f"{file}: TensorRT-LLM's {architecture} has experts in every layer; mlp_only_layers and decoder_sparse_step "
            f"make some dense",
            hint="serve this model with the runtime tensorrt_llm_llmapi",
        )
    shared = architecture == "Qwen2MoeForCausalLM"
    return Experts(
        count=_positive(config, file, keys=("num_experts", "num_local_experts")),
        per_token=_positive(config, file, keys=("num_experts_per_tok",)),
        intermediate=_positive(config, file, keys=("moe_intermediate_size",)),
        shared_intermediate=_positive(config, file, keys=("shared_expert_intermediate_size",))
        if shared
        else 0,
        renormalize=bool(config.get("norm_topk_prob", False)),
        prefix="mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    )
