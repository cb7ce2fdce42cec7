"""Calibration: ModelOpt's quantizers, inserted into a model and given the ranges of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from enginesmith import heap
from enginesmith.errors import GateError
from enginesmith.quantize.recipe import Recipe, is_norm
from enginesmith.torch_models import linear_names, quantizer_config, require_modelopt, third_party_warnings

# AWQ quantizes every weight once per candidate scale and batch, so batches are few; this bounds activations.
_TOKENS_PER_BATCH = 4096
_LOGITS_PER_CHUNK = 1 << 24


def calibrate(
    model: Any,
    recipe: Recipe,
    layers: Collection[str],
    *,
    windows: Any,
    progress: Callable[[float | None, str], None] = lambda _fraction, _note: None,
) -> None:
    """Insert ModelOpt's quantizers into ``model`` and calibrate them on ``windows`` (int64 [n, length], numpy).

    ``windows`` is None for a recipe that needs no activations.

    Raises:
        GateError: a weight, an activation or a calibrated range is NaN or infinite; the module is named.
    """
    require_modelopt()
    _check_weights(model)
    import modelopt.torch.quantization as mtq

    entries = quantizer_config(
        recipe.scheme,
        layers=set(layers),
        linears=linear_names(model),
        group_size=recipe.group_size,
        kv_cache=recipe.kv_cache,
    )
    passes = 2 if recipe.algorithm["method"] == "awq_lite" else 1

    def forward_loop(_: Any) -> None:
        heap.reuse_large_blocks()
        for batch in torch.from_numpy(windows).split(_rows_per_batch(windows)):
            hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
            if recipe.quantize_lm_head:
                _run_head(model, hidden)
        heap.map_large_blocks()

    heap.map_large_blocks()
    with third_party_warnings(), torch.no_grad(), _watched(model, windows, passes=passes, progress=progress):
        mtq.quantize(
            model,
            {"quant_cfg": entries, "algorithm": recipe.algorithm},
            forward_loop=forward_loop if recipe.needs_activations else None,
        )
    _check_ranges(model)


def _rows_per_batch(windows: Any) -> int:
    return max(1, _TOKENS_PER_BATCH // int(windows.shape[1]))


def _run_head(model: Any, hidden: Any) -> None:
    """Show the head its inputs, some tokens at a time: its logits are by far the largest activation."""
    tokens = max(1, _LOGITS_PER_CHUNK // model.lm_head.out_features)
    for chunk in hidden.reshape(1, -1, hidden.shape[-1]).split(tokens, dim=1):
        model.lm_head(chunk)


@contextmanager
def _watched(
    model: Any, windows: Any, *, passes: int, progress: Callable[[float | None, str], None]
) -> Iterator[None]:
    """While entered, every module's output is checked for NaN and Inf and progress is reported per decoder layer."""
    blocks = model.base_model.layers
    batches = 0 if windows is None else -(-len(windows) // _rows_per_batch(windows))
    done, total = 0, max(1, passes * batches * len(blocks))

    def on_output(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                raise GateError(
                    f"calibration met NaN or Inf in the output of {name}",
                    hint="the checkpoint may hold NaN or overflowing weights; check its source, or calibrate with other text",
                )

        return hook

    def on_block(_module: Any, _args: Any, _output: Any) -> None:
        nonlocal done
        heap.trim()
        done += 1
        progress(min(1.0, done / total), f"calibrating on {len(windows)} windows")

    watched = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) or is_norm(module)
    ]
    handles = [module.register_forward_hook(on_output(name)) for name, module in watched]
    if windows is not None:
        handles += [block.register_forward_hook(on_block) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_weights(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise GateError(
                f"{name} holds NaN or Inf: no range can be calibrated",
                hint="check the source of the checkpoint",
            )


def _check_ranges(model: Any) -> None:
    for name, module in model.named_modules():
        for attribute in ("_amax", "_pre_quant_scale"):
            values = getattr(module, attribute, None)
            if values is not None and not torch.isfinite(values).all():
                raise GateError(
                    f"calibration left NaN or Inf in {name}.{attribute.lstrip('_')}",
                    hint="the checkpoint may hold NaN or overflowing weights; check its source, or exclude this layer",
                )
