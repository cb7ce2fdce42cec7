"""Checkpoints that cannot be lowered: each is one clear error that names the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint
from engine_cases import edit_config, edit_tensors, lowered

from enginesmith.errors import SourceError

LAYER = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"))


def with_quantized_layer(tensors: Tensors, **changes: Any) -> None:
    """Turn ``LAYER`` [128, 64] into W8A8; a change replaces one of its tensors, None removes it."""
    import torch

    layer = {
        "weight": torch.ones((128, 64), dtype=torch.int8),
        "weight_scale": torch.full((128,), 0.01),
        "input_scale": torch.tensor(0.5),
        "pre_quant_scale": torch.ones(64),
        **changes,
    }
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{name}": tensor for name, tensor in layer.items() if tensor is not None}


def layer_with(**changes: Callable[[Any], Any] | None) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        import torch

        with_quantized_layer(
            tensors, **{name: None if make is None else make(torch) for name, make in changes.items()}
        )

    return edit


def removed(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)


def cast(name: str, dtype: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        import torch

        tensors[name] = tensors[name].to(getattr(torch, dtype))

    return edit


NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "projection missing": (removed(f"{LAYER}.weight"), rf"no tensor '{LAYER}.weight'"),
    "norm missing": (removed("model.norm.weight"), r"no tensor 'model.norm.weight'"),
    "embedding missing": (removed("model.embed_tokens.weight"), r"no tensor 'model.embed_tokens.weight'"),
    "head missing": (removed("lm_head.weight"), r"no tensor 'lm_head.weight'"),
    "projection in float64": (cast(f"{LAYER}.weight", "float64"), rf"{LAYER}.weight has dtype F64.*BF16, F16, F32"),
    "projection in int32": (cast(f"{LAYER}.weight", "int32"), rf"{LAYER}.weight has dtype I32"),
    "projection in float8 e5m2": (cast(f"{LAYER}.weight", "float8_e5m2"), rf"{LAYER}.weight has dtype F8_E5M2"),
    "embedding in float64": (cast("model.embed_tokens.weight", "float64"), r"embed_tokens.weight has dtype F64"),
    "embedding in int8": (cast("model.embed_tokens.weight", "int8"), r"embed_tokens.weight has dtype I8"),
    "norm in int64": (cast("model.norm.weight", "int64"), r"model.norm.weight has dtype I64"),
    "no weight scale": (layer_with(weight_scale=None), rf"{LAYER} has I8 weights but no {LAYER}.weight_scale"),
    "weight scale NaN": (layer_with(weight_scale=lambda t: t.full((128,), NAN)), r"weight_scale holds NaN or Inf"),
    "weight scale Inf": (layer_with(weight_scale=lambda t: t.full((128,), INF)), r"weight_scale holds NaN or Inf"),
    "smoothing NaN": (layer_with(pre_quant_scale=lambda t: t.full((64,), NAN)), r"pre_quant_scale holds NaN or Inf"),
    "input scale NaN": (layer_with(input_scale=lambda t: t.tensor(NAN)), r"input_scale holds NaN or Inf"),
    "input scale 0": (layer_with(input_scale=lambda t: t.tensor(0.0)), r"input_scale .* above 0, seen: 0.0"),
    "input scale per channel": (layer_with(input_scale=lambda t: t.ones(64)), r"input_scale .* seen: shape \[64\]"),
    "INT8 in groups": (layer_with(weight_scale=lambda t: t.ones(128, 2)), rf"layer {LAYER} is quantized in a way"),
    "FP8 per channel": (
        layer_with(weight=lambda t: t.ones(128, 64).to(t.float8_e4m3fn)),
        r"weight F8_E4M3 \(128, 64\), weight_scale \(128,\), input_scale present",
    ),
    "FP8 without input scale": (
        layer_with(weight=lambda t: t.ones(128, 64).to(t.float8_e4m3fn), weight_scale=lambda t: t.ones(()), input_scale=None),
        r"input_scale absent",
    ),
    "INT4 with INT8 activations": (
        layer_with(weight=lambda t: t.ones((64, 64), dtype=t.uint8), weight_scale=lambda t: t.ones(128, 2)),
        r"weight U8 \(64, 64\), weight_scale \(128, 2\), input_scale present",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), BAD.values(), ids=BAD.keys())
def test_weights_that_cannot_be_lowered_are_one_clear_error(
    edit: Callable[[Tensors], None], message: str, plain: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(plain, tmp_path / "checkpoint")
    edit_tensors(checkpoint, edit)

    with pytest.raises(SourceError, match=message):
        lowered(checkpoint, tmp_path / "engine")


def test_the_same_layer_without_a_fault_is_lowered(plain: Path, tmp_path: Path) -> None:
    # Otherwise the cases above could fail for another reason than the one they name.
    checkpoint = shutil.copytree(plain, tmp_path / "checkpoint")
    edit_tensors(checkpoint, layer_with())

    assert (lowered(checkpoint, tmp_path / "engine") / "model.onnx").exists()


def test_cache_scale_that_is_missing_for_one_layer_is_named(plain: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(plain, tmp_path / "checkpoint")

    def only_first_layer(tensors: Tensors) -> None:
        import torch

        for part in "kv":
            tensors[f"model.layers.0.self_attn.{part}_proj.{part}_scale"] = torch.tensor(1.0)

    edit_tensors(checkpoint, only_first_layer)

    with pytest.raises(SourceError, match=r"no tensor 'model.layers.1.self_attn.k_proj.k_scale'"):
        lowered(checkpoint, tmp_path / "engine")


def test_architecture_that_is_not_supported_is_named_with_those_that_are(plain: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(plain, tmp_path / "checkpoint")
    edit_config(checkpoint, architectures=["GemmaForCausalLM"])

    with pytest.raises(SourceError, match=r"GemmaForCausalLM .* supported: LlamaForCausalLM"):
        lowered(checkpoint, tmp_path / "engine")


def test_damaged_generation_config_is_named(plain: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(plain, tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 2})[:-3])

    with pytest.raises(SourceError, match=r"generation_config.json is not valid JSON"):
        lowered(checkpoint, tmp_path / "engine")
