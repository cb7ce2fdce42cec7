"""The kinds of build steps: what decides the result of each, and where its code is.

A step is a function from parameters and input artifacts to a directory. Everything that can change the
result is known before it runs and goes into its key: the parameters, the keys of its inputs, the versions
of the distributions it uses and the source of enginesmith's own modules that it runs. The functions live
in modules that may import torch or onnxruntime, so they are named here as strings and imported only in the
worker process that runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

StepName = Literal[
    "fetch",
    "quantize",
    "reference",
    "lower",
    "measure",
    "verify",
    "package",
    "rehearse",
    "convert",
    "assemble",
    "rehearse_trtllm",
    "compile",
    "package_trtllm",
    "package_llmapi",
    "rehearse_llmapi",
    "sample",
    "export",
    "sensitivity",
    "quantize_graph",
    "lower_graph",
    "measure_graph",
    "verify_graph",
    "package_graph",
    "rehearse_graph",
    "assemble_tensorrt",
    "rehearse_tensorrt",
    "compile_tensorrt",
    "package_tensorrt",
]
PACKAGES: tuple[StepName, ...] = (
    "package",
    "package_trtllm",
    "package_llmapi",
    "package_graph",
    "package_tensorrt",
)
"""The kinds of steps whose artifact can be published."""
REHEARSALS: tuple[StepName, ...] = (
    "rehearse",
    "rehearse_trtllm",
    "rehearse_llmapi",
    "rehearse_graph",
    "rehearse_tensorrt",
)
"""The kinds of steps that run a repository in a real tritonserver."""


class StepContext(Protocol):
    """What a step function gets. It writes into ``out`` only; inputs are immutable artifacts."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The step's parameters: plain JSON values, part of its key."""

    @property
    def inputs(self) -> Mapping[str, Path]:
        """The artifact directory of each input, by role. Read only."""

    @property
    def out(self) -> Path:
        """An empty directory; it becomes the artifact when the step returns."""

    @property
    def scratch(self) -> Path:
        """An empty directory for intermediate files; removed afterwards."""

    def progress(self, fraction: float | None, note: str = "") -> None:
        """Report progress: ``fraction`` in [0, 1], or None when it is unknown."""


class StepFunction(Protocol):
    """Runs one step. The mapping it returns (plain JSON) is kept with the artifact as its facts."""

    def __call__(self, context: StepContext) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class StepKind:
    """One kind of step."""

    name: StepName
    function: str
    """``module:function``, a ``StepFunction``."""
    tools: tuple[str, ...]
    """Distributions whose installed version is part of the key."""
    code: tuple[str, ...]
    """Modules of enginesmith (files or packages) whose source is part of the key."""
    unkeyed_params: tuple[str, ...] = ()
    """Parameters that say where to look, not what to make; they stay out of the key."""


_TORCH = ("torch", "transformers", "numpy", "tokenizers", "safetensors")
_RUNTIME = "enginesmith.triton.models.llm_onnxruntime"
_REHEARSAL_TOOLS = ("nvidia-pytriton", "tritonclient", "onnxruntime", "numpy", "tokenizers")
_REHEARSAL_CODE = (
    "enginesmith.triton.rehearsal_report",
    "enginesmith.triton.server",
    "enginesmith.triton.server_log",
    "enginesmith.triton.shared_memory",
    "enginesmith.triton.response_cache",
    "enginesmith.triton.installation",
    "enginesmith.triton.ports",
    "enginesmith.triton.placement",
    "enginesmith.triton.config",
    _RUNTIME,
)
_BUILD_ARGUMENTS = "enginesmith.engines.tensorrt_llm.arguments"
_COMPILER_MODULES = ("compile", "arguments", "engine_directory", "toolchain")
_TRTLLM_MODELS = tuple(
    f"enginesmith.triton.models.trtllm_{part}" for part in ("preprocessing", "postprocessing", "bls", "text")
)

_GRAPH_MODELS = tuple(
    f"enginesmith.triton.models.graph_{part}" for part in ("onnxruntime", "tensorrt_rtx", "tokenizer")
)
_GRAPH_REPOSITORY = (
    "enginesmith.triton.graph",
    "enginesmith.triton.package_checks",
    "enginesmith.triton.config",
    "enginesmith.triton.placement",
    "enginesmith.graphs.signature",
)


def _graph_modules(*names: str) -> tuple[str, ...]:
    return tuple(f"enginesmith.graphs.{name}" for name in names)


_SAMPLING = (
    *_graph_modules(
        "samples", "tensor_samples", "onnx_source", "original", "compare", "naming", "planned", "signature"
    ),
    "enginesmith.corpora",
    "enginesmith.checkpoints.tensors",
)
_QUANTIZING = _graph_modules(
    "quantize", "calibrate", "smoothing", "qdq", "quantizable", "typed", "editing", "signature"
)
_QUANTIZING_TOOLS = ("onnx", "onnxruntime", "numpy", "nvidia-modelopt", "torch", "ml-dtypes")

