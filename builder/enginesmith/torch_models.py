"""PyTorch models made from checkpoint directories: the unquantized model, and ModelOpt's fake-quantized one.

Owns the way back from a unified Hugging Face checkpoint (integers and scales, any that ModelOpt wrote in a
scheme of ``enginesmith.schemes``) to a model that computes with ModelOpt's own quantizers. Models are float32:
bfloat16 and float16 weights are exact in it, and CPUs are faster. ``enginesmith.quantize`` calibrates these
models; ``enginesmith.verify.reference`` scores them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.errors import SourceError, ToolchainError
from enginesmith.schemes import KV_CACHE_ALGORITHMS, KV_CACHE_BOUNDS, SCHEMES, KvCacheName, Scheme

MODELOPT_SERIES = "0.47."
"""ModelOpt's releases whose export, quantizers and presets this code was written against."""

_TORCH_DTYPES: Mapping[str, Any] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_SCALE_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".pre_quant_scale",
    ".k_scale",
    ".v_scale",
)

_EXPERT = re.compile(
    r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w[123])\.weight"
)


@contextmanager
def third_party_warnings() -> Iterator[None]:
    """Warnings of torch, transformers and ModelOpt go to the log, once each, whatever the process's filters are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("default", module=r"(torch|transformers|modelopt|accelerate)(\.|$)")
        yield


def require_modelopt() -> None:
    """Import ModelOpt, whose import warns of every optional part it lacks.

    Raises:
        ToolchainError: it is not installed, or not of the series this code was written against.
    """
    try:
        version = metadata.version("nvidia-modelopt")
    except metadata.PackageNotFoundError as error:
        raise ToolchainError(
            "nvidia-modelopt is not installed", hint="install enginesmith with the extra `build`"
        ) from error
    if not version.startswith(MODELOPT_SERIES):
        raise ToolchainError(
            f"nvidia-modelopt {version} is installed; {MODELOPT_SERIES}x is needed, because the meaning of its presets, "
            "quantizers and export is relied on",
            hint="install the pinned version: pip install -c constraints.txt nvidia-modelopt",
        )
    with third_party_warnings():
        import modelopt.torch.export
        import modelopt.torch.quantization  # noqa: F401


def load_model(directory: Path) -> Any:
    """The model of a checkpoint, float32, in evaluation mode: as it is, or fake-quantized where it is quantized.

    Raises:
        SourceError: tensors are missing or unknown, or the quantization is of a kind that is not supported: another
            scheme, or experts.
        ToolchainError: the checkpoint is quantized and ModelOpt has another version.
    """
    tensors = CheckpointTensors(directory)
    with third_party_warnings(), torch.no_grad():
        model = _empty_model(directory)
        if tensors.quantization is None:
            _copy_tensors(model, tensors, skip=())
            return model
        require_modelopt()
        if hasattr(model.config, "num_experts_per_tok"):
            raise SourceError(
                f"checkpoint {directory} has quantized experts, which PyTorch cannot be given back as a reference",
                hint="give the unquantized checkpoint of this mixture of experts, with scheme none",
            )
        scheme = _scheme_of(tensors)
        layers = [
            name.removesuffix(".weight_scale") for name in tensors.names() if name.endswith(".weight_scale")
        ]
        _copy_tensors(model, tensors, skip=[f"{layer}.weight" for layer in layers])
        _restore_quantizers(model, tensors, scheme, layers)
        return model


def read_tensor(tensors: CheckpointTensors, name: str) -> Any:
    """Tensor ``name`` as torch stores it, in its stored dtype."""
    dtype = tensors.dtype(name)
    if dtype not in _TORCH_DTYPES:
        raise SourceError(
            f"tensor {name} of {tensors.directory} has dtype {dtype}; readable: {', '.join(_TORCH_DTYPES)}"
        )
    array = tensors.read(name)
    # torch.from_numpy knows no bfloat16 or float8; the bytes travel as integers of the same width.
    carrier = {1: np.uint8, 2: np.int16, 4: np.int32}[array.dtype.itemsize]
    return torch.from_numpy(array.reshape(-1).view(carrier)).view(_TORCH_DTYPES[dtype]).reshape(array.shape)


def storage_dtype(checkpoint: Path) -> Any:
    """The dtype of the largest tensor of an unquantized checkpoint."""
    tensors = CheckpointTensors(checkpoint)
    return _TORCH_DTYPES[tensors.dtype(max(tensors.names(), key=tensors.nbytes))]


def linear_names(model: Any) -> list[str]:
    """The full names of the model's linear layers, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def quantizer_config(
    scheme: Scheme,
    *,
    layers: Collection[str],
    linears: Collection[str],
    group_size: int | None,
    kv_cache: KvCacheName,
) -> list[dict[str, Any]]:
    """ModelOpt's ``quant_cfg``: the scheme's preset on ``layers`` (names from ``linears``), nothing on the others."""
    import modelopt.torch.quantization as mtq

    assert scheme.modelopt_config is not None, f"scheme {scheme.name} has no ModelOpt preset"
    entries: list[dict[str, Any]] = copy.deepcopy(getattr(mtq, scheme.modelopt_config)["quant_cfg"])
    kinds = ("weight_quantizer", "input_quantizer")
    presets = {kind: entry for entry in entries for kind in kinds if entry["quantizer_name"] == f"*{kind}"}
    # Every layer gets an entry of its own; ModelOpt would nest the two quantizers of w4a8_awq if both named it.
    entries = [entry for entry in entries if entry not in list(presets.values())]
    if group_size is not None:
        cfg = presets["weight_quantizer"]["cfg"]
        (cfg[0] if isinstance(cfg, list) else cfg)["block_sizes"][-1] = group_size
    for layer in linears:
        # The presets leave out lm_head by pattern; naming it after them puts it back where it is asked for.
        for kind in kinds:
            own = presets[kind] if layer in layers else {"enable": False}
            entries.append({**own, "quantizer_name": f"{layer}.{kind}"})
    if kv_cache != "none":
        cache = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
        if kv_cache == "int8":  # ModelOpt 0.47 has no preset; its quantizers know the format.
            for entry in cache:
                entry["cfg"]["num_bits"] = 8
        entries += cache
    return entries


