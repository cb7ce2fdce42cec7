"""Export: writes a snapped model as ModelOpt's unified checkpoint, with everything else as in the input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from enginesmith.checkpoints.tensors import CONFIG_FILE, CheckpointTensors, read_json_object
from enginesmith.torch_models import read_tensor, storage_dtype, third_party_warnings

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
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=out, extra_state_dict=plain)
    _restore_metadata(checkpoint, out)


def _restore_metadata(checkpoint: Path, out: Path) -> None:
    """The input's own config.json plus ModelOpt's section, and its tokenizer; transformers rewrites both freely."""
    quantization = read_json_object(out / CONFIG_FILE)["quantization_config"]
    config = {**read_json_object(checkpoint / CONFIG_FILE), "quantization_config": quantization}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").unlink(missing_ok=True)
    for name in _COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