_GRAPH_KINDS = (
    StepKind(
        "sample",
        "enginesmith.graphs.samples:run",
        ("numpy", "tokenizers", "datasets", "onnx"),
        _SAMPLING,
        unkeyed_params=("location",),
    ),
    StepKind(
        "export",
        "enginesmith.graphs.export:run",
        ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "safetensors"),
        (
            *_graph_modules("export", "hf_models", "pooling", "module_source", "torch_graph", "graph_file"),
            *_SAMPLING,
            "enginesmith.torch_models",
            "enginesmith.checkpoints.tokenizer",
        ),
        unkeyed_params=("location",),
    ),
    StepKind(
        "sensitivity",
        "enginesmith.graphs.sensitivity:run",
        _QUANTIZING_TOOLS,
        (*_graph_modules("sensitivity", "exclusion", "agreement"), *_QUANTIZING),
    ),
    StepKind("quantize_graph", "enginesmith.graphs.quantize:run", _QUANTIZING_TOOLS, _QUANTIZING),
    StepKind(
        "lower_graph",
        "enginesmith.graphs.lower:run",
        ("onnx", "onnxruntime", "numpy", "ml-dtypes"),
        _graph_modules("lower", "integer", "emulate", "editing", "signature"),
    ),
    StepKind(
        "measure_graph",
        "enginesmith.graphs.measure:run",
        ("onnxruntime", "numpy"),
        (
            "enginesmith.graphs.measure",
            "enginesmith.graphs.agreement",
            "enginesmith.graphs.signature",
            "enginesmith.verify.verdict",
            "enginesmith.triton.models.graph_onnxruntime",
        ),
    ),
    StepKind(
        "verify_graph",
        "enginesmith.graphs.gate:run",
        (),
        ("enginesmith.graphs.gate", "enginesmith.verify.verdict"),
    ),
    StepKind(
        "package_graph",
        "enginesmith.triton.graph.package:run",
        ("protobuf", "tritonclient", "numpy"),
        (*_GRAPH_REPOSITORY, *_GRAPH_MODELS),
    ),
    StepKind(
        "rehearse_graph",
        "enginesmith.triton.graph.rehearse:run",
        _REHEARSAL_TOOLS,
        (*_REHEARSAL_CODE, *_GRAPH_REPOSITORY, *_GRAPH_MODELS),
        unkeyed_params=("server",),
    ),
    StepKind(
        "assemble_tensorrt",
        "enginesmith.triton.graph.assemble:run",
        ("protobuf", "tritonclient", "numpy"),
        (*_GRAPH_REPOSITORY, *_GRAPH_MODELS),
    ),
    StepKind(
        "rehearse_tensorrt",
        "enginesmith.triton.graph.rehearse:run",
        _REHEARSAL_TOOLS,
        (*_REHEARSAL_CODE, *_GRAPH_REPOSITORY, *_GRAPH_MODELS),
        unkeyed_params=("server",),
    ),
    StepKind(
        "compile_tensorrt",
        "enginesmith.engines.tensorrt.compile:run",
        ("polygraphy", "numpy"),
        (
            "enginesmith.engines.tensorrt",
            "enginesmith.engines.tensorrt_llm.toolchain",
            "enginesmith.graphs.signature",
            "enginesmith.graphs.agreement",
            "enginesmith.platforms",
        ),
        unkeyed_params=("location",),
    ),
    StepKind(
        "package_tensorrt",
        "enginesmith.triton.graph.package_tensorrt:run",
        (),
        _GRAPH_REPOSITORY,
    ),
)

