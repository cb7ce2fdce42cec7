"""Snapping: makes a calibrated model equal, to the last bit, to what its checkpoint will say.

ModelOpt's export merges the smoothing of layers that share an input, folds AWQ's into the norms before them,
and stores the results in the checkpoint's 16-bit dtype. Done on the way out, that rounding would make the
stored model another one than the calibrated. Here the same fusion runs first, its results are rounded, the
weights take up the rounding error, and only then become integers. See docs/quantization.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from enginesmith.errors import GateError
from enginesmith.quantize.recipe import is_norm, layers_after_norms
from enginesmith.torch_models import attentions_with_cache, dequantized_weight, third_party_warnings

_ROUND_TRIPS = 8  # Dividing and multiplying again settles after one or two.


def snap(model: Any, layers: Collection[str], *, dtype: Any) -> None:
    """Make a calibrated ``model`` exactly what its files, in 16-bit ``dtype``, will say.

    Runs the fusion of ModelOpt's export, rounds norms and smoothing scales to ``dtype``, scales the weights to
    make up for it, and puts the weights on the grid of their integers. Exporting then changes nothing.

    Layers and caches for which TensorRT-LLM has one scale get one here, and INT4 group scales are rounded to ``dtype``
    as its loader rounds them, so that an engine computes what was measured.
    """
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    with third_party_warnings(), torch.no_grad():
        norms = {name: module.weight.clone() for name, module in model.named_modules() if is_norm(module)}
        consumers = layers_after_norms(model)
        requantize_resmooth_fused_llm_layers(model)
        for name, before in norms.items():
            norm = model.get_submodule(name)
            if not torch.equal(norm.weight, before):
                readers = [model.get_submodule(consumer) for consumer in consumers[name]]
                _snap_norm(norm, before, readers, dtype=dtype, name=name)
        for name in layers:
            _snap_smoothing(model.get_submodule(name), dtype, name=name)
        for names in consumers.values():
            _share_fp8_range([model.get_submodule(name) for name in names if name in layers])
        _share_cache_ranges(model)
        _snap_ranges(model)
        for name in layers:
            _snap_group_scales(model.get_submodule(name), dtype, name=name)
            _snap_weight(model.get_submodule(name))


def _snap_norm(norm: Any, before: Any, layers: list[Any], *, dtype: Any, name: str) -> None:
    """Round a norm that took up smoothing scales (it was ``before``); its readers take up the rounding error."""
    rounded = _rounded(norm.weight, dtype, name=f"{name}.weight")
    ratio = torch.where(rounded == 0, torch.ones_like(rounded), norm.weight / rounded)
    for layer in layers:
        layer.weight.mul_(ratio)
        _measure_weight_range(layer)
        if layer.input_quantizer.is_enabled:
            smoothing = torch.where(before == 0, torch.ones_like(before), rounded / before)
            layer.input_quantizer.amax = (layer.input_quantizer._amax_for_smoothing * smoothing).amax()
    norm.weight.copy_(rounded)


def _snap_smoothing(layer: Any, dtype: Any, *, name: str) -> None:
    """Round a smoothing scale that stays with its layer; the weight takes up the rounding error."""
    before = layer.input_quantizer.pre_quant_scale
    if before is None:
        return
    rounded = _rounded(before, dtype, name=f"{name}.pre_quant_scale")
    layer.weight.mul_(before / rounded)
    layer.input_quantizer.pre_quant_scale = rounded
    _measure_weight_range(layer)
    if layer.input_quantizer.is_enabled:
        # The range seen while calibrating, of the scale that is stored: averaging and rounding both moved it.
        layer.input_quantizer.amax = (layer.input_quantizer._amax_for_smoothing * rounded).amax()


def _share_fp8_range(layers: list[Any]) -> None:
    """Give layers that read one norm one range for their FP8 weights, or for the FP8 values of their INT4 weights.

    TensorRT-LLM computes them in one product, which has one scale; it would round their codes once more to the largest.
    """
    shared = [
        quantizer
        for layer in layers
        for quantizer in _weight_quantizers(layer)
        if quantizer.num_bits == (4, 3)
    ]
    if shared:
        largest = torch.stack([quantizer.amax.reshape(()) for quantizer in shared]).amax()
        for quantizer in shared:
            quantizer.amax = largest


def _weight_quantizers(layer: Any) -> list[Any]:
    """The one quantizer of a layer's weight, or the two of w4a8_awq: INT4 groups, then FP8."""
    from modelopt.torch.quantization.nn import SequentialQuantizer

    quantizer = layer.weight_quantizer
    return list(quantizer) if isinstance(quantizer, SequentialQuantizer) else [quantizer]


