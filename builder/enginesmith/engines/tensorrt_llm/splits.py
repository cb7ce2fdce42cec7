"""Whether a mapping divides a model: pure arithmetic on sizes, with the degrees that would work.

``plan`` may call it before any checkpoint is fetched, as soon as ``config.json`` is known.
"""

from __future__ import annotations

from collections.abc import Callable

from enginesmith.engines.tensorrt_llm.decoder import Decoder
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.engines.tensorrt_llm.quantization import Quantization
from enginesmith.errors import SpecError


def check_splits(decoder: Decoder, quantization: Quantization, mapping: Mapping) -> None:
    """Raise a SpecError that says which degrees divide the model when ``mapping`` does not."""
    if mapping.pipeline > decoder.layers:
        raise SpecError(
            f"pipeline parallelism {mapping.pipeline} is more than the model's {decoder.layers} layers",
            hint=f"choose at most {decoder.layers}",
        )
    if decoder.experts is None and mapping.expert > 1:
        raise SpecError(
            f"expert parallelism {mapping.expert} for {decoder.architecture}, which has no experts",
            hint="leave it at 1",
        )
    problem = tensor_problem(decoder, quantization, mapping.tensor)
    if problem is not None:
        raise SpecError(
            problem,
            hint=_degrees(lambda degree: tensor_problem(decoder, quantization, degree), decoder.heads),
        )
    problem = expert_problem(decoder, quantization, mapping)
    if problem is not None:
        raise SpecError(
            problem,
            hint=_degrees(
                lambda degree: (
                    "no"
                    if mapping.tensor % degree
                    else expert_problem(
                        decoder, quantization, Mapping(mapping.tensor, mapping.pipeline, degree)
                    )
                ),
                mapping.tensor,
                kind="expert",
            ),
        )


def tensor_problem(decoder: Decoder, quantization: Quantization, tensor: int) -> str | None:
    """Why tensor parallelism ``tensor`` cannot split everything but the experts, or None when it can."""
    if decoder.heads % tensor:
        return f"tensor parallelism {tensor} does not divide the model's {decoder.heads} attention heads"
    if decoder.kv_heads % tensor and tensor % decoder.kv_heads:
        return f"tensor parallelism {tensor} neither divides nor is a multiple of the model's {decoder.kv_heads} KV heads"
    widths = [("attention heads' width", decoder.heads * decoder.head_dim)]
    if decoder.experts is None:
        widths.append(("intermediate size", decoder.intermediate))
    elif decoder.experts.shared_intermediate:
        widths.append(("shared expert's intermediate size", decoder.experts.shared_intermediate))
    for name, width in widths:
        problem = _width_problem(name, width, tensor, quantization=quantization)
        if problem is not None:
            return problem
    return _packing_problem(decoder, quantization, tensor)


def expert_problem(decoder: Decoder, quantization: Quantization, mapping: Mapping) -> str | None:
    """Why the experts cannot be spread as ``mapping`` says, or None when they can."""
    if decoder.experts is None:
        return None
    if decoder.experts.count % mapping.expert:
        return (
            f"expert parallelism {mapping.expert} does not divide the model's {decoder.experts.count} experts"
        )
    return _width_problem(
        "experts' intermediate size",
        decoder.experts.intermediate,
        mapping.expert_tensor,
        quantization=quantization,
    )


def _width_problem(name: str, width: int, degree: int, *, quantization: Quantization) -> str | None:
    """Why ``width`` columns of a layer cannot be cut into ``degree`` parts, or None when they can."""
    if width % degree:
        return f"tensor parallelism {degree} does not divide the model's {name} {width}"
    group = quantization.group_size
    if quantization.grouped and width // degree % group:
        return (
            f"tensor parallelism {degree} cuts the {name} {width} into parts of {width // degree} columns, "
            f"which is no multiple of the {group} columns that share a scale ({quantization.algorithm})"
        )
    if quantization.grouped and width // degree % 2:
        return f"tensor parallelism {degree} cuts packed pairs of rows of the {name} {width} apart"
    return None


def _packing_problem(decoder: Decoder, quantization: Quantization, tensor: int) -> str | None:
    head_quantized = not decoder.tied and quantization.of("lm_head") not in ("none", "W8A16")
    if head_quantized and decoder.vocab % (2 * tensor if quantization.grouped else tensor):
        return f"the quantized output head's {decoder.vocab} rows cannot be split into {tensor} equal parts"
    if not quantization.grouped:
        return None
    if decoder.hidden % quantization.group_size:
        return (
            f"group size {quantization.group_size} does not divide the model's hidden size {decoder.hidden}"
        )
    if decoder.head_dim % 2:
        return f"INT4 packs rows in pairs; the model's heads have {decoder.head_dim} rows"
    return None


def _degrees(problem: Callable[[int], str | None], most: int, *, kind: str = "tensor") -> str:
    fitting = [degree for degree in range(1, most + 1) if problem(degree) is None]
    return f"{kind} parallelism that fits: {', '.join(map(str, fitting)) or 'none'}"
