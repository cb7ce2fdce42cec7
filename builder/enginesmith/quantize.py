"""The ``quantize`` step: a Hugging Face checkpoint to ModelOpt's unified quantized checkpoint.

Flow: choose the layers, calibrate with ModelOpt, *snap*, export. Snapping makes the model in memory equal to
what the files can say: ModelOpt's export merges the smoothing of layers that share an input, folds AWQ's into
the norms before them, and stores the results in the checkpoint's 16-bit dtype. Done on the way out, that
rounding would make the stored model another one than the calibrated. Here the same fusion runs first, its
results are rounded, the weights take up the rounding error, and only then become integers.
See docs/quantization.md.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from enginesmith.checkpoints.tensors import CONFIG_FILE, CheckpointTensors, read_json_object
from enginesmith.corpora import corpus_sha256, load_documents, token_windows
from enginesmith.errors import GateError, SpecError
from enginesmith.schemes import SCHEMES, Scheme
from enginesmith.steps import StepContext
from enginesmith.torch_models import (
    dequantized_weight,
    linear_names,
    load_model,
    quantizer_config,
    read_tensor,
    require_modelopt,
    third_party_warnings,
)

_GROUP_SIZES = (32, 64, 128, 256)
# AWQ quantizes every weight once per candidate scale and batch, so batches are few; this bounds activations.
_TOKENS_PER_BATCH = 4096
_ROUND_TRIPS = 8  # Dividing and multiplying again settles after one or two.
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Recipe:
    """What a variant's part of the spec says about quantization."""

    scheme: Scheme
    group_size: int | None = None
    alpha: float = 0.5
    alpha_step: float = 0.1
    fp8_kv_cache: bool = False
    quantize_lm_head: bool = False
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Recipe:
        """The recipe in the parameters of a ``quantize`` step."""
        scheme = SCHEMES[params["scheme"]]
        return cls(
            scheme=scheme,
            group_size=params["group_size"] if scheme.grouped else None,
            alpha=params["alpha"],
            alpha_step=params["alpha_step"],
            fp8_kv_cache=params["kv_cache"] == "fp8",
            quantize_lm_head=params["lm_head"] == "scheme",
            exclude=tuple(params["exclude"]),
        )

    @property
    def needs_activations(self) -> bool:
        """Whether calibration data can change the result: only plain weight quantization needs none."""
        return self.scheme.name != "int8_wo"

    @property
    def algorithm(self) -> dict[str, Any]:
        """ModelOpt's calibration algorithm with its parameters."""
        match self.scheme.name:
            case "int8_sq":
                return {"method": "smoothquant", "alpha": self.alpha}
            case "int4_awq":
                return {"method": "awq_lite", "alpha_step": self.alpha_step}
            case _:
                return {"method": "max"}


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the quantized checkpoint; facts: layers, bytes, the corpus and the time of each phase.

    Raises:
        SpecError: an exclude matches nothing, or the group size or the head does not fit this model.
        SourceError: the corpus or the checkpoint cannot be used.
        GateError: calibration met NaN or Inf.
        ToolchainError: ModelOpt has another version.
    """
    require_modelopt()
    recipe = Recipe.from_params(context.params)
    checkpoint = context.inputs["checkpoint"]
    clock = _Clock()
    windows, corpus_digest = _calibration_windows(context) if recipe.needs_activations else (None, None)
    context.progress(0.0, "loading the model")
    model = load_model(checkpoint)
    clock.lap("load")
    layers = choose_layers(model, recipe)
    calibrate(model, recipe, layers, windows=windows, progress=context.progress)
    clock.lap("calibrate")
    context.progress(None, "rounding to what the checkpoint can store")
    snap(model, layers, dtype=_storage_dtype(checkpoint))
    clock.lap("snap")
    context.progress(None, "writing the checkpoint")
    export(model, layers, checkpoint=checkpoint, out=context.out)
    clock.lap("export")
    written = CheckpointTensors(context.out)
    return {
        "scheme": recipe.scheme.name,
        "quantized_layers": len(layers),
        "excluded_layers": [name for name in linear_names(model) if name not in set(layers)],
        "weight_bytes": sum(written.nbytes(name) for name in written.names()),
        "corpus_sha256": corpus_digest,
        "seconds": clock.seconds,
    }


def choose_layers(model: Any, recipe: Recipe) -> list[str]:
    """The full names of the linear layers that ``recipe`` quantizes in ``model``, checked to be quantizable.

    Raises:
        SpecError: an exclude glob matches no linear layer, nothing is left, the head is tied, the group size
            does not divide a layer's input, or AWQ would leave out part of a group that shares a norm.
    """
    linears = linear_names(model)
    head = "lm_head"
    excluded = set() if recipe.quantize_lm_head else {head}
    for pattern in recipe.exclude:
        matches = fnmatch.filter(linears, pattern)
        if not matches:
            raise SpecError(f"exclude {pattern!r} matches no linear layer of the model", hint=_near_matches(pattern, linears))
        excluded.update(matches)
    layers = [name for name in linears if name not in excluded]
    if not layers:
        raise SpecError("exclude leaves no layer to quantize", hint="use scheme none for an unquantized variant")
    if recipe.quantize_lm_head and model.config.tie_word_embeddings:
        raise SpecError(
            "lm_head: scheme asks to quantize the output head, but this model's head is tied to its embedding",
            hint="leave lm_head at none; the embedding would be quantized with it",
        )
    if recipe.group_size is not None:
        _check_group_size(model, layers, recipe.group_size)
        _check_shared_norms(model, layers)
    return layers


def calibrate(
    model: Any,
    recipe: Recipe,
    layers: Collection[str],
    *,
    windows: Any,
    progress: Callable[[float | None, str], None] = lambda fraction, note: None,
) -> None:
    """Insert ModelOpt's quantizers into ``model`` and calibrate them on ``windows`` (int64 [n, length], numpy).

    ``windows`` is None for a recipe that needs no activations.

    Raises:
        GateError: an activation or a calibrated range is NaN or infinite; the module is named.
    """
    require_modelopt()
    import modelopt.torch.quantization as mtq

    entries = quantizer_config(
        recipe.scheme,
        layers=set(layers),
        linears=linear_names(model),
        group_size=recipe.group_size,
        fp8_kv_cache=recipe.fp8_kv_cache,
    )
    # The head's logits are by far the largest activation, and no quantizer but its own sees its input.
    body = model if recipe.quantize_lm_head else model.base_model
    passes = 2 if recipe.scheme.name == "int4_awq" else 1

    def forward_loop(_: Any) -> None:
        rows = max(1, _TOKENS_PER_BATCH // windows.shape[1])
        for batch in torch.from_numpy(windows).split(rows):
            body(input_ids=batch, use_cache=False)

    with third_party_warnings(), torch.no_grad(), _watched(model, windows, passes=passes, progress=progress):
        mtq.quantize(
            model,
            {"quant_cfg": entries, "algorithm": recipe.algorithm},
            forward_loop=forward_loop if recipe.needs_activations else None,
        )
    _check_ranges(model)


def snap(model: Any, layers: Collection[str], *, dtype: Any) -> None:
    """Make a calibrated ``model`` exactly what its files, in 16-bit ``dtype``, will say.

    Runs the fusion of ModelOpt's export, rounds norms and smoothing scales to ``dtype``, scales the weights to
    make up for it, and puts the weights on the grid of their integers. Exporting then changes nothing.
    """
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    with third_party_warnings(), torch.no_grad():
        norms = {name: module.weight.clone() for name, module in model.named_modules() if _is_norm(module)}
        consumers = _layers_after_norms(model)
        requantize_resmooth_fused_llm_layers(model)
        for name, before in norms.items():
            norm = model.get_submodule(name)
            if not torch.equal(norm.weight, before):
                _snap_norm(norm, [model.get_submodule(consumer) for consumer in consumers[name]], dtype, name=name)
        for name in layers:
            _snap_smoothing(model.get_submodule(name), dtype, name=name)
        _snap_ranges(model)
        for name in layers:
            _snap_weight(model.get_submodule(name))


def export(model: Any, layers: Collection[str], *, checkpoint: Path, out: Path) -> None:
    """Write the snapped ``model`` to ``out``; what is not quantized is taken, bit for bit, from ``checkpoint``.

    ``model`` cannot be used afterwards: its weights have become the stored integers.
    """
    from modelopt.torch.export import export_hf_checkpoint

    source = CheckpointTensors(checkpoint)
    dtype = _storage_dtype(checkpoint)
    replaced = {f"{name}.weight" for name in layers}
    with third_party_warnings(), torch.no_grad():
        plain = {}
        parameters = dict(model.named_parameters())
        for name in source.names():
            if name in parameters and name not in replaced:
                stored = read_tensor(source, name)
                changed = not torch.equal(stored.float(), parameters[name])
                plain[name] = parameters[name].to(dtype) if changed else stored
        for name in layers:
            scale = model.get_submodule(name).input_quantizer.pre_quant_scale
            if scale is not None:
                plain[f"{name}.pre_quant_scale"] = scale.to(dtype)
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out, extra_state_dict=plain)
    _restore_metadata(checkpoint, out)


def _calibration_windows(context: StepContext) -> tuple[Any, str]:
    calibration = context.params["calibration"]
    corpus_path = (context.params.get("location") or {}).get("corpus_path")
    documents = load_documents(calibration["corpus"], Path(corpus_path) if corpus_path else None)
    windows = token_windows(
        documents,
        context.inputs["checkpoint"],
        count=calibration["samples"],
        length=calibration["length"],
        seed=calibration["seed"],
    )
    return windows, corpus_sha256(documents)


def _near_matches(pattern: str, names: list[str]) -> str:
    for wider in (f"*{pattern}", f"*.{pattern}", f"{pattern}*", f"{pattern}.*", f"*{pattern}*"):
        matches = fnmatch.filter(names, wider)
        if matches:
            return f"globs match full names; {wider!r} matches {len(matches)} layers, e.g. {matches[0]!r}"
    close = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
    return f"globs match full names; near: {', '.join(close)}"


def _check_group_size(model: Any, layers: Collection[str], group_size: int) -> None:
    widths = {name: model.get_submodule(name).in_features for name in layers}
    for name, width in widths.items():
        if width % group_size:
            fitting = [size for size in _GROUP_SIZES if not any(other % size for other in widths.values())]
            advice = f"group_size that fits every layer: {', '.join(map(str, fitting))}" if fitting else "no group size fits every layer"
            raise SpecError(
                f"group_size {group_size} does not divide the {width} input channels of {name}",
                hint=f"{advice}; or exclude this layer",
            )


def _check_shared_norms(model: Any, layers: Collection[str]) -> None:
    """ModelOpt folds AWQ's smoothing of two or more layers into the norm before them, for all that read the norm."""
    for norm, consumers in _layers_after_norms(model).items():
        quantized = [name for name in consumers if name in layers]
        if len(quantized) > 1 and len(quantized) < len(consumers):
            left_out = [name for name in consumers if name not in layers]
            raise SpecError(
                f"exclude leaves out {', '.join(left_out)} but not {', '.join(quantized)}; int4_awq smooths all layers "
                f"that read {norm} together",
                hint="exclude all of them or none",
            )


