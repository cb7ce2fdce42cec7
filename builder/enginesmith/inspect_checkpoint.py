"""What is in a checkpoint: a Hugging Face directory, one safetensors file, or a TensorRT-LLM checkpoint. Headers only."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import (
    CONFIG_FILE,
    CheckpointTensors,
    TensorEntry,
    read_header,
    read_json_object,
)
from enginesmith.checkpoints.tokenizer import MODULES_FILE, read_modules
from enginesmith.errors import SourceError
from enginesmith.inspect_report import Inspection, Listing
from enginesmith.stored_quantization import stored_algorithm, stored_section

_LARGEST = 12
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def inspect_checkpoint(directory: Path) -> Inspection:
    """What is in the Hugging Face checkpoint ``directory``.

    Raises:
        SourceError: a file is missing, cut off or damaged.
    """
    tensors = CheckpointTensors(directory)
    config = read_json_object(directory / CONFIG_FILE)
    entries = {name: tensors.entry(name) for name in tensors.names()}
    modules = read_modules(directory) if (directory / MODULES_FILE).exists() else []
    facts = {
        "architecture": ", ".join(map(str, elements(config.get("architectures")))),
        "model_type": config.get("model_type"),
        **_counted(entries),
        "quantization": _quantization(config),
        **{name: config[name] for name in _SIZES if isinstance(config.get(name), int)},
        "labels": list(named(config.get("id2label")).values()) if _classifies(config) else [],
        "sentence_transformers": [kind.rpartition(".")[2] for kind, _ in modules],
        "files": len(tensors.files()),
    }
    return Inspection("Hugging Face checkpoint", directory, facts, _listings(entries))


def inspect_safetensors(path: Path) -> Inspection:
    """What is in one safetensors file.

    Raises:
        SourceError: it is cut off or damaged.
    """
    entries = read_header(path)
    return Inspection("safetensors file", path, _counted(entries), _listings(entries))


def inspect_tensorrt_llm_checkpoint(directory: Path) -> Inspection:
    """What is in the TensorRT-LLM checkpoint ``directory``: its ``config.json`` and one file per rank.

    Raises:
        SourceError: a rank is missing, cut off or damaged.
    """
    config = read_json_object(directory / CONFIG_FILE)
    mapping = named(config.get("mapping"))
    files = (directory / f"rank{rank}.safetensors" for rank in range(rank_count(mapping, directory)))
    entries = {file.name: read_header(file) for file in files}
    together = {f"{name}/{tensor}": entry for name, own in entries.items() for tensor, entry in own.items()}
    facts = {
        "architecture": config.get("architecture"),
        "dtype": config.get("dtype"),
        "mapping": {name: size for name, size in mapping.items() if isinstance(size, int)},
        "quantization": named(config.get("quantization")),
        **_counted(together),
        **{name: config[name] for name in _SIZES if isinstance(config.get(name), int)},
    }
    rows = [
        {"rank": rank, "tensors": len(own), "bytes": (directory / name).stat().st_size}
        for rank, (name, own) in enumerate(entries.items())
    ]
    return Inspection(
        "TensorRT-LLM checkpoint",
        directory,
        facts,
        (Listing("ranks", rows), *_listings(next(iter(entries.values())))),
    )


def rank_count(mapping: Mapping[str, Any], directory: Path) -> int:
    """``world_size`` of a TensorRT-LLM mapping, 1 where it says nothing.

    Raises:
        SourceError: it is no count.
    """
    ranks = mapping.get("world_size", 1)
    if not isinstance(ranks, int) or ranks < 1:
        raise SourceError(
            f"{directory / CONFIG_FILE} has world_size {ranks!r}; allowed: 1 and more",
            hint="copy the directory again: its config.json is damaged",
        )
    return ranks


def elements(section: Any) -> list[Any]:
    """The elements, none where it is no list."""
    return section if isinstance(section, list) else []


def named(section: Any) -> dict[str, Any]:
    """What of a section of a configuration says something."""
    if not isinstance(section, Mapping):
        return {}
    return {name: value for name, value in section.items() if value not in (None, [], {}, "")}


def _counted(entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    dtypes = Counter[str]()
    for entry in entries.values():
        dtypes[entry.dtype] += math.prod(entry.shape)
    return {
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "tensors": len(entries),
        "weight_bytes": sum(entry.nbytes for entry in entries.values()),
    }


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = stored_section(config)
    if section is None:
        return {}
    kept = ("group_size", "kv_cache_quant_algo", "exclude_modules", "ignore")
    return {"algorithm": stored_algorithm(section), **named({name: section.get(name) for name in kept})}


def _classifies(config: Mapping[str, Any]) -> bool:
    return any("Classification" in str(name) for name in elements(config.get("architectures")))


def _listings(entries: Mapping[str, TensorEntry]) -> tuple[Listing, ...]:
    by_layer: dict[str, list[TensorEntry]] = defaultdict(list)
    for name, entry in entries.items():
        by_layer[_layer_of_tensor(name)].append(entry)
    layers = [
        {
            "layer": layer,
            "tensors": len(own),
            "parameters": sum(math.prod(entry.shape) for entry in own),
            "dtypes": sorted({entry.dtype for entry in own}),
            "bytes": sum(entry.nbytes for entry in own),
        }
        for layer, own in sorted(by_layer.items(), key=lambda item: _natural(item[0]))
    ]
    by_size = sorted(entries.items(), key=lambda item: -item[1].nbytes)[:_LARGEST]
    largest = [
        {"name": name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
        for name, entry in by_size
    ]
    return Listing("layers", layers), Listing("largest tensors", largest)


def _layer_of_tensor(name: str) -> str:
    """A tensor's module path, no further than its first number: ``model.layers.3``, or ``model.embed_tokens``."""
    path = name.split(".")[:-1]
    for index, part in enumerate(path):
        if part.isdecimal():
            return ".".join(path[: index + 1])
    return ".".join(path[:2]) or name


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key in which layer 10 comes after layer 9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in name.split(".")]