def _share_cache_ranges(model: Any) -> None:
    """Give the keys and values of a layer one range, for FP8 of at least the codes' own.

    TensorRT-LLM has one scale for both, and ModelOpt's exporter for it gives an FP8 cache none below 1.
    """
    for attention in attentions_with_cache(model).values():
        quantizers = (attention.k_bmm_quantizer, attention.v_bmm_quantizer)
        if not all(quantizer.is_enabled for quantizer in quantizers):
            continue
        largest = torch.stack([quantizer.amax.reshape(()) for quantizer in quantizers]).amax()
        if quantizers[0].num_bits == (4, 3):
            largest = largest.clamp(min=quantizers[0].maxbound)
        for quantizer in quantizers:
            quantizer.amax = largest


def _snap_ranges(model: Any) -> None:
    """Make every calibrated range survive storage as a float32 scale (range / largest code) to the last bit.

    A range of zero (a dead channel) becomes what ModelOpt's export writes for it: scale 1.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    for quantizer in model.modules():
        if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled or quantizer.amax is None:
            continue
        amax = torch.where(
            quantizer.amax == 0, torch.full_like(quantizer.amax, quantizer.maxbound), quantizer.amax
        )
        for _ in range(_ROUND_TRIPS):
            stored = (amax / quantizer.maxbound) * quantizer.maxbound
            if torch.equal(stored, amax):
                break
            amax = stored
        quantizer.amax = amax


def _snap_group_scales(layer: Any, dtype: Any, *, name: str) -> None:
    """Round the scales of INT4 groups to ``dtype``: TensorRT-LLM does when it loads them."""
    quantizer = _weight_quantizers(layer)[0]
    if quantizer.num_bits != 4:
        return
    scale = quantizer.amax / quantizer.maxbound
    rounded = _rounded(scale, dtype, name=f"{name}.weight_scale")
    quantizer.amax = torch.where(rounded == 0, scale, rounded) * quantizer.maxbound


def _snap_weight(layer: Any) -> None:
    """Replace a weight by the values its stored integers stand for."""
    from modelopt.torch.export.quant_utils import (
        get_quantization_format,
        get_weight_block_size,
        get_weight_scaling_factor,
        to_quantized_weight,
    )

    scale = get_weight_scaling_factor(layer)
    stored = to_quantized_weight(
        layer.weight, scale, get_quantization_format(layer), None, get_weight_block_size(layer)
    )
    layer.weight.copy_(dequantized_weight(stored, scale, layer))


def _measure_weight_range(layer: Any) -> None:
    from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection

    quantizer = layer.weight_quantizer
    quantizer.reset_amax()
    enable_stats_collection(quantizer)
    quantizer(layer.weight)
    finish_stats_collection(quantizer)


def _rounded(values: Any, dtype: Any, *, name: str) -> Any:
    rounded = values.to(dtype).to(torch.float32)
    if not torch.isfinite(rounded).all():
        raise GateError(
            f"{name} does not fit {dtype}: its largest value is {values.abs().max().item():.4g}",
            hint="store the checkpoint in bfloat16 (`source: dtype: bfloat16`)",
        )
    return rounded
