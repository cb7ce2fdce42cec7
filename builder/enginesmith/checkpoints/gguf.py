"""A GGUF file converted into a canonical checkpoint, a piece of a tensor at a time.

Owns what GGUF calls things and how its layout differs from Hugging Face's. transformers can load GGUF too, but it
holds the whole model in float32, drops tensors and keys that it does not know without a word, and mixes up the
special tokens; its weights are right, and the tests compare ours with them bit for bit.

Format and key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.canonical import Report, write_json
from enginesmith.checkpoints.gguf_tokenizer import write_tokenizer
from enginesmith.checkpoints.tensors import CONFIG_FILE, SINGLE_FILE
from enginesmith.checkpoints.validate import (
    CheckpointSummary,
    dimensions_of,
    expected_shapes,
    validate_checkpoint,
)
from enginesmith.checkpoints.writer import (
    SAFETENSORS_DTYPES,
    PlannedTensor,
    WeightDtype,
    converted,
    rows_per_piece,
    write_safetensors,
)
from enginesmith.errors import SourceError
from enginesmith.platforms import ARCHITECTURES

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's ``general.architecture``; Mistral models are written as ``llama``, whose equations they share."""

_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_TOKEN_KEYS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1, 3.2 and 3.3 model has; only the factor differs."""
_ROPE_FACTORS = "rope_freqs.weight"
_USE_ORIGINAL = "use the model's original Hugging Face checkpoint instead"


def checkpoint_from_gguf(
    path: Path, out: Path, *, dtype: WeightDtype = "bfloat16", report: Report
) -> CheckpointSummary:
    """Fill ``out`` with the canonical checkpoint of the GGUF file at ``path``, dequantized to ``dtype``.

    Raises:
        SourceError: the file is damaged or holds something that would be lost.
    """
    report(None, f"reading {path.name}")
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = _tensors_by_name(path, reader)
    config = _config(path, metadata, tensors)
    _check_tensors(path, config, tensors)
    report(0.0, "writing the tokenizer")
    write_tokenizer(metadata, out, origin=path)
    write_json(out / CONFIG_FILE, config | {"dtype": dtype})
    token_ids = {key: config[key] for key in _TOKEN_KEYS.values() if key in config}
    write_json(out / "generation_config.json", token_ids)
    target = SAFETENSORS_DTYPES[dtype]
    plan = [PlannedTensor(name, target, _shape(tensor)) for name, tensor in tensors.items()]
    pieces = _pieces(path, tensors, _permuted_head_dims(metadata, config), target=target, report=report)
    write_safetensors(out / SINGLE_FILE, plan, pieces=pieces, metadata={"format": "pt"})
    return validate_checkpoint(out)


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise SourceError(
            f"{path} ({path.stat().st_size} bytes) is not a whole GGUF file: {error}",
            hint="fetch the file again; a download that was cut off looks like this",
        ) from error
    if reader.byte_order == "S":
        raise SourceError(f"{path} is in the other byte order", hint="convert it with gguf-convert-endian")
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise SourceError(
            f"{path} is one part of a split GGUF", hint="join the parts with llama-gguf-split --merge"
        )
    return reader


def _tensors_by_name(path: Path, reader: GGUFReader) -> dict[str, ReaderTensor]:
    """The file's tensors by their Hugging Face names, sorted; ``rope_freqs`` keeps its own."""
    tensors: dict[str, ReaderTensor] = {}
    for tensor in reader.tensors:
        match tensor.name.split("."):
            case [base, "weight"] if base in _TENSOR_NAMES:
                name = f"{_TENSOR_NAMES[base]}.weight"
            case ["blk", layer, base, ("weight" | "bias") as kind] if base in _LAYER_TENSOR_NAMES:
                name = f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[base]}.{kind}"
            case ["rope_freqs", "weight"]:
                name = _ROPE_FACTORS
            case _:
                raise SourceError(
                    f"{path} holds tensor {tensor.name}, which no supported model has", hint=_USE_ORIGINAL
                )
        tensors[name] = tensor
    return dict(sorted(tensors.items()))


