"""Facts about hardware and toolchains, as data: architectures, GPUs, container images and what each runtime can execute.

Nothing here decides; ``enginesmith.legality`` does, from these tables. A cell that is not known is None and is shown as
such; none is inferred from its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from enginesmith.schemes import GraphSchemeName, SchemeName

GpuName = Literal[
    "a100-40g",
    "a100",
    "a10",
    "a30",
    "a40",
    "l4",
    "l40",
    "l40s",
    "rtx-4090",
    "h100",
    "h200",
    "gh200",
    "b200",
]
KvCacheName = Literal["none", "fp8", "int8"]
GpuRuntime = Literal["tensorrt_llm", "tensorrt_llm_llmapi"]
GraphGpuRuntime = Literal["tensorrt", "tensorrt_rtx"]


@dataclass(frozen=True)
class Gpu:
    """One GPU model."""

    name: GpuName
    compute_capability: int
    """Major * 10 + minor: 90 is SM90."""
    memory_gib: int
    """The size that it is sold by; a little more than what the driver reports."""


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 80, 40),
        Gpu("a100", 80, 80),
        Gpu("a10", 86, 24),
        Gpu("a30", 80, 24),
        Gpu("a40", 86, 48),
        Gpu("l4", 89, 24),
        Gpu("l40", 89, 48),
        Gpu("l40s", 89, 48),
        Gpu("rtx-4090", 89, 24),
        Gpu("h100", 90, 80),
        Gpu("h200", 90, 141),
        Gpu("gh200", 90, 96),
        Gpu("b200", 100, 180),
    )
}

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Supported architectures and the ``model_type`` that ``config.json`` gives for each."""

MOE_ARCHITECTURES = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
"""Those with a mixture of experts; their checkpoints store the experts one by one."""

