"""Whether a checkpoint holds exactly the tensors that its ``config.json`` calls for. Reads headers only."""

from __future__ import annotations

import re

from enginesmith.checkpoints.tensors import CONFIG_FILE, CheckpointTensors
from enginesmith.engines.tensorrt_llm.decoder import Decoder, Module
from enginesmith.errors import SourceError

_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
_KV_SCALES = re.compile(r"model\.layers\.\d+\.self_attn\.(k_proj\.k_scale|v_proj\.v_scale)")
_CONSTANT = ".rotary_emb.inv_freq"
"""Stored by old exporters; follows from ``config.json``."""


def check_inventory(tensors: CheckpointTensors, decoder: Decoder) -> None:
    """Raise a SourceError that names tensor and file when one is missing, left over or of the wrong shape."""
    modules = [module for layer in range(decoder.layers) for module in decoder.linears(layer)]
    if not decoder.tied:
        modules.append(Module("lm_head", decoder.vocab, decoder.hidden))
    shapes = dict(decoder.plain_shapes())
    shapes |= {f"{module.name}.bias": (module.rows,) for module in modules if module.bias}
    missing = [name for name in shapes if name not in tensors]
    missing += [f"{module.name}.weight" for module in modules if f"{module.name}.weight" not in tensors]
    if missing:
        fused = _fused_experts(tensors)
        raise SourceError(
            f"{tensors.directory} has no tensor {missing[0]}, which its {CONFIG_FILE} calls for "
            f"({len(missing)} tensors are missing)",
            hint=fused
            or f"{CONFIG_FILE} and the weights may belong to different models, or a shard was left out",
        )
    _check_nothing_left(
        tensors, decoder, {*shapes, *(f"{module.name}.weight" for module in modules)}, modules
    )
    for name, shape in shapes.items():
        _check_shape(tensors, name, shape)
    for module in modules:
        name = f"{module.name}.weight"
        packed = tensors.dtype(name) == "U8"
        _check_shape(tensors, name, (module.rows // 2 if packed else module.rows, module.columns))


def _fused_experts(tensors: CheckpointTensors) -> str | None:
    fused = next(
        (name for name in tensors.names() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))),
        None,
    )
    if fused is None:
        return None
    return f"{fused} holds all experts in one tensor; save the model with transformers 5, which writes one for each"


def _check_nothing_left(
    tensors: CheckpointTensors, decoder: Decoder, known: set[str], modules: list[Module]
) -> None:
    linear = {module.name for module in modules}
    for name in tensors.names():
        module, _, last = name.rpartition(".")
        if name in known or name.endswith(_CONSTANT) or (name == "lm_head.weight" and decoder.tied):
            continue
        if (last in _SCALES and module in linear) or _KV_SCALES.fullmatch(name):
            continue
        raise SourceError(
            f"{tensors.entry(name).file} holds tensor {name}, which {CONFIG_FILE} does not call for; it would be lost",
            hint=f"compare {CONFIG_FILE} with the model's own, e.g. num_hidden_layers, attention_bias and architectures",
        )


def _check_shape(tensors: CheckpointTensors, name: str, expected: tuple[int, ...]) -> None:
    entry = tensors.entry(name)
    if entry.shape != expected:
        raise SourceError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, {CONFIG_FILE} implies {list(expected)}",
            hint=f"{CONFIG_FILE} and the weights belong to different models",
        )
