"""Export: writes a snapped model as ModelOpt's unified checkpoint, with everything else as in the input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from enginesmith.checkpoints.tensors import (
    CONFIG_FILE,
    QUANTIZATION_FILE,
    CheckpointTensors,
    read_json_object,
)
from enginesmith.schemes import KV_CACHE_BOUNDS
from enginesmith.torch_models import (
    attentions_with_cache,
    read_tensor,
    storage_dtype,
    third_party_warnings,
)

_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export(model: Any, layers: Collection[str], *, checkpoint: Path, out: Path) -> None:
    """Write the snapped ``model`` to ``out``; what is not quantized is taken, bit for bit, from ``checkpoint``.

    ``model`` cannot be used afterwards: its weights have become the stored integers.
    """
    from modelopt.torch.export import export_hf_checkpoint

    source = CheckpointTensors(checkpoint)
    dtype = storage_dtype(checkpoint)
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
        int8_scales = _taken_int8_cache_scales(model)
        plain |= int8_scales
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out, extra_state_dict=plain)
    _restore_metadata(checkpoint, out)
    if int8_scales:
        _describe_int8_cache(out)


def _taken_int8_cache_scales(model: Any) -> dict[str, Any]:
    """The scales of an INT8 KV cache under the names that ModelOpt gives those of FP8; its quantizers are removed.

    ModelOpt 0.47's unified export refuses INT8 caches (``postprocess_state_dict``), so they must be out of its sight.
    """
    scales: dict[str, Any] = {}
    for name, attention in attentions_with_cache(model).items():
        for part in "kv":
            quantizer = attention.get_submodule(f"{part}_bmm_quantizer")
            if quantizer.is_enabled and quantizer.num_bits == 8:
                scale = quantizer.amax.float().reshape(()) / KV_CACHE_BOUNDS["int8"]
                scales[f"{name}.{part}_proj.{part}_scale"] = scale
                quantizer.reset_amax()
                quantizer.disable()
    return scales


def _describe_int8_cache(out: Path) -> None:
    """Say in both descriptions what ModelOpt would say of an FP8 cache."""
    path = out / QUANTIZATION_FILE
    document = read_json_object(path)
    document["quantization"]["kv_cache_quant_algo"] = "INT8"
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
    config = read_json_object(out / CONFIG_FILE)
    config["quantization_config"]["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "int"}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _restore_metadata(checkpoint: Path, out: Path) -> None:
    """The input's own config.json plus ModelOpt's section, and its tokenizer; transformers rewrites both freely."""
    quantization = read_json_object(out / CONFIG_FILE)["quantization_config"]
    config = {**read_json_object(checkpoint / CONFIG_FILE), "quantization_config": quantization}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").unlink(missing_ok=True)
    for name in _COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