def attentions_with_cache(model: Any) -> dict[str, Any]:
    """The attention modules that have quantizers for their keys and values, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "k_bmm_quantizer")}


def dequantized_weight(stored: Any, scale: Any, layer: Any) -> Any:
    """The float32 weight [out, in] that ``layer``'s stored integers and ``weight_scale`` stand for.

    ``layer`` is a quantized linear layer; its quantizers say in which format ``stored`` is. For w4a8_awq these are
    the values of the INT4 codes; the layer's second quantizer rounds them to FP8 when it computes.
    """
    from modelopt.torch.export.model_config import QUANTIZATION_INT4_AWQ, QUANTIZATION_W4A8_AWQ
    from modelopt.torch.export.quant_utils import from_quantized_weight, get_quantization_format

    quantization = get_quantization_format(layer)
    if quantization not in (QUANTIZATION_INT4_AWQ, QUANTIZATION_W4A8_AWQ):
        return from_quantized_weight(stored, scale, quantization, torch.float32)
    # ModelOpt 0.47 packs this format (pack_int4_in_uint8) but has no unpacking: a byte holds the values of
    # output channels 2i (low nibble) and 2i+1 (high nibble), in two's complement.
    nibbles = torch.stack([stored & 0x0F, stored >> 4], dim=1).reshape(-1, stored.shape[-1]).to(torch.int8)
    integers = torch.where(nibbles >= 8, nibbles - 16, nibbles).to(torch.float32)
    return integers * scale.repeat_interleave(integers.shape[-1] // scale.shape[-1], dim=-1)


def _empty_model(directory: Path) -> Any:
    """The architecture of ``config.json`` in float32; the values of its weights are undefined."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise SourceError(f"config.json of {directory} cannot be used by transformers: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


def _copy_tensors(model: Any, tensors: CheckpointTensors, *, skip: Collection[str]) -> None:
    """Copy every stored tensor into the model, one at a time, but for scales and those named in ``skip``."""
    # remove_duplicate=False: a tied alias may be the name under which the checkpoint stores the tensor.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    written = Counter({id(parameters[name]): parameters[name].numel() for name in skip if name in parameters})
    for name in tensors.names():
        if name in skip or name.endswith(_SCALE_SUFFIXES) or name.endswith("rotary_emb.inv_freq"):
            continue
        parameter, place = _place_of(parameters, name)
        if place is None or place.shape != tensors.shape(name):
            expected = "no such tensor" if place is None else f"shape {list(place.shape)}"
            raise SourceError(
                f"tensor {name} of {tensors.directory} has shape {list(tensors.shape(name))}; the architecture has {expected}"
            )
        place.copy_(read_tensor(tensors, name))
        written[id(parameter)] += place.numel()
    missing = [name for name, parameter in parameters.items() if written[id(parameter)] < parameter.numel()]
    if missing:
        raise SourceError(
            f"checkpoint {tensors.directory} lacks {len(missing)} tensors of its architecture, first {missing[0]}"
        )


