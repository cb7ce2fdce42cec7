"""What the tests of the ``trtllm-build`` driver share: targets, tiny converted checkpoints, a step's context."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trtllm_build_standin

from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget

SERVING = Serving(max_batch_size=8, max_sequence_length=512, max_prompt_length=256)
H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 590.44.01"
H200 = "NVIDIA H200, 9.0, 143771, 590.44.01"
A100 = "NVIDIA A100-SXM4-80GB, 8.0, 81920, 590.44.01"


@dataclass
class Context:
    """A step's context without a build."""

    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path
    notes: list[tuple[float | None, str]] = field(default_factory=list)

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.notes.append((fraction, note))


def make_target(**keys: Any) -> TensorRtLlmTarget:
    return TensorRtLlmTarget.model_validate({"runtime": "tensorrt_llm", **keys})


def write_checkpoint(
    directory: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    quant_algo: str | None = None,
    kv_cache_quant_algo: str | None = None,
    architecture: str = "LlamaForCausalLM",
) -> Path:
    """A converted checkpoint as far as ``trtllm-build``'s stand-in reads it: config.json, and weights of some size."""
    directory.mkdir(parents=True)
    config = {
        "architecture": architecture,
        "dtype": "bfloat16",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "mapping": {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline},
        "quantization": {"quant_algo": quant_algo, "kv_cache_quant_algo": kv_cache_quant_algo},
    }
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(tensor * pipeline):
        (directory / f"rank{rank}.safetensors").write_bytes(bytes(4096))
    return directory


def write_hf(directory: Path) -> Path:
    """The directory that has the tokenizer."""
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text("{}")
    return directory


def make_context(tmp_path: Path, target: TensorRtLlmTarget, converted: Path, **location: Any) -> Context:
    """The compile step's context, with the parameters that ``plan`` gives it."""
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir(exist_ok=True)
    params = {
        "target": target.model_dump(mode="json"),
        "serving": SERVING.model_dump(mode="json"),
        "version": "1.2.1",
        "compute_capability": 90,
        "location": {"engine_dir": None, "timing_cache": None, "workers": target.workers, **location},
    }
    checkpoint = tmp_path / "hf"
    inputs = {
        "converted": converted,
        "checkpoint": checkpoint if checkpoint.is_dir() else write_hf(checkpoint),
    }
    return Context(params, inputs, tmp_path / "out", tmp_path / "scratch")


def run_standin(arguments: tuple[str, ...] | list[str]) -> subprocess.CompletedProcess[str]:
    """The stand-in with these arguments, as a program."""
    command = [sys.executable, trtllm_build_standin.__file__, *arguments]
    place = Path(arguments[list(arguments).index("--output_dir") + 1]).parent
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