_ENGINE_ARCHITECTURES = tuple(ARCHITECTURES)
RUNTIME_ARCHITECTURES: Mapping[GpuRuntime, tuple[str, ...]] = {
    "tensorrt_llm": _ENGINE_ARCHITECTURES,
    "tensorrt_llm_llmapi": (*_ENGINE_ARCHITECTURES, "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
}
"""What each runtime can be given. DeepSeek-V2, V3 and R1 never had engines here or (V3, R1) in TensorRT-LLM."""


@dataclass(frozen=True)
class Toolchain:
    """What one ``tritonserver:YY.MM-trtllm-python-py3`` image holds."""

    tag: str
    tensorrt_llm: str
    tensorrt: str
    cuda: str
    driver: str
    """The driver that NVIDIA lists beside it. Data-center GPUs may have an older one; see CUDA forward compatibility."""
    python: str
    triton: str | None = None
    """tritonserver's own version, where it is confirmed."""

    @property
    def image(self) -> str:
        """The name under which the image is pulled."""
        return f"nvcr.io/nvidia/tritonserver:{self.tag}-trtllm-python-py3"

    @property
    def has_engines(self) -> bool:
        """Whether ``trtllm-build`` and the engine runtime are in it, with the flags that are written here."""
        return _ENGINES_SINCE <= Version(self.tensorrt_llm) < _ENGINES_UNTIL

    @property
    def has_llmapi(self) -> bool:
        """Whether its LLM API takes ModelOpt's unified checkpoints and the keys that are written to ``model.yaml``."""
        return Version(self.tensorrt_llm) >= _LLMAPI_SINCE


_ENGINES_SINCE = Version("1.0")
"""The first line with the flag table of ``engines/tensorrt_llm/arguments.py`` (auto_parallel gone, defaults changed)."""
_ENGINES_UNTIL = Version("1.3.dev0")
"""1.3 removed trtllm-build, the TensorRT models and the Triton backend (between rc20 and rc23)."""
_LLMAPI_SINCE = Version("1.2.0")
"""ModelOpt's documentation promises its unified checkpoints to TensorRT-LLM's PyTorch backend from 1.2.0 on."""

# Source: the table "trtllm-python-py3" of docs/introduction/compatibility.md in triton-inference-server/server, which ends
# with 26.07; later tags are not in it. Triton's own version: its 26.04 release change, the archive of its documentation,
# and public guides for 26.07.
TOOLCHAINS: Mapping[str, Toolchain] = {
    toolchain.tag: toolchain
    for toolchain in (
        Toolchain("26.07", "1.2.1", "10.14.1.48", "13.1.0.036", "590.44.01", "3.12.3", "2.71.0"),
        Toolchain("26.06", "1.2.1", "10.14.1.48", "13.1.0.036", "590.44.01", "3.12.3"),
        Toolchain("26.05", "1.2.1", "10.14.1.48", "13.1.0.036", "590.44.01", "3.12.3"),
        Toolchain("26.04", "1.2.1", "10.14.1.48", "13.1.0.036", "590.44.01", "3.12.3", "2.68.0"),
        Toolchain("26.03", "1.2.0", "10.14.1.48", "13.1.0.036", "590.44.01", "3.12.3"),
        Toolchain("26.02", "1.1.0", "10.13.3.9", "13.0.2.006", "580.95.05", "3.12.3"),
        Toolchain("26.01", "1.1.0", "10.13.3.9", "13.0.2.006", "580.95.05", "3.12.3"),
        Toolchain("25.12", "1.1.0", "10.13.3.9", "13.0.2.006", "580.95.05", "3.12.3"),
        Toolchain("25.11", "1.0.3.2510", "10.13.3.9", "13.0.2.006", "580.95.05", "3.12.3"),
        Toolchain("25.10", "1.0.0", "10.11.0.33", "12.9.1.010", "575.57.08", "3.12.3"),
        Toolchain("25.09", "1.0.0", "10.11.0.33", "12.9.1.010", "575.57.08", "3.12.3"),
        Toolchain("25.08", "0.21.0", "10.11.0.33", "12.9.0.043", "575.51.03", "3.12.3"),
        Toolchain("25.07", "0.20.0", "10.10.0.31", "12.9.0.036", "575.51.03", "3.12.3"),
        Toolchain("25.06", "0.20.0", "10.10.0.31", "12.9.0.036", "575.51.03", "3.12.3"),
        Toolchain("25.05", "0.19.0", "10.9.0.34", "12.8.1.012", "570.124.06", "3.12.3"),
        Toolchain("25.04", "0.18.2", "10.9.0.34", "12.8.1.012", "570.124.06", "3.12.3"),
        Toolchain("25.03", "0.18.0", "10.9.0.34", "12.8.1.012", "570.124.06", "3.12.3"),
        Toolchain("25.02", "0.17.0.post1", "10.8.0.43", "12.8.0.038", "570.86.10", "3.12.3"),
        Toolchain("25.01", "0.17.0", "10.8.0.43", "12.8.0.038", "570.86.10", "3.12.3", "2.54.0"),
    )
}
"""The images that can be named, newest first."""


@dataclass(frozen=True)
class Execution:
    """What one runtime executes on GPUs of some compute capabilities."""

    runtime: GpuRuntime
    capabilities: tuple[int, ...]
    schemes: tuple[SchemeName, ...]
    kv_caches: tuple[KvCacheName, ...]
    block_fp8: bool = False
    """FP8 weights with one scale per 128 x 128 block, as DeepSeek-V3 and R1 come."""


# Engines: `build` in TensorRT-LLM's builder.py (INT8, INT4 and SmoothQuant are refused from SM100 to SM119, FP8 needs SM89)
# and ModelOpt's support matrix. LLM API: the hardware table of TensorRT-LLM's docs/source/features/quantization.md, cut
# to what ModelOpt promises for unified checkpoints, which has no INT8 in it.
EXECUTIONS: tuple[Execution, ...] = (
    Execution("tensorrt_llm", (80, 86), ("none", "int8_sq", "int8_wo", "int4_awq"), ("none", "int8")),
    Execution(
        "tensorrt_llm",
        (89, 90),
        ("none", "int8_sq", "int8_wo", "int4_awq", "w4a8_awq", "fp8"),
        ("none", "int8", "fp8"),
    ),
    Execution("tensorrt_llm", (100,), ("none", "fp8"), ("none", "fp8")),
    Execution("tensorrt_llm_llmapi", (80, 86), ("none", "int4_awq"), ("none",)),
    Execution("tensorrt_llm_llmapi", (89,), ("none", "int4_awq", "w4a8_awq", "fp8"), ("none", "fp8")),
    Execution(
        "tensorrt_llm_llmapi", (90,), ("none", "int4_awq", "w4a8_awq", "fp8"), ("none", "fp8"), block_fp8=True
    ),
    Execution("tensorrt_llm_llmapi", (100,), ("none", "fp8"), ("none", "fp8"), block_fp8=True),
)


def execution_on(runtime: GpuRuntime, gpu: Gpu) -> Execution:
    """What ``runtime`` executes on ``gpu``."""
    return next(
        row for row in EXECUTIONS if row.runtime == runtime and gpu.compute_capability in row.capabilities
    )


def toolchain_with(tensorrt_llm: str) -> Toolchain | None:
    """The newest toolchain with this version of TensorRT-LLM, or None when no known one has it."""
    return next((row for row in TOOLCHAINS.values() if row.tensorrt_llm == tensorrt_llm), None)


@dataclass(frozen=True)
class TritonImage:
    """What one ``tritonserver:YY.MM-py3`` image holds. Not what the image for TensorRT-LLM of the same month holds."""

    tag: str
    tensorrt: str | None
    """Plans are read by exactly this version. None: not published; then whatever TensorRT builds is taken for it."""
    cuda: str | None
    driver: str | None
    """The branch that NVIDIA names for GPUs other than data-center ones."""
    python: str | None
    onnxruntime: str | None

    @property
    def image(self) -> str:
        """The name under which the image is pulled."""
        return f"nvcr.io/nvidia/tritonserver:{self.tag}-py3"


# Sources. CUDA and driver: the page of each month in NVIDIA's release notes of Triton Inference Server, where it could be
# read; from 26.06 on they name no driver. ONNX Runtime: the table "ONNX Runtime Versions" of docs/introduction/compatibility.md in
# triton-inference-server/server, which ends with 26.08. TensorRT and Python of 26.07: TRT_VERSION of that month's NVIDIA base
# image and two public reports of running this one; the matrix that NVIDIA refers to for the others could not be read.
TRITON_IMAGES: Mapping[str, TritonImage] = {
    image.tag: image
    for image in (
        TritonImage("26.10", None, "13.4.3.001", None, None, None),
        TritonImage("26.09", None, "13.4.1", None, None, None),
        TritonImage("26.08", None, "13.4.1", None, None, "1.28.0"),
        TritonImage("26.07", "11.1.0.106", "13.3.1", None, "3.12", "1.27.0"),
        TritonImage("26.06", None, "13.3.0", None, None, "1.24.4"),
        TritonImage("26.05", None, None, None, None, "1.24.4"),
        TritonImage("26.04", None, "13.2.1", "575", None, "1.24.4"),
        TritonImage("26.03", None, None, None, None, "1.24.2"),
        TritonImage("26.02", None, "13.1.1", "575", None, "1.24.1"),
        TritonImage("26.01", None, None, None, None, "1.23.2"),
        TritonImage("25.12", None, None, None, None, "1.23.2"),
        TritonImage("25.11", None, None, None, None, "1.23.2"),
        TritonImage("25.10", None, "13.0.2.006", "575", None, "1.23.1"),
        TritonImage("25.09", None, None, None, None, "1.23.0"),
        TritonImage("25.08", None, "13.0.0.044", "575", None, "1.23.0"),
        TritonImage("25.07", None, None, None, None, "1.22.0"),
        TritonImage("25.06", None, "12.9.1.010", "575", None, "1.22.0"),
        TritonImage("25.05", None, None, None, None, "1.22.0"),
        TritonImage("25.04", None, "12.9.0", "575", None, "1.21.0"),
        TritonImage("25.03", None, "12.8.1.012", "560", None, "1.21.0"),
        TritonImage("25.02", None, "12.8.0.38", "560", None, "1.20.1"),
        TritonImage("25.01", None, None, None, None, "1.20.1"),
    )
}
"""The images that can be named, newest first."""


@dataclass(frozen=True)
class GraphExecution:
    """What one builder of TensorRT engines takes for GPUs of some compute capabilities."""

    runtime: GraphGpuRuntime
    capabilities: tuple[int, ...]
    schemes: tuple[GraphSchemeName, ...]


# TensorRT: the table of precisions per compute capability in its support matrix (FP8 needs SM89). TensorRT for RTX: measured
# with 1.7.1, whose builder refuses FP8 below SM89 and everything but FP16 for SM75 ("FP32 GEMM is not supported").
GRAPH_EXECUTIONS: tuple[GraphExecution, ...] = (
    GraphExecution("tensorrt", (80, 86), ("none", "fp16", "bf16", "int8")),
    GraphExecution("tensorrt", (89, 90, 100), ("none", "fp16", "bf16", "int8", "fp8")),
    GraphExecution("tensorrt_rtx", (75,), ("fp16",)),
    GraphExecution("tensorrt_rtx", (80, 86), ("none", "fp16", "bf16", "int8")),
    GraphExecution("tensorrt_rtx", (89, 120, 121), ("none", "fp16", "bf16", "int8", "fp8")),
)


def graph_schemes_on(runtime: GraphGpuRuntime, capability: int) -> tuple[GraphSchemeName, ...]:
    """The schemes of graphs that ``runtime`` takes for GPUs of this compute capability; none where it builds for no such GPU."""
    rows = (row for row in GRAPH_EXECUTIONS if row.runtime == runtime and capability in row.capabilities)
    return next((row.schemes for row in rows), ())
