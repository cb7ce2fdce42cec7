"""What is in a directory of engines: ONNX Runtime's, TensorRT's or TensorRT-LLM's, as far as it can be read without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import CONFIG_FILE, read_json_object
from enginesmith.errors import SourceError
from enginesmith.inspect_checkpoint import named, rank_count
from enginesmith.inspect_onnx import inspect_onnx
from enginesmith.inspect_report import Inspection, Listing

ENGINE_FILE, PLAN_FILE, GRAPH_FILE = "engine.json", "model.plan", "model.onnx"
_BUILD_LIMITS = (
    "max_batch_size",
    "max_input_len",
    "max_seq_len",
    "max_num_tokens",
    "max_beam_width",
    "opt_num_tokens",
    "strongly_typed",
)
_MODEL_FACTS = (
    "architecture",
    "dtype",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
)


def inspect_onnx_runtime_engine(directory: Path) -> Inspection:
    """What is in a directory with ``engine.json`` and ``model.onnx``.

    Raises:
        SourceError: one of them is damaged.
    """
    engine = read_json_object(directory / ENGINE_FILE)
    facts = {
        name: value
        for name, value in engine.items()
        if isinstance(value, (str, int, float, list)) or name in ("session", "session_config", "operators")
    }
    return Inspection("ONNX Runtime engine", directory, facts, parts=(inspect_onnx(directory / GRAPH_FILE),))


def inspect_tensorrt_engine(directory: Path) -> Inspection:
    """What ``engine.json`` says of the ``model.plan`` beside it, which only the GPU it is for can read.

    Raises:
        SourceError: one of them is missing or damaged, or they are not of each other.
    """
    engine = read_json_object(directory / ENGINE_FILE)
    plan = directory / PLAN_FILE
    size = plan.stat().st_size if plan.is_file() else None
    recorded = engine.get("plan_bytes")
    if size is None or (recorded is not None and size != recorded):
        seen = "is missing" if size is None else f"has {size} bytes, recorded were {recorded!r}"
        raise SourceError(f"{plan} {seen}", hint="copy the directory again, or build it again")
    try:
        listings = _tensorrt_listings(engine)
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{directory / ENGINE_FILE} is not as the step compile_tensorrt writes it: {error!r}",
            hint="build it again",
        ) from error
    kept = ("runtime", "version", "compute_capabilities", "device_memory_bytes", "read_on", "layers_of", "compared", "compared_reason", "timing_cache", "build_seconds")  # fmt: skip
    facts = {
        **{name: engine[name] for name in kept if name in engine},
        "layer_count": len(engine["layers"]),
        "plan_bytes": size,
    }
    return Inspection("TensorRT engine", directory, facts, listings)


def inspect_tensorrt_llm_engines(directory: Path) -> Inspection:
    """What is in a directory that ``trtllm-build`` wrote: ``config.json`` and one engine per rank.

    Raises:
        SourceError: an engine is missing or empty.
    """
    config = read_json_object(directory / CONFIG_FILE)
    model, build = _section(config, "pretrained_config"), _section(config, "build_config")
    mapping = named(model.get("mapping"))
    rows = []
    ranks = rank_count(mapping, directory)
    for rank in range(ranks):
        file = directory / f"rank{rank}.engine"
        if not file.is_file() or not file.stat().st_size:
            raise SourceError(
                f"{file} is missing or empty; the engines are for {ranks} ranks",
                hint="copy the directory again: it must be complete",
            )
        rows.append({"rank": rank, "file": file.name, "bytes": file.stat().st_size})
    facts = {
        "version": config.get("version"),
        **{name: model[name] for name in _MODEL_FACTS if name in model},
        "mapping": {name: size for name, size in mapping.items() if isinstance(size, int)},
        "quantization": named(model.get("quantization")),
        **{name: build[name] for name in _BUILD_LIMITS if name in build},
        "plugins": {
            name: value
            for name, value in _section(build, "plugin_config").items()
            if value not in (None, False)
        },
        "engine_bytes": sum(row["bytes"] for row in rows if isinstance(row["bytes"], int)),
    }
    return Inspection("TensorRT-LLM engines", directory, facts, (Listing("ranks", rows),))


def _section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = document.get(name)
    return section if isinstance(section, Mapping) else {}


def _tensorrt_listings(engine: Mapping[str, Any]) -> tuple[Listing, ...]:
    profiles = [
        {"profile": index, "input": name, **{end: shapes[end] for end in ("min", "opt", "max")}}
        for index, profile in enumerate(engine["profiles"])
        for name, shapes in profile.items()
    ]
    return (
        Listing("bindings", [dict(binding) for binding in engine["bindings"]]),
        Listing("profiles", profiles),
        Listing("precisions", _precisions(engine["layers"])),
        Listing("layers", [dict(layer) for layer in engine["layers"]]),
    )


def _precisions(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter(
        (str(layer.get("type") or "not said"), _joined(layer.get("precision"))) for layer in layers
    )
    return [
        {"type": kind, "precision": precision, "layers": count}
        for (kind, precision), count in counts.most_common()
    ]


def _joined(value: Any) -> str:
    return ", ".join(sorted(set(map(str, value)))) if isinstance(value, list) else str(value or "not said")