def _place_of(parameters: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """The parameter that holds the stored tensor ``name``, and the part of it that does; None and None without one.

    transformers 5 keeps all experts of a layer in two tensors, ``gate_up_proj`` and ``down_proj``, and calls
    Mixtral's block ``mlp``; checkpoints store them as transformers 4 named them, one by one.
    """
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if name in parameters:
        return parameters[name], parameters[name]
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None, None
    down = match["part"] in ("down_proj", "w2")
    container = parameters.get(f"{match['experts']}.{'down_proj' if down else 'gate_up_proj'}")
    expert = int(match["expert"])
    if container is None or expert >= len(container):
        return None, None
    if down:
        return container, container[expert]
    gate, up = container[expert].chunk(2)
    return container, gate if match["part"] in ("gate_proj", "w1") else up


def _scheme_of(tensors: CheckpointTensors) -> Scheme:
    quantization = tensors.quantization or {}
    algorithm, kv_cache = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    schemes = {scheme.quant_algo: scheme for scheme in SCHEMES.values() if scheme.quant_algo is not None}
    if algorithm not in schemes:
        raise SourceError(
            f"checkpoint {tensors.directory} has quant_algo {algorithm!r}; supported: {', '.join(schemes)}"
        )
    if kv_cache is not None and kv_cache not in KV_CACHE_ALGORITHMS:
        raise SourceError(
            f"checkpoint {tensors.directory} has kv_cache_quant_algo {kv_cache!r}; "
            f"supported: {', '.join(KV_CACHE_ALGORITHMS)}, none"
        )
    return schemes[algorithm]


def _restore_quantizers(model: Any, tensors: CheckpointTensors, scheme: Scheme, layers: list[str]) -> None:
    """Give ``layers`` the stored integers' values as weights, and quantizers with the stored scales."""
    import modelopt.torch.quantization as mtq

    quantization = tensors.quantization or {}
    kv_cache = KV_CACHE_ALGORITHMS.get(quantization.get("kv_cache_quant_algo") or "", "none")
    entries = quantizer_config(
        scheme,
        layers=set(layers),
        linears=linear_names(model),
        group_size=quantization.get("group_size") if scheme.grouped else None,
        kv_cache=kv_cache,
    )
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": None})
    for name in layers:
        _restore_layer(model.get_submodule(name), tensors, name)
    if kv_cache == "none":
        return
    for name, attention in attentions_with_cache(model).items():
        for part in "kv":
            scale = read_tensor(tensors, f"{name}.{part}_proj.{part}_scale").float()
            attention.get_submodule(f"{part}_bmm_quantizer").amax = scale * KV_CACHE_BOUNDS[kv_cache]


def _restore_layer(layer: Any, tensors: CheckpointTensors, name: str) -> None:
    scale = read_tensor(tensors, f"{name}.weight_scale").float()
    weight = dequantized_weight(read_tensor(tensors, f"{name}.weight"), scale, layer)
    if weight.shape != layer.weight.shape:
        raise SourceError(
            f"tensor {name}.weight of {tensors.directory} stands for a weight of shape {list(weight.shape)}; "
            f"the architecture has {list(layer.weight.shape)}"
        )
    layer.weight.copy_(weight)
    quantizer = layer.weight_quantizer
    if f"{name}.weight_scale_2" in tensors:
        quantizer, second = quantizer
        second.amax = read_tensor(tensors, f"{name}.weight_scale_2").float().reshape(()) * second.maxbound
    weight_amax = scale * quantizer.maxbound
    # Per tensor: a scalar. Per output channel or per group: one row each, as the quantizer lays them out.
    quantizer.amax = weight_amax.reshape(()) if scale.numel() == 1 else weight_amax.reshape(-1, 1)
    if f"{name}.input_scale" in tensors:
        input_scale = read_tensor(tensors, f"{name}.input_scale").float()
        layer.input_quantizer.amax = input_scale.reshape(()) * layer.input_quantizer.maxbound
    elif layer.input_quantizer.is_enabled:
        raise SourceError(f"checkpoint {tensors.directory} lacks {name}.input_scale")
    if f"{name}.pre_quant_scale" in tensors:
        layer.input_quantizer._enable_pre_quant_scale = True
        layer.input_quantizer.pre_quant_scale = read_tensor(tensors, f"{name}.pre_quant_scale").float()
