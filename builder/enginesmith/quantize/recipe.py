"""What a variant asks of quantization, and which layers of a model it means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from enginesmith.checkpoints.validate import MOE_ARCHITECTURES
from enginesmith.errors import SpecError
from enginesmith.schemes import SCHEMES, KvCacheName, Scheme
from enginesmith.torch_models import linear_names

_GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class Recipe:
    """What a variant's part of the spec says about quantization."""

    scheme: Scheme
    group_size: int | None = None
    alpha: float = 0.5
    alpha_step: float = 0.1
    kv_cache: KvCacheName = "none"
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
            kv_cache=params["kv_cache"],
            quantize_lm_head=params["lm_head"] == "scheme",
            exclude=tuple(params["exclude"]),
        )

    @property
    def needs_activations(self) -> bool:
        """Whether calibration data can change the result: only plain weight quantization needs none."""
        return self.scheme.name != "int8_wo" or self.kv_cache != "none"

    @property
    def algorithm(self) -> dict[str, Any]:
        """ModelOpt's calibration algorithm with its parameters."""
        match self.scheme.name:
            case "int8_sq":
                return {"method": "smoothquant", "alpha": self.alpha}
            case "int4_awq" | "w4a8_awq":
                return {"method": "awq_lite", "alpha_step": self.alpha_step}
            case _:
                return {"method": "max"}


def choose_layers(model: Any, recipe: Recipe) -> list[str]:
    """The full names of the linear layers that ``recipe`` quantizes in ``model``, checked to be quantizable.

    Raises:
        SpecError: the model has experts, an exclude glob matches no linear layer, nothing is left, the head is tied, the group size
            does not divide a layer's input, or AWQ would leave out part of a group that shares a norm.
    """
    _check_dense(model)
    linears = linear_names(model)
    head = "lm_head"
    excluded = set() if recipe.quantize_lm_head else {head}
    for pattern in recipe.exclude:
        matches = fnmatch.filter(linears, pattern)
        if not matches:
            raise SpecError(
                f"exclude {pattern!r} matches no linear layer of the model",
                hint=_near_matches(pattern, linears),
            )
        excluded.update(matches)
    layers = [name for name in linears if name not in excluded]
    if not layers:
        raise SpecError(
            "exclude leaves no layer to quantize", hint="use scheme none for an unquantized variant"
        )
    if recipe.quantize_lm_head and model.config.tie_word_embeddings:
        raise SpecError(
            "lm_head: scheme asks to quantize the output head, but this model's head is tied to its embedding",
            hint="leave lm_head at none; the embedding would be quantized with it",
        )
    if recipe.group_size is not None:
        _check_group_size(model, layers, recipe.group_size)
        _check_shared_norms(model, layers)
    return layers


def _check_dense(model: Any) -> None:
    """The experts of transformers 5 are two tensors for all of them, no linear layers that a recipe could name.

    ModelOpt 0.47 itself quantizes such experts to FP8, but fails at AWQ (``QuantMixtralExperts has no len()``).
    """
    architecture = type(model).__name__
    if architecture in MOE_ARCHITECTURES:
        raise SpecError(
            f"{architecture} cannot be quantized here: its experts would stay unquantized",
            hint="use scheme none, or a checkpoint that was quantized with ModelOpt elsewhere",
        )


def layers_after_norms(model: Any) -> dict[str, list[str]]:
    """For each norm, the linear layers that read its output, found by running two tokens through the model."""
    outputs: list[tuple[Any, str]] = []
    consumers: dict[str, list[str]] = {}

    def on_norm(name: str) -> Any:
        # The tensor is kept, so that no later one can have its identity.
        return lambda _module, _args, output: outputs.append((output, name))

    def on_linear(name: str) -> Any:
        def hook(_module: Any, args: Any) -> None:
            for output, norm in outputs:
                if output is args[0]:
                    consumers.setdefault(norm, []).append(name)

        return hook

    handles = [
        module.register_forward_hook(on_norm(name))
        if is_norm(module)
        else module.register_forward_pre_hook(on_linear(name))
        for name, module in model.named_modules()
        if is_norm(module) or isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.ones((1, 2), dtype=torch.long), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return consumers


def is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None


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
            advice = (
                f"group_size that fits every layer: {', '.join(map(str, fitting))}"
                if fitting
                else "no group size fits every layer"
            )
            raise SpecError(
                f"group_size {group_size} does not divide the {width} input channels of {name}",
                hint=f"{advice}; or exclude this layer",
            )


def _check_shared_norms(model: Any, layers: Collection[str]) -> None:
    """ModelOpt folds AWQ's smoothing of two or more layers into the norm before them, for all that read the norm."""
    for norm, consumers in layers_after_norms(model).items():
        quantized = [name for name in consumers if name in layers]
        if len(quantized) > 1 and len(quantized) < len(consumers):
            left_out = [name for name in consumers if name not in layers]
            raise SpecError(
                f"exclude leaves out {', '.join(left_out)} but not {', '.join(quantized)}; AWQ smooths all layers "
                f"that read {norm} together",
                hint="exclude all of them or none",
            )
