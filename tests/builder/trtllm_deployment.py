"""A tiny TensorRT-LLM deployment for tests: checkpoint, ONNX Runtime twin, assembled repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_factory import tiny_checkpoint

from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget
from enginesmith.triton.trtllm import assemble


@dataclass
class Context:
    """A step's context without a build."""

    root: Path
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True)
        self.scratch.mkdir()

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.notes.append(note)


SERVING: dict[str, Any] = {"max_batch_size": 4, "max_sequence_length": 96, "max_prompt_length": 64}


def step_params(
    target: Mapping[str, Any] | None = None, serving: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parameters that the steps of a deployment have in common."""
    made = TensorRtLlmTarget.model_validate({"runtime": "tensorrt_llm", **(target or {})})
    limits = Serving.model_validate({**SERVING, **(serving or {})})
    return {
        "target": made.model_dump(mode="json"),
        "serving": limits.model_dump(mode="json"),
        "model_name": "tiny-none-tensorrt-llm",
        "variant": "none",
        "scheme": "none",
    }


def write_converted(directory: Path, checkpoint: Path, **changes: Any) -> Path:
    """What of a converted checkpoint the repository is made from: its ``config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    document = {
        "dtype": "bfloat16",
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": None},
    }
    (directory / "config.json").write_text(json.dumps(document | changes))
    return directory


def assembled(root: Path, checkpoint: Path, params: Mapping[str, Any], **converted: Any) -> Path:
    """The artifact of the assemble step."""
    inputs = {
        "checkpoint": checkpoint,
        "converted": write_converted(root / "converted", checkpoint, **converted),
    }
    context = Context(root / "assemble", params, inputs)
    assemble.run(context)
    return context.out


def deployment(root: Path, **target: Any) -> tuple[Path, Path, dict[str, Any]]:
    """A tiny checkpoint, its assembled repository, and the parameters."""
    checkpoint = tiny_checkpoint(root / "checkpoint")
    params = step_params(target)
    return checkpoint, assembled(root, checkpoint, params), params


def write_engines(directory: Path, **build_config: Any) -> Path:
    """An engine directory of one rank, with TensorRT-LLM's ``config.json`` around bytes that are no engine."""
    directory.mkdir(parents=True)
    (directory / "rank0.engine").write_bytes(b"engine")
    built = {
        "max_batch_size": 4,
        "max_input_len": 64,
        "max_seq_len": 96,
        "max_num_tokens": 4
        * 96,  # trtllm-build keeps no more than the batch can hold, whatever was asked for.
        "max_beam_width": 1,
        "plugin_config": {"use_paged_context_fmha": True},
    }
    document = {
        "version": "1.2.1",
        "pretrained_config": {"mapping": {"tp_size": 1, "pp_size": 1}},
        "build_config": built | build_config,
    }
    (directory / "config.json").write_text(json.dumps(document))
    return directory
