"""The whole conversion as data: for each rank, its tensors and where their bytes come from.

Built from headers and ``config.json`` alone. Everything that makes a conversion impossible is found here or in
``scales``, before a byte is written. Names are those of TensorRT-LLM 1.2's ``models/llama`` and ``models/qwen``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from enginesmith.checkpoints.tensors import NUMPY_DTYPES, CheckpointTensors
from enginesmith.engines.tensorrt_llm.decoder import Decoder, Module, decoder_of
from enginesmith.engines.tensorrt_llm.inventory import check_inventory
from enginesmith.engines.tensorrt_llm.layout import Cast, Fill, Largest, Piece, RankTensor, Rectangle
from enginesmith.engines.tensorrt_llm.linears import (
    Context,
    Part,
    Target,
    check_one_algorithm,
    linear_tensors,
)
from enginesmith.engines.tensorrt_llm.mapping import Mapping, Rank
from enginesmith.engines.tensorrt_llm.quantization import Quantization, quantization_of
from enginesmith.engines.tensorrt_llm.splits import check_splits


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write."""

    decoder: Decoder
    quantization: Quantization
    mapping: Mapping
    dtype: str
    """The model's dtype in safetensors' spelling: that of the embedding."""
    ranks: tuple[tuple[RankTensor, ...], ...]
    """The tensors of each rank, in the order in which they lie in its file."""
    shared_vectors: frozenset[tuple[str, ...]]
    """Source tensors that become one and must therefore be equal."""

    @property
    def weight_bytes(self) -> int:
        """Size of all ranks' tensors in bytes."""
        return sum(tensor.nbytes for rank in self.ranks for tensor in rank)


def plan_conversion(tensors: CheckpointTensors, mapping: Mapping) -> ConversionPlan:
    """Names, shapes, dtypes and sources of every rank's tensors. Reads no tensor data.

    Raises:
        SourceError: the checkpoint is not one that TensorRT-LLM can run, or tensors are missing, left over or misshapen.
        SpecError: the mapping does not divide the model.
    """
    decoder = decoder_of(tensors)
    check_inventory(tensors, decoder)
    quantization = quantization_of(tensors, decoder)
    check_splits(decoder, quantization, mapping)
    dtype = tensors.dtype("model.embed_tokens.weight")
    context = Context(tensors, dtype, quantization.group_size)
    targets = [list(_targets(decoder, quantization, rank)) for rank in mapping.ranks()]
    shared = {
        group for of_rank in targets for target in of_rank for group in _shared(target, quantization, context)
    }
    ranks = []
    for rank, of_rank in zip(mapping.ranks(), targets, strict=True):
        found = list(_plain_tensors(decoder, rank, context))
        for target in of_rank:
            found.extend(linear_tensors(target, quantization.of(target.parts[0].module.name), context))
        if quantization.kv_algorithm is not None:
            found.extend(_kv_scales(decoder, rank, quantization))
        # Wide dtypes first, so that every tensor is aligned to its own width.
        found.sort(key=lambda tensor: (-NUMPY_DTYPES[tensor.dtype].itemsize, tensor.name))
        ranks.append(tuple(found))
    return ConversionPlan(decoder, quantization, mapping, dtype, tuple(ranks), frozenset(shared))


def _targets(decoder: Decoder, quantization: Quantization, rank: Rank) -> Iterator[Target]:
    """The linear layers of one rank."""
    for local, layer in enumerate(rank.mapping.stage_layers(rank.stage, decoder.layers)):
        base = f"transformer.layers.{local}"
        yield from _attention(decoder, rank, f"{base}.attention", layer=layer)
        if decoder.experts is None:
            gate, up, down = decoder.mlp(layer)
            alike = quantization.of(gate.name) == quantization.of(up.name) == "FP8"
            yield Target(f"{base}.mlp.fc", (_by_rows(gate, rank),), fused_with=(up.name,) if alike else ())
            yield Target(f"{base}.mlp.gate", (_by_rows(up, rank),), fused_with=(gate.name,) if alike else ())
            yield Target(f"{base}.mlp.proj", (_by_columns(down, rank),))
        else:
            yield from _experts(decoder, rank, f"{base}.mlp", layer=layer)
    if rank.last_stage:
        head = Module(decoder.head.removesuffix(".weight"), decoder.vocab, decoder.hidden)
        rows, padding = vocabulary_span(decoder, rank)
        yield Target("lm_head", (Part(head, rows, range(head.columns)),), padding)


def _attention(decoder: Decoder, rank: Rank, name: str, *, layer: int) -> Iterator[Target]:
    query, key, value, output = decoder.attention(layer)
    columns = range(decoder.hidden)
    kept = key_value_rows(decoder, rank)
    yield Target(
        f"{name}.qkv",
        (_by_rows(query, rank), Part(key, kept, columns), Part(value, kept, columns)),
    )
    yield Target(f"{name}.dense", (_by_columns(output, rank),))


def key_value_rows(decoder: Decoder, rank: Rank) -> range:
    """The rows of k and v on one rank: its share of the heads, or one head that several ranks repeat."""
    tensor = rank.mapping.tensor
    if decoder.kv_heads >= tensor:
        return rank.span(decoder.kv_heads * decoder.head_dim)
    head = rank.tensor_rank * decoder.kv_heads // tensor
    return range(head * decoder.head_dim, (head + 1) * decoder.head_dim)


