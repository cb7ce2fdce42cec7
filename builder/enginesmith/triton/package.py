"""The ``package`` step: a verified engine becomes a directory that Triton serves.

Reads the engine, its verdict and the checkpoint's tokenizer; writes ``<model>/config.pbtxt`` and one complete
version directory. Big files are hard links to the engine's artifact. What has no passed verdict is not packaged.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.errors import SourceError, StoreError
from enginesmith.kv_memory import kv_cache_bytes, require_kv_memory, shape_of_engine
from enginesmith.spec import Serving
from enginesmith.spec_part import DynamicBatching, QueuePolicy
from enginesmith.steps import StepContext
from enginesmith.targets import KvCacheMemory
from enginesmith.triton.config import LLM_INPUTS, LLM_OUTPUTS, config_text, model_config, parse_config
from enginesmith.triton.package_checks import require_passed, require_positions
from enginesmith.triton.placement import place_file, tree_files

ENGINE_FILES = ("model.onnx", "weights.bin", "engine.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_REQUIRED_TOKENIZER_FILES = ("tokenizer.json",)


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the package. Facts: ``model_name``, ``config_bytes``, ``package_bytes``, ``kv_cache_bytes``.

    The last is the key/value memory of each instance; it is taken from the system as it is first written.

    Raises:
        GateError: the engine has no passed verdict.
        SpecError: the serving limits do not fit the model, or its key/value memory the spec.
        SourceError: the checkpoint has no tokenizer.
    """
    params = context.params
    serving = Serving.model_validate(params["serving"])
    require_passed(context.inputs["verdict"])
    require_positions(context.inputs["checkpoint"], serving)
    kv_cache = KvCacheMemory.model_validate(params["kv_cache"])
    needed_bytes = kv_cache_bytes(kv_cache, serving, shape_of_engine(context.inputs["engine"]))
    require_kv_memory(kv_cache, serving, needed_bytes)

    model = context.out / str(params["model_name"])
    version = model / "1"
    version.mkdir(parents=True)
    _place(ENGINE_FILES, context.inputs["engine"], version, required=ENGINE_FILES)
    _place(TOKENIZER_FILES, context.inputs["checkpoint"], version, required=_REQUIRED_TOKENIZER_FILES)
    _write_runtime(version)
    _write_serving(version / "serving.json", params, serving)
    config = _write_config(model / "config.pbtxt", params, serving)
    return {
        "model_name": params["model_name"],
        "config_bytes": config.stat().st_size,
        "package_bytes": sum(file.stat().st_size for file in tree_files(context.out)),
        "kv_cache_bytes": needed_bytes,
    }


def _place(names: tuple[str, ...], source: Path, target: Path, *, required: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            place_file(source / name, target / name)
        elif name in required:
            kind = StoreError if name in ENGINE_FILES else SourceError
            raise kind(
                f"{name} is missing in {source}",
                hint="build the step that makes it again, or check the checkpoint",
            )


def _write_runtime(version: Path) -> None:
    """The code that Triton's Python backend runs: the files of one folder, which import nothing of enginesmith."""
    with importlib.resources.as_file(
        importlib.resources.files("enginesmith.triton.models") / "llm_onnxruntime"
    ) as folder:
        for file in tree_files(folder):
            if file.name != "__init__.py":
                (version / file.name).write_bytes(file.read_bytes())


def _write_serving(path: Path, params: Mapping[str, Any], serving: Serving) -> None:
    queue = serving.dynamic_batching.queue_policy if serving.dynamic_batching else QueuePolicy()
    limits = {
        "max_sequence_length": serving.max_sequence_length,
        "max_prompt_length": serving.prompt_limit,
        "default_max_tokens": serving.default_max_tokens,
        "max_batch_size": serving.max_batch_size,
        "threads": params["threads"],
        "max_queue_size": queue.max_queue_size,
        "queue_timeout_us": queue.default_timeout_us,
        "prefill_chunk_tokens": params["prefill_chunk_tokens"],
        "batch_invariant": params["batch_invariant"],
        "kv_cache": {
            name: params["kv_cache"][name] for name in ("reuse", "reuse_tokens", "tokens_per_block")
        },
    }
    path.write_text(json.dumps(limits, indent=2) + "\n", encoding="utf-8")


def _write_config(path: Path, params: Mapping[str, Any], serving: Serving) -> Path:
    """The model batches in flight and its ``execute`` returns at once.

    So Triton hands over what has come without waiting for more, and its queue is always empty: what limits a queue
    is in ``serving.json``, for the model.
    """
    config = model_config(
        str(params["model_name"]),
        inputs=LLM_INPUTS,
        outputs=LLM_OUTPUTS,
        max_batch_size=serving.max_batch_size,
        dynamic_batching=DynamicBatching(max_queue_delay_us=0),
        instances=serving.instances,
        parameters={"scheme": str(params["scheme"]), "variant": str(params["variant"])},
        decoupled=True,
    )
    path.write_text(config_text(config), encoding="utf-8")
    assert parse_config(path.read_text(encoding="utf-8"), origin=str(path)) == config
    return path
