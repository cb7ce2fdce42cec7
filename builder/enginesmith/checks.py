"""Whether a spec and a checkpoint's ``config.json`` go together, before anyone waits for a build.

The entry point of every legality check, and owner of those for the numeric twin; GPU targets are judged by
``enginesmith.legality``. Called by ``plan`` as soon as a ``config.json`` is at hand and by ``build`` right after fetch.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.config_kinds import check_kinds
from enginesmith.errors import SourceError, SpecError
from enginesmith.legality import check_targets
from enginesmith.model_fit import GROUP_SIZES, config_size
from enginesmith.platforms import ARCHITECTURES, MOE_ARCHITECTURES, RUNTIME_ARCHITECTURES
from enginesmith.spec import ModelSpec, Variant
from enginesmith.stored_quantization import stored_algorithm, stored_section


def read_hf_config(checkpoint: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint directory, with how it is quantized.

    ModelOpt describes that in ``hf_quant_config.json``, older releases only there; what it says is added to
    ``quantization_config``.

    Raises:
        SourceError: it is missing, not a JSON object, or a key holds a value of the wrong kind.
    """
    path = checkpoint / "config.json"
    config = _read_object(path)
    check_kinds(config, path)
    beside = checkpoint / "hf_quant_config.json"
    if beside.is_file() and isinstance(described := _read_object(beside).get("quantization"), dict):
        inline = config.get("quantization_config")
        config["quantization_config"] = {**(inline if isinstance(inline, dict) else {}), **described}
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {path}: {error}", hint="the checkpoint must be a Hugging Face directory"
        ) from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} must hold a JSON object, seen: {type(config).__name__}")
    return config


def check_legal(spec: ModelSpec, hf_config: Mapping[str, Any]) -> None:
    """Return if every variant of ``spec`` can be built, on every target, from a checkpoint with this ``config.json``.

    Raises:
        SpecError: an unsupported architecture, a length beyond the model's, a variant that does not fit its layers, or a
            target that cannot execute one.
        SourceError: ``config.json`` lacks a size that every supported architecture has.
    """
    if spec.verify.twin:
        _check_architecture(hf_config)
    _check_lengths(spec, hf_config)
    _check_quantized_once(spec, hf_config)
    _check_experts(spec, hf_config)
    check_targets(spec, hf_config)
    if hf_config.get("architectures") not in [[name] for name in ARCHITECTURES]:
        return  # Deployed as it came: its shapes are the runtime's business.
    sizes = linear_input_sizes(hf_config)
    for name, variant in spec.variants.items():
        _check_groups(name, variant, sizes)
        if variant.lm_head == "scheme" and hf_config.get("tie_word_embeddings", False):
            raise SpecError(
                f"variant {name}: lm_head: scheme is not possible, the checkpoint ties lm_head to the embeddings",
                hint="leave lm_head: none for this model",
            )


def linear_input_sizes(hf_config: Mapping[str, Any]) -> dict[str, int]:
    """Input channels of every linear layer in the decoder blocks, by full module name."""
    hidden = config_size(hf_config, "hidden_size")
    heads = config_size(hf_config, "num_attention_heads")
    inputs = {
        "self_attn.q_proj": hidden,
        "self_attn.k_proj": hidden,
        "self_attn.v_proj": hidden,
        "self_attn.o_proj": heads * int(hf_config.get("head_dim") or hidden // heads),
        "mlp.gate_proj": hidden,
        "mlp.up_proj": hidden,
        "mlp.down_proj": config_size(hf_config, "intermediate_size"),
    }
    blocks = range(config_size(hf_config, "num_hidden_layers"))
    return {f"model.layers.{block}.{name}": size for block in blocks for name, size in inputs.items()}


def _check_architecture(hf_config: Mapping[str, Any]) -> None:
    seen = hf_config.get("architectures") or []
    if len(seen) != 1 or seen[0] not in ARCHITECTURES:
        raise SpecError(
            f"architecture {', '.join(map(str, seen)) or '(none named in config.json)'} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}",
            hint="the runtime tensorrt_llm_llmapi takes it, with verify.twin: false"
            if len(seen) == 1 and seen[0] in RUNTIME_ARCHITECTURES["tensorrt_llm_llmapi"]
            else "choose a checkpoint of a supported architecture",
        )


def _check_quantized_once(spec: ModelSpec, hf_config: Mapping[str, Any]) -> None:
    section = stored_section(hf_config)
    again = [name for name, variant in spec.variants.items() if variant.scheme != "none"]
    if section is not None and again:
        raise SpecError(
            f"variant {again[0]}: scheme {spec.variants[again[0]].scheme} cannot be made of this checkpoint, which came "
            f"quantized with {stored_algorithm(section)}: what was rounded away is lost",
            hint="scheme: none deploys it as it came; give the unquantized checkpoint to quantize it",
        )


def _check_experts(spec: ModelSpec, hf_config: Mapping[str, Any]) -> None:
    """Experts are neither quantized here nor, where they came quantized, run in PyTorch as the reference."""
    if hf_config.get("architectures") not in [[name] for name in MOE_ARCHITECTURES]:
        return
    for name, variant in spec.variants.items():
        if variant.scheme != "none":
            raise SpecError(
                f"variant {name}: scheme {variant.scheme} is not possible for {hf_config['architectures'][0]}: experts are not "
                "quantized here",
                hint="scheme: none; or give the checkpoint as ModelOpt quantized it elsewhere, with scheme: none "
                "and verify.twin: false",
            )
    section = stored_section(hf_config)
    if section is not None and spec.verify.twin:
        raise SpecError(
            f"the checkpoint has experts that came quantized with {stored_algorithm(section)}, which nothing here runs as a twin",
            hint="verify.twin: false deploys it as it came, unmeasured; or give the unquantized checkpoint",
        )


def _check_lengths(spec: ModelSpec, hf_config: Mapping[str, Any]) -> None:
    limit = config_size(hf_config, "max_position_embeddings")
    lengths = {
        "serving.max_sequence_length": spec.serving.max_sequence_length,
        "verify.window": spec.verify.window,
    }
    for key, length in lengths.items():
        if length > limit:
            raise SpecError(
                f"{key} is {length}, but the model has {limit} positions (max_position_embeddings)",
                hint=f"set {key} to {limit} or less",
            )


def _check_groups(name: str, variant: Variant, sizes: Mapping[str, int]) -> None:
    group = variant.effective_group_size
    if group is None:
        return
    quantized = {
        layer: size
        for layer, size in sizes.items()
        if not any(fnmatch.fnmatchcase(layer, pattern) for pattern in variant.exclude)
    }
    misfits = [layer for layer, size in quantized.items() if size % group]
    if misfits:
        legal = [str(size) for size in GROUP_SIZES if not any(inputs % size for inputs in quantized.values())]
        others = f" and {len(misfits) - 1} more layers" if len(misfits) > 1 else ""
        raise SpecError(
            f"variant {name}: group_size {group} does not divide the {sizes[misfits[0]]} inputs of {misfits[0]}{others}",
            hint=f"group_size may be {' or '.join(legal)} here"
            if legal
            else "no group size fits every layer: use another scheme, or exclude the layers",
        )
