"""How linear layers of a unified checkpoint become TensorRT-LLM's, for one rank and every algorithm.

Several source layers may share one target (q, k and v; the experts). Names of the extra tensors, their shapes and
their order are those of TensorRT-LLM 1.2 (``quantization/layers.py``, ``layers/moe.py``) as ModelOpt 0.47 stores them.
Here ``rows`` are outputs, ``columns`` inputs, both of the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.engines.tensorrt_llm.decoder import Module
from enginesmith.engines.tensorrt_llm.layout import (
    Cast,
    Dequantize,
    Fill,
    Largest,
    Piece,
    RankTensor,
    Rectangle,
    Rescale,
)
from enginesmith.engines.tensorrt_llm.quantization import FLOATS, Algorithm, Quantization
from enginesmith.errors import SourceError


@dataclass(frozen=True)
class Part:
    """What one rank holds of one source layer."""

    module: Module
    rows: range
    columns: range

    def tensor(self, suffix: str) -> str:
        """The name of one of the layer's tensors."""
        return f"{self.module.name}.{suffix}"

    @property
    def whole_rows(self) -> range:
        """All rows of the source layer."""
        return range(self.module.rows)


@dataclass(frozen=True)
class Target:
    """One linear layer of a rank: its parts from top to bottom, each expert's together."""

    name: str
    parts: tuple[Part, ...]
    padding_rows: int = 0
    """Rows of zeros below the parts."""
    experts: int = 0
    """How many experts are stacked along a leading dimension; 0 for a plain layer."""
    fused_with: tuple[str, ...] = ()
    """Source layers of another target that trtllm-build fuses with this one: in FP8 they have one scale."""

    @property
    def rows(self) -> int:
        """Rows of the layer, of one expert where there are several."""
        return (sum(len(part.rows) for part in self.parts) + self.padding_rows) // max(1, self.experts)

    @property
    def columns(self) -> int:
        """Columns of the layer."""
        return len(self.parts[0].columns)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimension of its tensors' shapes."""
        return (self.experts,) if self.experts else ()

    def tensors(self, suffix: str) -> tuple[str, ...]:
        """The names of one kind of tensor of all parts and of what is fused with them, each source layer once."""
        fused = (f"{name}.{suffix}" for name in self.fused_with)
        return tuple(dict.fromkeys((*(part.tensor(suffix) for part in self.parts), *fused)))

    def of_expert(self, number: int) -> tuple[Part, ...]:
        """The parts of one expert, counted on this rank."""
        share = len(self.parts) // self.experts
        return self.parts[number * share : (number + 1) * share]


@dataclass(frozen=True)
class Context:
    """What turning layers into tensors needs to know beside the layer."""

    tensors: CheckpointTensors
    dtype: str
    """The model's dtype, in safetensors' spelling."""
    group_size: int


def linear_tensors(target: Target, algorithm: Algorithm, context: Context) -> Iterator[RankTensor]:
    """The tensors of ``target`` on one rank.

    Raises:
        SourceError: scales are missing or of the wrong shape, or layers cannot share a target.
    """
    for module in dict.fromkeys(part.module for part in target.parts):
        _check_scales(module, algorithm, context)
    yield from _WRITERS[algorithm](target, context)
    if target.parts[0].module.bias:
        yield _bias(target, context)


def check_one_algorithm(target: Target, quantization: Quantization, context: Context) -> None:
    """Raise a SourceError when the layers of ``target`` cannot become one.

    They must be quantized alike, and smoothing vectors must be there for all of them or for none.
    """
    algorithms = {part.module.name: quantization.of(part.module.name) for part in target.parts}
    first = target.parts[0].module.name
    for name, algorithm in algorithms.items():
        if algorithm != algorithms[first]:
            raise SourceError(
                f"{context.tensors.directory}: TensorRT-LLM fuses {first} and {name} into one layer, but the first is "
                f"{_state(algorithms[first])} and the second {_state(algorithm)}",
                hint="exclude all the layers that are fused (q, k and v of a layer; all experts), or none",
            )
        vectors = [f"{module}.pre_quant_scale" in context.tensors for module in (first, name)]
        if algorithm != "none" and vectors[0] != vectors[1]:
            raise SourceError(
                f"{context.tensors.directory}: TensorRT-LLM fuses {first} and {name} into one layer, but only one of "
                f"them has a pre_quant_scale",
                hint="quantize the checkpoint again with ModelOpt, which gives fused layers one vector",
            )