def _config(path: Path, metadata: Mapping[str, Any], tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    """The ``config.json`` of the model; takes ``rope_freqs`` out of ``tensors``, because it becomes part of it."""
    prefix = metadata.get("general.architecture")
    if prefix not in _ARCHITECTURES:
        raise SourceError(
            f"{path} holds a model of GGUF architecture {prefix!r}; supported: {', '.join(_ARCHITECTURES)}, "
            f"which are {', '.join(ARCHITECTURES)}"
        )
    architecture = _ARCHITECTURES[prefix]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": prefix != "qwen2" and "model.layers.0.self_attn.q_proj.bias" in tensors,
    }
    for key, name in _CONFIG_KEYS.items():
        if f"{prefix}.{key}" in metadata:
            config[name] = _shortest(metadata[f"{prefix}.{key}"])
    config |= {name: metadata[key] for key, name in _TOKEN_KEYS.items() if key in metadata}
    if "model.embed_tokens.weight" in tensors:
        config["vocab_size"] = _shape(tensors["model.embed_tokens.weight"])[0]
    config.setdefault("head_dim", metadata.get(f"{prefix}.rope.dimension_count"))
    if config["head_dim"] is None:
        del config["head_dim"]
    config["head_dim"] = dimensions_of(config, architecture, path).head_dim
    _refuse_what_config_cannot_say(path, metadata, prefix=prefix, head_dim=config["head_dim"])
    config["rope_parameters"] = _rope_parameters(
        path,
        _shortest(metadata.get(f"{prefix}.rope.freq_base", 10000.0)),
        config["head_dim"],
        tensors.pop(_ROPE_FACTORS, None),
    )
    return config


def _refuse_what_config_cannot_say(
    path: Path, metadata: Mapping[str, Any], *, prefix: str, head_dim: int
) -> None:
    for key, harmless in (
        ("rope.scaling.type", (None, "none")),
        ("rope.dimension_count", (None, head_dim)),
        ("attention.value_length", (None, head_dim)),
        ("attention.sliding_window", (None, 0)),
        ("expert_count", (None, 0)),
    ):
        seen = metadata.get(f"{prefix}.{key}")
        if seen not in harmless:
            raise SourceError(
                f"{path} has {prefix}.{key} = {seen!r}, which cannot be taken over from GGUF",
                hint=_USE_ORIGINAL,
            )


def _rope_parameters(path: Path, theta: float, head_dim: int, factors: ReaderTensor | None) -> dict[str, Any]:
    """The RoPE section of the config. GGUF stores Llama 3's scaling as one divisor for each frequency."""
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    seen = np.asarray(factors.data, dtype=np.float32).reshape(-1)
    scaling = _LLAMA3_SCALING | {"factor": float(seen.max())}
    if seen.size != head_dim // 2 or not np.allclose(
        seen, _llama3_factors(theta, head_dim, scaling), rtol=1e-4
    ):
        raise SourceError(
            f"{path} scales its rotary frequencies in a way that is not Llama 3's", hint=_USE_ORIGINAL
        )
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


def _llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """What each rotary frequency is divided by: float64 [head_dim / 2]. As in transformers' ``modeling_rope_utils``."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))


def _check_tensors(path: Path, config: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> None:
    """Refuse missing and surplus tensors before the weights are converted."""
    (architecture,) = config["architectures"]
    expected = expected_shapes(architecture, dimensions_of(config, architecture, path)).keys()
    for what, names in (
        ("lacks", expected - tensors.keys()),
        ("holds unexpected", tensors.keys() - expected),
    ):
        if names:
            raise SourceError(
                f"{path} {what} tensor {min(names)} ({len(names)} such tensors)", hint=_USE_ORIGINAL
            )


def _permuted_head_dims(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, int]:
    """The head size by the kind of projection whose rows GGUF stores in another order: q and k of ``llama``."""
    if metadata["general.architecture"] != "llama":
        return {}
    return {"q_proj": config["head_dim"], "k_proj": config["head_dim"]}


def _pieces(
    path: Path,
    tensors: Mapping[str, ReaderTensor],
    permuted: Mapping[str, int],
    *,
    target: str,
    report: Report,
) -> Iterator[npt.NDArray[Any]]:
    from gguf import dequantize

    for number, (name, tensor) in enumerate(tensors.items()):
        report(number / len(tensors), f"dequantizing {name}")
        head_dim = permuted.get(name.split(".")[-2], 1)
        shape = _shape(tensor)
        rows = shape[0] if len(shape) > 1 else 1
        step = rows_per_piece(shape, multiple=head_dim) if len(shape) > 1 else 1
        row_bytes = int(tensor.n_bytes) // rows
        for start in range(0, rows, step):
            count = min(step, rows - start)
            # Read, not mapped: mapped pages would count as memory of this process until it ends.
            raw = np.fromfile(
                path, np.uint8, count=count * row_bytes, offset=int(tensor.data_offset) + start * row_bytes
            )
            piece = dequantize(raw.reshape(count, row_bytes), tensor.tensor_type)
            if head_dim > 1:
                piece = _rotary_halves_from_pairs(piece.reshape(-1, *shape[1:]), head_dim)
            yield converted(piece, target, name=name)


def _rotary_halves_from_pairs(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """Rows of whole heads in Hugging Face's order.

    ggml rotates neighbouring rows (0,1), (2,3), ...; Hugging Face rotates row i with row i + head_dim / 2.
    """
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    # GGUF lists the fastest dimension first.
    return tuple(int(size) for size in reversed(tensor.shape))


def _shortest(value: Any) -> Any:
    """A float32 as people wrote it: 1e-05, not 9.999999747378752e-06. Anything else as it is."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