def _layers_after_norms(model: Any) -> dict[str, list[str]]:
    """For each norm, the linear layers that read its output, found by running two tokens through the model."""
    outputs: list[tuple[Any, str]] = []
    consumers: dict[str, list[str]] = {}

    def on_norm(name: str) -> Any:
        # The tensor is kept, so that no later one can have its identity.
        return lambda module, args, output: outputs.append((output, name))

    def on_linear(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            for output, norm in outputs:
                if output is args[0]:
                    consumers.setdefault(norm, []).append(name)

        return hook

    handles = [
        module.register_forward_hook(on_norm(name)) if _is_norm(module) else module.register_forward_pre_hook(on_linear(name))
        for name, module in model.named_modules()
        if _is_norm(module) or isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.ones((1, 2), dtype=torch.long), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return consumers


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None


@contextmanager
def _watched(
    model: Any, windows: Any, *, passes: int, progress: Callable[[float | None, str], None]
) -> Iterator[None]:
    """While entered, every module's output is checked for NaN and Inf and progress is reported per decoder layer."""
    blocks = model.base_model.layers
    rows = 1 if windows is None else max(1, _TOKENS_PER_BATCH // windows.shape[1])
    batches = 0 if windows is None else -(-len(windows) // rows)
    done, total = 0, max(1, passes * batches * len(blocks))

    def on_output(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                raise GateError(
                    f"calibration met NaN or Inf in the output of {name}",
                    hint="the checkpoint may hold NaN or overflowing weights; check its source, or calibrate with other text",
                )

        return hook

    def on_block(module: Any, args: Any, output: Any) -> None:
        nonlocal done
        done += 1
        progress(min(1.0, done / total), f"calibrating on {len(windows)} windows")

    watched = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding)) or _is_norm(module)]
    handles = [module.register_forward_hook(on_output(name)) for name, module in watched]
    if windows is not None:
        handles += [block.register_forward_hook(on_block) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_ranges(model: Any) -> None:
    for name, module in model.named_modules():
        for attribute in ("_amax", "_pre_quant_scale"):
            values = getattr(module, attribute, None)
            if values is not None and not torch.isfinite(values).all():
                raise GateError(
                    f"calibration left NaN or Inf in {name}.{attribute.lstrip('_')}",
                    hint="the checkpoint may hold NaN or overflowing weights; check its source, or exclude this layer",
                )


def _snap_norm(norm: Any, layers: list[Any], dtype: Any, *, name: str) -> None:
    """Round a norm that took up smoothing scales; the layers that read it take up the rounding error."""
    rounded = _rounded(norm.weight, dtype, name=f"{name}.weight")
    ratio = torch.where(rounded == 0, torch.ones_like(rounded), norm.weight / rounded)
    for layer in layers:
        layer.weight.mul_(ratio)
        _measure_weight_range(layer)
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


def _snap_ranges(model: Any) -> None:
    """Make every calibrated range survive storage as a float32 scale (range / largest code) to the last bit.

    A range of zero (a dead channel) becomes what ModelOpt's export writes for it: scale 1.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    for quantizer in model.modules():
        if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled or quantizer.amax is None:
            continue
        amax = torch.where(quantizer.amax == 0, torch.full_like(quantizer.amax, quantizer.maxbound), quantizer.amax)
        for _ in range(_ROUND_TRIPS):
            stored = (amax / quantizer.maxbound) * quantizer.maxbound
            if torch.equal(stored, amax):
                break
            amax = stored
        quantizer.amax = amax


def _snap_weight(layer: Any) -> None:
    """Replace a weight by the values its stored integers stand for."""
    from modelopt.torch.export.quant_utils import (
        get_quantization_format,
        get_weight_block_size,
        get_weight_scaling_factor,
        to_quantized_weight,
    )

    scale = get_weight_scaling_factor(layer)
    stored = to_quantized_weight(layer.weight, scale, get_quantization_format(layer), None, get_weight_block_size(layer))
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


def _storage_dtype(checkpoint: Path) -> Any:
    """The dtype of the checkpoint's tensors that hold most bytes."""
    source = CheckpointTensors(checkpoint)
    largest = max(source.names(), key=source.nbytes)
    return read_tensor(source, largest).dtype


def _restore_metadata(checkpoint: Path, out: Path) -> None:
    """The input's own config.json plus ModelOpt's section, and its tokenizer; transformers rewrites both freely."""
    quantization = read_json_object(out / CONFIG_FILE)["quantization_config"]
    config = {**read_json_object(checkpoint / CONFIG_FILE), "quantization_config": quantization}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").unlink(missing_ok=True)
    for name in _COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
