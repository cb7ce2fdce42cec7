"""The targets of a graph spec: which runtime on which hardware executes the ONNX graph, and how Triton is told.

Owns the shape and the defaults of a target. What is legal with what is judged in ``enginesmith.graph_legality``; the
versions and GPUs that can be named are data in ``enginesmith.platforms``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from enginesmith.platforms import GpuName
from enginesmith.spec_part import TargetPart
from enginesmith.targets import TARGET_NAME

Provider = Literal["cpu", "cuda", "tensorrt"]
Backend = Literal["python", "onnxruntime", "tensorrt"]
RtxCapability = Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]


class GraphOnnxRuntimeTarget(TargetPart):
    """ONNX Runtime on a CPU or a GPU."""

    runtime: Literal["onnxruntime"]
    name: str = Field(default="onnxruntime", pattern=TARGET_NAME)
    provider: Provider = Field(
        default="cpu",
        description="The execution provider. cuda and tensorrt need a GPU where they serve, not where they are built.",
    )
    backend: Literal["python", "onnxruntime"] = Field(
        default="python",
        description="Triton's backend: its own onnxruntime, or the Python backend with the same inputs and outputs where a server lacks that.",
    )
    threads: int = Field(default=0, ge=0, description="Intra-op threads of each instance; 0 means all cores.")
    provider_options: dict[str, str] = Field(
        default={},
        description="Further options of the execution provider, by ONNX Runtime's names, e.g. trt_max_workspace_size.",
    )

    @model_validator(mode="after")
    def _options_have_a_provider(self) -> GraphOnnxRuntimeTarget:
        if self.provider_options and self.provider == "cpu":
            raise ValueError("provider_options belong to the providers cuda and tensorrt; cpu has none")
        return self


class _TensorRtCommon(TargetPart):
    """What both kinds of TensorRT have in common."""

    backend: Backend
    optimization_level: int | None = Field(
        default=None,
        ge=0,
        le=5,
        description="TensorRT's builder_optimization_level: 0 builds fastest, 5 searches longest. Default: TensorRT's.",
    )
    workspace_bytes: int | None = Field(
        default=None, ge=1 << 20, description="Scratch memory that a layer may use. Default: TensorRT's."
    )
    opt_batch_size: int | None = Field(
        default=None, ge=1, description="The batch size that kernels are chosen for. Default: max_batch_size."
    )
    opt_sequence_length: int | None = Field(
        default=None,
        ge=1,
        description="The sequence length that kernels are chosen for. Default: a quarter of the longest.",
    )


class TensorRtTarget(_TensorRtCommon):
    """A TensorRT plan (10.x or 11.x, strongly typed), built on the GPU that it is for."""

    runtime: Literal["tensorrt"]
    name: str = Field(default="tensorrt", pattern=TARGET_NAME)
    backend: Literal["tensorrt", "python"] = "tensorrt"
    toolchain: str = Field(
        default="26.07",
        description="The container tag (YY.MM) of tritonserver:YY.MM-py3 that serves it; it decides the version of TensorRT.",
    )
    gpu: GpuName = Field(default="h100", description="The GPU that the plan is built for and runs on.")


class TensorRtRtxTarget(_TensorRtCommon):
    """A TensorRT for RTX engine, built ahead of time on any machine, also one without a GPU."""

    runtime: Literal["tensorrt_rtx"]
    name: str = Field(default="tensorrt-rtx", pattern=TARGET_NAME)
    backend: Literal["python"] = "python"
    compute_capabilities: Annotated[tuple[RtxCapability, ...], Field(min_length=1)] = Field(
        default=("8.6", "8.9", "12.0"),
        description="The GPUs that one engine is built for. Hopper (9.0) is none of TensorRT for RTX.",
    )


GraphTarget = Annotated[
    GraphOnnxRuntimeTarget | TensorRtTarget | TensorRtRtxTarget, Field(discriminator="runtime")
]
