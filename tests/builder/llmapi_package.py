"""A package for the LLM API made from a tiny checkpoint, without a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enginesmith.spec import Serving
from enginesmith.targets import LlmApiTarget


@dataclass
class Context:
    """A step's context without a build."""

    root: Path
    params: Mapping[str, Any]
    inputs: dict[str, Path] = field(default_factory=dict)

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
        pass


def params(
    target: Mapping[str, Any] | None = None, serving: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parameters of the steps; ``target`` and ``serving`` are added to small defaults."""
    made = LlmApiTarget.model_validate({"runtime": "tensorrt_llm_llmapi", **(target or {})})
    small = {"max_batch_size": 4, "max_sequence_length": 96, "default_max_tokens": 8}
    return {
        "target": made.model_dump(mode="json", exclude={"variants", "nccl"}),
        "serving": Serving.model_validate({**small, **(serving or {})}).model_dump(mode="json"),
        "model_name": "tiny-bf16-llmapi",
        "variant": "bf16",
        "scheme": "none",
    }
