"""A served LLM for onnxruntime-genai: its model builder's graph, and the package around it.

Not a target of the spec: what is made here has no verdict and no rehearsal, and is for measuring (benchmarks/gpu.py). A
graph for CUDA has PagedAttention and can be made on a machine without a GPU, but only run on one with it.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enginesmith.errors import SourceError, ToolchainError
from enginesmith.spec_part import DynamicBatching
from enginesmith.triton.config import LLM_INPUTS, LLM_OUTPUTS, config_text, model_config
from enginesmith.triton.package import TOKENIZER_FILES
from enginesmith.triton.placement import place_file

Precision = Literal["fp32", "fp16", "int4"]
BLOCK_TOKENS = 256
"""Tokens in one block of paged keys and values: the builder's default, which CUDA's kernels are fastest with."""
_LOG_TAIL_LINES = 15
_RUNTIMES = ("llm_onnxruntime", "llm_genai")
_GENAI_FILES = ("genai_config.json", "model.onnx", "model.onnx.data")


@dataclass(frozen=True)
class GenaiLimits:
    """How much is served at once."""

    slots: int = 16
    capacity: int = 1024
    """Tokens of one sequence, prompt and answer together."""
    reuse_tokens: int = 4096
    """Tokens of finished prompts that paged memory has room for beside full slots."""
    max_queue_size: int = 256
    default_max_tokens: int = 128

    @property
    def blocks(self) -> int:
        """Blocks of ``BLOCK_TOKENS`` that all of this needs."""
        return self.slots * -(-self.capacity // BLOCK_TOKENS) + -(-self.reuse_tokens // BLOCK_TOKENS)


def export_model(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision,
    provider: Literal["cuda", "cpu"],
    limits: GenaiLimits = GenaiLimits(),
) -> None:
    """Fill ``out`` with the model of ``checkpoint`` (a directory in Hugging Face format) for onnxruntime-genai.

    For CUDA the graph has PagedAttention and its configuration a pool of as many blocks as ``limits`` need, so that
    memory is bounded and no sequence that was let in runs out of it.

    Raises:
        ToolchainError: onnxruntime-genai's model builder is missing, fails, or gives another graph than asked for.
        SourceError: ``checkpoint`` is no checkpoint.
    """
    if not (checkpoint / "config.json").is_file():
        raise SourceError(f"{checkpoint}: no config.json", hint="give a directory in Hugging Face format")
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["--input", str(checkpoint), "--output", str(out), "--cache_dir", str(out / "cache")]
    command += ["--precision", precision, "--execution_provider", provider]
    if provider == "cuda":
        paged = {
            "max_batch_size": limits.slots,
            "num_blocks": limits.blocks,
            "paged_block_size": BLOCK_TOKENS,
        }
        command += ["--extra_options", "use_paged_attention=1", *(f"{k}={v}" for k, v in paged.items())]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-_LOG_TAIL_LINES:])
        raise ToolchainError(
            f"onnxruntime-genai's model builder ended with status {done.returncode}:\n{tail}",
            hint="pip install 'enginesmith[build]' onnxruntime-genai",
        )
    _require_graph(out, paged=provider == "cuda")


def _require_graph(out: Path, *, paged: bool) -> None:
    """What was built is what was asked for; the builder chooses the kind of attention by itself."""
    import onnx

    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    seen = {node.op_type for node in graph.node} & {"PagedAttention", "GroupQueryAttention"}
    wanted = "PagedAttention" if paged else "GroupQueryAttention"
    if seen != {wanted}:
        raise ToolchainError(
            f"onnxruntime-genai's model builder made a graph with {' and '.join(sorted(seen)) or 'no known attention'}; "
            f"wanted: {wanted}",
            hint="models whose attention it cannot page are not served this way",
        )
    batching = json.loads((out / "genai_config.json").read_text(encoding="utf-8")).get("engine", {})
    if paged and "dynamic_batching" not in batching:
        raise ToolchainError(
            "genai_config.json has no engine.dynamic_batching, so requests would be batched statically",
            hint="use onnxruntime-genai 0.18",
        )


def write_package(
    repository: Path,
    name: str,
    *,
    model: Path,
    checkpoint: Path,
    limits: GenaiLimits = GenaiLimits(),
) -> Path:
    """Write the Triton model ``name`` over what ``export_model`` made; returns its directory.

    Raises:
        SourceError: ``model`` or ``checkpoint`` lacks a file.
    """
    version = repository / name / "1"
    version.mkdir(parents=True)
    for file in _GENAI_FILES:
        _place_required(model / file, version)
    for file in TOKENIZER_FILES:
        if (checkpoint / file).is_file() or file == "tokenizer.json":
            _place_required(checkpoint / file, version)
    for runtime in _RUNTIMES:
        folder = importlib.resources.files("enginesmith.triton.models") / runtime
        for part in folder.iterdir():
            if part.name.endswith(".py") and part.name != "__init__.py":
                (version / part.name).write_bytes(part.read_bytes())
    serving = json.dumps(_serving(limits), indent=2)
    (version / "serving.json").write_text(serving + "\n", encoding="utf-8")
    config = model_config(
        name,
        inputs=LLM_INPUTS,
        outputs=LLM_OUTPUTS,
        max_batch_size=limits.slots,
        dynamic_batching=DynamicBatching(max_queue_delay_us=0),
        parameters={"engine": "onnxruntime-genai"},
        decoupled=True,
    )
    (version.parent / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
    return version.parent


def _serving(limits: GenaiLimits) -> Mapping[str, Any]:
    return {
        "engine": "genai",
        "max_sequence_length": limits.capacity,
        "max_prompt_length": limits.capacity - 1,
        "default_max_tokens": limits.default_max_tokens,
        "max_batch_size": limits.slots,
        "threads": 0,
        "max_queue_size": limits.max_queue_size,
        "queue_timeout_us": 0,
        "kv_cache": {
            "reuse": True,
            "reuse_tokens": limits.reuse_tokens,
            "tokens_per_block": BLOCK_TOKENS,
        },
    }


def _place_required(file: Path, directory: Path) -> None:
    if not file.is_file():
        raise SourceError(f"{file.name} is missing in {file.parent}", hint="export the model again")
    place_file(file, directory / file.name)