STEP_KINDS: Mapping[StepName, StepKind] = {
    kind.name: kind
    for kind in (
        *_GRAPH_KINDS,
        StepKind(
            "fetch",
            "enginesmith.checkpoints.fetch:run",
            ("transformers", "tokenizers", "gguf", "huggingface-hub", "numpy", "ml-dtypes"),
            ("enginesmith.checkpoints", "enginesmith.platforms"),
            unkeyed_params=("location",),
        ),
        StepKind(
            "quantize",
            "enginesmith.quantize:run",
            (*_TORCH, "nvidia-modelopt", "accelerate", "datasets"),
            (
                "enginesmith.quantize",
                "enginesmith.corpora",
                "enginesmith.schemes",
                "enginesmith.torch_models",
                "enginesmith.heap",
                "enginesmith.checkpoints.tensors",
                "enginesmith.checkpoints.validate",
                "enginesmith.platforms",
            ),
            unkeyed_params=("location",),
        ),
        StepKind(
            "reference",
            "enginesmith.verify.reference:run",
            (*_TORCH, "nvidia-modelopt", "datasets"),
            (
                "enginesmith.verify.reference",
                "enginesmith.verify.scores",
                "enginesmith.corpora",
                "enginesmith.schemes",
                "enginesmith.torch_models",
                "enginesmith.heap",
                "enginesmith.checkpoints.tensors",
            ),
            unkeyed_params=("location",),
        ),
        StepKind(
            "lower",
            "enginesmith.engines.onnxruntime.lower:run",
            ("onnx", "onnxruntime", "numpy", "ml-dtypes", "safetensors"),
            (
                "enginesmith.engines.onnxruntime",
                "enginesmith.checkpoints.tensors",
                "enginesmith.checkpoints.validate",
                "enginesmith.platforms",
            ),
        ),
        StepKind(
            "measure",
            "enginesmith.verify.measure:run",
            ("onnxruntime", "numpy", "tokenizers"),
            (
                "enginesmith.verify",
                "enginesmith.corpora",
                "enginesmith.schemes",
                "enginesmith.torch_models",
                "enginesmith.heap",
                "enginesmith.checkpoints.tensors",
                _RUNTIME,
            ),
        ),
        StepKind(
            "verify",
            "enginesmith.verify.gate:run",
            (),
            ("enginesmith.verify.gate", "enginesmith.verify.verdict"),
        ),
        StepKind(
            "package",
            "enginesmith.triton.package:run",
            ("protobuf", "tritonclient"),
            (
                "enginesmith.triton.package",
                "enginesmith.triton.package_checks",
                "enginesmith.kv_memory",
                "enginesmith.triton.config",
                "enginesmith.triton.placement",
                _RUNTIME,
            ),
        ),
        StepKind(
            "rehearse",
            "enginesmith.triton.rehearse:run",
            _REHEARSAL_TOOLS,
            (
                *(
                    f"enginesmith.triton.{name}"
                    for name in ("rehearse", "llm_asking", "llm_checks", "llm_subject")
                ),
                *_REHEARSAL_CODE,
            ),
            unkeyed_params=("server",),
        ),
        StepKind(
            "convert",
            "enginesmith.engines.tensorrt_llm.convert:run",
            ("numpy", "ml-dtypes"),
            ("enginesmith.engines.tensorrt_llm", "enginesmith.checkpoints", "enginesmith.platforms"),
            unkeyed_params=("workers",),
        ),
        StepKind(
            "assemble",
            "enginesmith.triton.trtllm.assemble:run",
            ("protobuf", "tritonclient"),
            (
                "enginesmith.triton.trtllm",
                "enginesmith.triton.config",
                "enginesmith.triton.placement",
                "enginesmith.triton.launch",
                _BUILD_ARGUMENTS,
                *_TRTLLM_MODELS,
            ),
        ),
        StepKind(
            "rehearse_trtllm",
            "enginesmith.triton.trtllm.rehearse:run",
            _REHEARSAL_TOOLS,
            (
                *_REHEARSAL_CODE,
                "enginesmith.triton.trtllm",
                "enginesmith.triton.launch",
                "enginesmith.triton.models.trtllm_twin",
                _BUILD_ARGUMENTS,
            ),
            unkeyed_params=("server",),
        ),
        StepKind(
            "compile",
            "enginesmith.engines.tensorrt_llm.compile:run",
            (),
            (
                *(f"enginesmith.engines.tensorrt_llm.{name}" for name in _COMPILER_MODULES),
                "enginesmith.checkpoints.tensors",
                "enginesmith.platforms",
            ),
            unkeyed_params=("location",),
        ),
        StepKind(
            "package_trtllm",
            "enginesmith.triton.trtllm.package:run",
            (),
            (
                "enginesmith.triton.trtllm",
                "enginesmith.triton.config",
                "enginesmith.triton.placement",
                "enginesmith.triton.launch",
                _BUILD_ARGUMENTS,
            ),
        ),
        StepKind(
            "package_llmapi",
            "enginesmith.triton.llmapi.package:run",
            ("protobuf", "tritonclient", "pyyaml"),
            (
                "enginesmith.triton.llmapi",
                "enginesmith.triton.package_checks",
                "enginesmith.triton.config",
                "enginesmith.triton.placement",
                "enginesmith.triton.launch",
                "enginesmith.triton.models.llmapi",
            ),
        ),
        StepKind(
            "rehearse_llmapi",
            "enginesmith.triton.llmapi.rehearse:run",
            _REHEARSAL_TOOLS,
            (*_REHEARSAL_CODE, "enginesmith.triton.llmapi", "enginesmith.triton.models.llmapi_twin"),
            unkeyed_params=("server",),
        ),
    )
}