def vocabulary_span(decoder: Decoder, rank: Rank) -> tuple[range, int]:
    """The vocabulary rows of one rank, and how many rows of zeros fill its share up."""
    share = -(-decoder.vocab // rank.mapping.tensor)
    start = min(rank.tensor_rank * share, decoder.vocab)
    rows = range(start, min(start + share, decoder.vocab))
    return rows, share - len(rows)


def _experts(decoder: Decoder, rank: Rank, name: str, *, layer: int) -> Iterator[Target]:
    assert decoder.experts is not None
    numbers = rank.experts(decoder.experts.count)
    share = decoder.experts.intermediate // rank.mapping.expert_tensor
    kept = range(rank.expert_tensor_rank * share, (rank.expert_tensor_rank + 1) * share)
    ups: list[Part] = []
    downs: list[Part] = []
    for number in numbers:
        gate, up, down = decoder.expert(layer, number)
        # The linear half first, the activated half second: the plugin's order, not the dense layer's.
        ups.extend(Part(module, kept, range(decoder.hidden)) for module in (up, gate))
        downs.append(Part(down, range(decoder.hidden), kept))
    yield Target(f"{name}.fc", tuple(ups), experts=len(numbers))
    yield Target(f"{name}.proj", tuple(downs), experts=len(numbers))
    if decoder.experts.shared_intermediate:
        gate, up, down = decoder.shared_expert(layer)
        yield Target(f"{name}.shared_expert.fc", (_by_rows(up, rank), _by_rows(gate, rank)))
        yield Target(f"{name}.shared_expert.proj", (_by_columns(down, rank),))


def _by_rows(module: Module, rank: Rank) -> Part:
    return Part(module, rank.span(module.rows), range(module.columns))


def _by_columns(module: Module, rank: Rank) -> Part:
    return Part(module, range(module.rows), rank.span(module.columns))


def _plain_tensors(decoder: Decoder, rank: Rank, context: Context) -> Iterator[RankTensor]:
    """Embedding, norms and routers of one rank."""
    if rank.first_stage:
        rows, padding = vocabulary_span(decoder, rank)
        pieces: list[Piece] = [Rectangle("model.embed_tokens.weight", rows, range(decoder.hidden))]
        if padding:
            pieces.append(Fill(0.0, padding * decoder.hidden))
        shape = (len(rows) + padding, decoder.hidden)
        yield RankTensor("transformer.vocab_embedding.weight", context.dtype, shape, tuple(pieces))
    for local, layer in enumerate(rank.mapping.stage_layers(rank.stage, decoder.layers)):
        source, base = f"model.layers.{layer}", f"transformer.layers.{local}"
        yield _whole(context, f"{source}.input_layernorm.weight", f"{base}.input_layernorm.weight")
        yield _whole(context, f"{source}.post_attention_layernorm.weight", f"{base}.post_layernorm.weight")
        if decoder.qk_norm:
            for kind in ("q", "k"):
                yield _whole(
                    context,
                    f"{source}.self_attn.{kind}_norm.weight",
                    f"{base}.attention.{kind}_layernorm.weight",
                )
        if decoder.experts is not None:
            yield _whole(context, f"{decoder.router(layer)}.weight", f"{base}.mlp.router.weight", dtype="F32")
            if decoder.experts.shared_intermediate:
                gate = "mlp.shared_expert_gate.weight"
                yield _whole(context, f"{source}.{gate}", f"{base}.{gate}")
    if rank.last_stage:
        yield _whole(context, "model.norm.weight", "transformer.ln_f.weight")


def _whole(context: Context, source: str, name: str, *, dtype: str | None = None) -> RankTensor:
    """A tensor that every rank holds whole, in the model's dtype unless another is asked for."""
    entry = context.tensors.entry(source)
    dtype = dtype or context.dtype
    columns = entry.shape[-1] if len(entry.shape) > 1 else 1
    recode = None if entry.dtype == dtype else Cast()
    rectangle = Rectangle(source, range(entry.shape[0]), range(columns), recode)
    return RankTensor(name, dtype, entry.shape, (rectangle,))


def _kv_scales(decoder: Decoder, rank: Rank, quantization: Quantization) -> Iterator[RankTensor]:
    """The scales of the quantized KV cache: of k, of v, and the larger of both, which the engine uses.

    An FP8 cache never scales values up: 1 is the smallest scale, as in ModelOpt's own exporter.
    """
    floor = 1.0 if quantization.kv_algorithm == "FP8" else 0.0
    for local, layer in enumerate(rank.mapping.stage_layers(rank.stage, decoder.layers)):
        base = f"transformer.layers.{local}.attention"
        key = f"model.layers.{layer}.self_attn.k_proj.k_scale"
        value = f"model.layers.{layer}.self_attn.v_proj.v_scale"
        yield RankTensor(f"{base}.k_cache_scaling_factor", "F32", (1,), (Largest((key,), floor),))
        yield RankTensor(f"{base}.v_cache_scaling_factor", "F32", (1,), (Largest((value,), floor),))
        yield RankTensor(f"{base}.kv_cache_scaling_factor", "F32", (1,), (Largest((key, value), floor),))


def _shared(target: Target, quantization: Quantization, context: Context) -> Iterator[tuple[str, ...]]:
    """Groups of source vectors that ``target`` holds once."""
    check_one_algorithm(target, quantization, context)
    if quantization.of(target.parts[0].module.name) in ("none", "W8A16", "FP8"):
        return
    names = target.tensors("pre_quant_scale")
    if len(names) > 1 and names[0] in context.tensors:
        yield names