def _state(algorithm: Algorithm) -> str:
    return "not quantized" if algorithm == "none" else f"quantized ({algorithm})"


def _check_scales(module: Module, algorithm: Algorithm, context: Context) -> None:
    """Raise a SourceError unless ``module`` has the scales that ``algorithm`` needs, in the right shapes."""
    for suffix, shapes in _scale_shapes(module, algorithm, context.group_size).items():
        name = f"{module.name}.{suffix}"
        if suffix == "pre_quant_scale" and name not in context.tensors:
            continue  # Folded into the norm in front of the layer.
        entry = context.tensors.entry(name)
        if entry.shape not in shapes:
            raise SourceError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, {algorithm} needs {list(shapes[0])}",
                hint="quantize the checkpoint again, or fetch it again if it came quantized",
            )
        if entry.dtype not in FLOATS:
            raise SourceError(f"{entry.file}: {name} has dtype {entry.dtype}; scales are {', '.join(FLOATS)}")


_SCALAR: tuple[tuple[int, ...], ...] = ((), (1,))


def _scale_shapes(
    module: Module, algorithm: Algorithm, group_size: int
) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """The shapes that each scale tensor of a layer may have, by its last name."""
    per_row = ((module.rows,), (module.rows, 1))
    smoothing = ((module.columns,),)
    if algorithm == "W8A16":
        return {"weight_scale": per_row}
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {"weight_scale": per_row, "input_scale": _SCALAR, "pre_quant_scale": smoothing}
    if algorithm == "FP8":
        return {"weight_scale": _SCALAR, "input_scale": _SCALAR}
    if algorithm == "none":
        return {}
    grouped = {
        "weight_scale": ((module.rows, module.columns // max(1, group_size)),),
        "pre_quant_scale": smoothing,
    }
    if algorithm == "W4A8_AWQ":
        return grouped | {"weight_scale_2": _SCALAR, "input_scale": _SCALAR}
    return grouped


def _plain(target: Target, context: Context) -> Iterator[RankTensor]:
    pieces: list[Piece] = [
        Rectangle(
            part.tensor("weight"),
            part.rows,
            part.columns,
            _cast_unless(context, part.tensor("weight"), context.dtype),
        )
        for part in target.parts
    ]
    if target.padding_rows:
        pieces.append(Fill(0.0, target.padding_rows * target.columns))
    yield _tensor(target, "weight", context.dtype, (target.rows, target.columns), pieces)


def _int8_weight_only(target: Target, context: Context) -> Iterator[RankTensor]:
    # trtllm-build quantizes 16-bit weights itself for W8A16 and does not read ModelOpt's integers.
    pieces: list[Piece] = [
        Rectangle(part.tensor("weight"), part.rows, part.columns, Dequantize(part.tensor("weight_scale")))
        for part in target.parts
    ]
    if target.padding_rows:
        pieces.append(Fill(0.0, target.padding_rows * target.columns))
    yield _tensor(target, "weight", context.dtype, (target.rows, target.columns), pieces)


def _smoothquant(target: Target, context: Context) -> Iterator[RankTensor]:
    pieces = [Rectangle(part.tensor("weight"), part.rows, part.columns) for part in target.parts]
    yield _tensor(target, "weight", "I8", (target.rows, target.columns), pieces)
    yield _row_scales(target, context)
    yield _scalar(target, "activation_scaling_factor", "input_scale")
    yield _smoothing(target, context)


def _fp8(target: Target, _: Context) -> Iterator[RankTensor]:
    groups = [target.of_expert(number) for number in range(target.experts)] or [target.parts]
    pieces: list[Piece] = []
    scales: list[Piece] = []
    for parts in groups:
        shared = tuple(part.tensor("weight_scale") for part in parts)
        shared += tuple(f"{name}.weight_scale" for name in target.fused_with)
        for part in parts:
            recode = Rescale(part.tensor("weight_scale"), shared) if len(shared) > 1 else None
            pieces.append(Rectangle(part.tensor("weight"), part.rows, part.columns, recode))
        scales.append(Largest(shared))
    yield _tensor(target, "weight", "F8_E4M3", (target.rows, target.columns), pieces)
    yield RankTensor(f"{target.name}.weights_scaling_factor", "F32", (*target.lead, 1), tuple(scales))
    yield _scalar(target, "activation_scaling_factor", "input_scale")


def _int4(target: Target, context: Context) -> Iterator[RankTensor]:
    pieces = []
    for part in target.parts:
        pairs = range(part.rows.start // 2, part.rows.stop // 2)
        pieces.append(Rectangle(part.tensor("weight"), pairs, part.columns))
    yield _tensor(target, "weight", "I8", (target.rows // 2, target.columns), pieces)
    group = context.group_size
    scales = [
        Rectangle(
            name := part.tensor("weight_scale"),
            part.rows,
            range(part.columns.start // group, part.columns.stop // group),
            _cast_unless(context, name, "F32"),
        )
        for part in target.parts
    ]
    yield _tensor(target, "weights_scaling_factor", "F32", (target.rows, target.columns // group), scales)
    yield _smoothing(target, context)


def _int4_fp8(target: Target, context: Context) -> Iterator[RankTensor]:
    yield from _int4(target, context)
    yield _scalar(target, "activation_scaling_factor", "input_scale")
    yield _scalar(target, "weights_scaling_factor_2", "weight_scale_2")


_WRITERS: Mapping[Algorithm, Callable[[Target, Context], Iterator[RankTensor]]] = {
    "none": _plain,
    "W8A16": _int8_weight_only,
    "W8A8_SQ_PER_CHANNEL": _smoothquant,
    "W4A16_AWQ": _int4,
    "W4A8_AWQ": _int4_fp8,
    "FP8": _fp8,
}


def _tensor(
    target: Target, suffix: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece]
) -> RankTensor:
    return RankTensor(f"{target.name}.{suffix}", dtype, (*target.lead, *shape), tuple(pieces))


def _row_scales(target: Target, context: Context) -> RankTensor:
    pieces = [
        Rectangle(
            name := part.tensor("weight_scale"), part.rows, range(1), _cast_unless(context, name, "F32")
        )
        for part in target.parts
    ]
    return _tensor(target, "weights_scaling_factor", "F32", (target.rows,), pieces)


def _scalar(target: Target, suffix: str, source: str) -> RankTensor:
    """One number for the whole target: the largest of its layers', as ModelOpt's own exporter chooses."""
    return RankTensor(f"{target.name}.{suffix}", "F32", (1,), (Largest(target.tensors(source)),))


def _smoothing(target: Target, context: Context) -> RankTensor:
    """The prequant vector: one for each expert, else one. Ones where it was folded into the norm in front.

    Layers that share a target share its vector; whether theirs are equal is checked when values are read.
    """
    groups = [target.of_expert(number) for number in range(target.experts)] or [target.parts]
    pieces: list[Piece] = []
    for parts in groups:
        name = parts[0].tensor("pre_quant_scale")
        columns = parts[0].columns
        if name in context.tensors:
            pieces.append(Rectangle(name, columns, range(1), _cast_unless(context, name, context.dtype)))
        else:
            pieces.append(Fill(1.0, len(columns)))
    return _tensor(target, "prequant_scaling_factor", context.dtype, (target.columns,), pieces)


def _bias(target: Target, context: Context) -> RankTensor:
    """The bias. A layer split by columns has it whole on every rank: TensorRT-LLM adds it after the ranks' sums."""
    pieces: list[Piece] = [
        Rectangle(
            name := part.tensor("bias"), part.rows, range(1), _cast_unless(context, name, context.dtype)
        )
        for part in target.parts
    ]
    return _tensor(target, "bias", context.dtype, (target.rows,), pieces)


def _cast_unless(context: Context, name: str, dtype: str) -> Cast | None:
    return None if context.tensors.dtype(name) == dtype else Cast()
