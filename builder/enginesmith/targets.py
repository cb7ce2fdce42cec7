"""The targets of a spec: which runtime on which hardware executes the variants, and how it is laid out there.

Owns the shape and the defaults of a target. What is legal with what is judged in ``enginesmith.legality``; the
versions and GPUs that can be named are data in ``enginesmith.platforms``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from enginesmith.platforms import GpuName
from enginesmith.spec_part import Part, TargetPart

RuntimeName = Literal["onnxruntime", "tensorrt_llm", "tensorrt_llm_llmapi"]
PluginDtype = Literal["auto", "float16", "float32", "bfloat16", "int32", "disable"]

TARGET_NAME = r"^[a-z0-9][a-z0-9_-]{0,30}$"
_MODEL_PREFIX = r"^([a-z0-9_.-]|\{name\}|\{variant\}|\{target\}){0,60}$"


class KvCacheMemory(Part):
    """The key/value memory of each instance of an ONNX Runtime engine: a slot for every running row, and prefixes to reuse."""

    reuse: bool = Field(default=True, description="Keep the blocks of prompts, for prompts that begin alike.")
    reuse_tokens: int = Field(
        default=4096, ge=16, description="Tokens that are kept for reuse, beside those of running requests."
    )
    tokens_per_block: Literal[16, 32, 64, 128] = Field(
        default=32, description="Prompts share whole blocks of so many tokens."
    )
    max_bytes: int | None = Field(
        default=None, ge=1, description="A build that needs more key/value memory per instance is refused."
    )

    @model_validator(mode="after")
    def _a_block_fits(self) -> KvCacheMemory:
        if self.reuse and self.reuse_tokens < self.tokens_per_block:
            raise ValueError(
                f"reuse_tokens {self.reuse_tokens} hold no block of tokens_per_block {self.tokens_per_block}; "
                "raise it, or set reuse: false"
            )
        return self


class OnnxRuntimeTarget(TargetPart):
    """ONNX Runtime engines, served by Triton's Python backend."""

    runtime: Literal["onnxruntime"]
    name: str = Field(default="onnxruntime", pattern=TARGET_NAME)
    device: Literal["cpu"] = "cpu"
    mode: Literal["fast", "exact"] = Field(
        default="fast",
        description="fast: INT8 activations inside the weight-only kernels and an 8-bit output head. exact: FP32 activations.",
    )
    threads: int = Field(default=0, ge=0, description="Intra-op threads of each instance; 0 means all cores.")
    kv_cache: KvCacheMemory = KvCacheMemory()
    prefill_chunk_tokens: int = Field(
        default=64,
        ge=16,
        description="Prompt tokens computed at most between two tokens of running answers: long prompts do not stall them.",
    )
    batch_invariant: bool = Field(
        default=True,
        description="Never compute one row alone, because kernels for one row round differently: an answer then does not depend on what else runs. A lone request is slower for it.",
    )


class Parallelism(Part):
    """How one copy of the model is spread over GPUs: tensor x pipeline of them."""

    tensor: int = Field(
        default=1, ge=1, le=64, description="Tensor parallelism: GPUs that share every layer."
    )
    pipeline: int = Field(
        default=1, ge=1, le=64, description="Pipeline parallelism: stages of consecutive layers."
    )
    expert: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Expert parallelism of mixture-of-experts models, inside `tensor`: it must divide it.",
    )
    gpus_per_node: int = Field(default=8, ge=1, le=72, description="GPUs of one machine.")

    @model_validator(mode="after")
    def _expert_divides_tensor(self) -> Parallelism:
        if self.tensor % self.expert:
            raise ValueError(f"expert {self.expert} must divide tensor {self.tensor}")
        return self

    @property
    def world_size(self) -> int:
        """GPUs of one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def nodes(self) -> int:
        """Machines of one copy of the model."""
        return -(-self.world_size // self.gpus_per_node)


class KvCachePool(Part):
    """The paged KV cache of a TensorRT-LLM runtime."""

    free_gpu_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the GPU memory left after loading that the KV cache takes.",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Tokens in the pool. Default: as many as free_gpu_fraction gives."
    )
    reuse: bool = Field(default=True, description="Share the blocks of equal prompt beginnings.")
    tokens_per_block: Literal[16, 32, 64, 128] = 32
    host_memory_bytes: int = Field(
        default=0, ge=0, description="Host memory to which blocks that may be reused are offloaded."
    )


class Nccl(Part):
    """NCCL's environment for multi-GPU launches. A variable that is null is not set."""

    socket_interface: str | None = Field(default=None, description="NCCL_SOCKET_IFNAME.")
    ib_disable: bool | None = Field(default=None, description="NCCL_IB_DISABLE.")
    ib_hca: str | None = Field(default=None, description="NCCL_IB_HCA.")
    p2p_level: Literal["LOC", "NVL", "PIX", "PXB", "PHB", "SYS"] | None = Field(
        default=None, description="NCCL_P2P_LEVEL."
    )
    net_gdr_level: Literal["LOC", "PIX", "PXB", "PHB", "SYS"] | None = Field(
        default=None, description="NCCL_NET_GDR_LEVEL."
    )
    debug: Literal["VERSION", "WARN", "INFO", "TRACE"] | None = Field(default=None, description="NCCL_DEBUG.")


class _TensorRtLlmCommon(TargetPart):
    """What both TensorRT-LLM runtimes have in common."""

    toolchain: str = Field(
        default="26.07",
        description="The container tag (YY.MM) of tritonserver:YY.MM-trtllm-python-py3; it decides every version inside.",
    )
    gpu: GpuName = Field(default="h100", description="The GPU that engines are built for and run on.")
    parallelism: Parallelism = Parallelism()
    max_num_tokens: int = Field(
        default=8192, ge=16, description="Tokens that one step of the running batch may hold."
    )
    kv_cache: KvCachePool = KvCachePool()
    chunked_context: bool = Field(
        default=True, description="Split long prompts over steps, so that they do not stall running answers."
    )
    streaming: bool = Field(
        default=True, description="Decoupled models: one request may get several responses."
    )
    devices: tuple[tuple[int, ...], ...] = Field(
        default=(),
        description="GPU ids of each instance, e.g. [[0, 1], [2, 3]]. Default: one instance on the first GPUs.",
    )
    cancellation_check_period_ms: int = Field(
        default=100, ge=1, le=60000, description="How often cancelled requests are looked for."
    )
    model_prefix: str = Field(
        default="",
        pattern=_MODEL_PREFIX,
        description="Put before the names of the Triton models, so that several deployments fit one repository. {name}, {variant} and {target} stand for what they say.",
    )
    nccl: Nccl = Nccl()
    name: str

    @model_validator(mode="after")
    def _devices_fit(self) -> _TensorRtLlmCommon:
        world_size = self.parallelism.world_size
        for ids in self.devices:
            if len(ids) != world_size or len(set(ids)) != len(ids):
                raise ValueError(
                    f"devices {list(ids)} must name {world_size} different GPUs (tensor x pipeline of parallelism)"
                )
        flat = [gpu for ids in self.devices for gpu in ids]
        if len(set(flat)) != len(flat):
            raise ValueError(f"devices {[list(ids) for ids in self.devices]} share a GPU between instances")
        if any(gpu < 0 for gpu in flat):
            raise ValueError("devices must be GPU ids of 0 and more")
        return self

    @property
    def instances(self) -> int:
        """Copies of the model."""
        return max(1, len(self.devices))

    def prefix_for(self, spec_name: str, variant: str) -> str:
        """``model_prefix`` with its placeholders filled in."""
        values = {"{name}": spec_name, "{variant}": variant, "{target}": self.name}
        prefix = self.model_prefix
        for placeholder, value in values.items():
            prefix = prefix.replace(placeholder, value)
        return prefix

    def triton_model(self, part: str) -> str:
        """The name of one Triton model of the deployment, e.g. ``ensemble``; the prefix must be a plain one."""
        assert "{" not in self.model_prefix, self.model_prefix
        return f"{self.model_prefix}{part}"


class Plugins(Part):
    """Plugins and kernels that ``trtllm-build`` compiles in; the names are its own."""

    gpt_attention_plugin: PluginDtype = "auto"
    gemm_plugin: PluginDtype | Literal["fp8", "nvfp4"] = Field(
        default="auto", description="trtllm-build's own default is disable."
    )
    nccl_plugin: PluginDtype = "auto"
    moe_plugin: PluginDtype = "auto"
    gemm_swiglu_plugin: Literal["fp8", "disable"] = "disable"
    low_latency_gemm_plugin: Literal["fp8", "disable"] = "disable"
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool = Field(
        default=True, description="Has an effective meaning with FP8 attention only."
    )
    use_fused_mlp: bool = True
    multiple_profiles: bool = False
    reduce_fusion: bool = False
    user_buffer: bool = False
    norm_quant_fusion: bool = False


class TensorRtLlmTarget(_TensorRtLlmCommon):
    """TensorRT-LLM engines behind preprocessing, postprocessing, an ensemble and BLS (TensorRT-LLM 1.2.1 and older)."""

    runtime: Literal["tensorrt_llm"]
    name: str = Field(default="tensorrt-llm", pattern=TARGET_NAME)
    opt_num_tokens: int | None = Field(
        default=None, ge=1, description="Tokens to optimize kernels for. Default: max batch x beam width."
    )
    max_beam_width: int = Field(default=1, ge=1, le=64)
    scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = Field(
        default="guaranteed_no_evict",
        description="guaranteed_no_evict starts a request only when its whole answer fits; max_utilization may pause one.",
    )
    logits_dtype: Literal["float16", "float32"] = "float32"
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    plugins: Plugins = Plugins()
    workers: int = Field(
        default=1, ge=1, le=64, description="Ranks that are converted and compiled at the same time."
    )
    launch: Literal["leader", "orchestrator"] = Field(
        default="leader",
        description="leader: one process per GPU under mpirun. orchestrator: one process that spawns the workers, one machine only.",
    )
    preprocessing_instances: int = Field(default=1, ge=1, le=64)
    postprocessing_instances: int = Field(default=1, ge=1, le=64)
    bls_instances: int | None = Field(
        default=None, ge=1, le=4096, description="Requests that BLS serves at once. Default: max_batch_size."
    )
    accumulate_tokens: bool = Field(
        default=False,
        description="BLS sends the whole text so far in each response of a stream, not the new piece.",
    )
    skip_special_tokens: bool = True
    add_special_tokens: bool = Field(
        default=True, description="The tokenizer adds its first token (BOS) to prompts."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TensorRtLlmTarget:
        if self.plugins.multiple_profiles and self.opt_num_tokens is not None:
            raise ValueError(
                "opt_num_tokens and plugins.multiple_profiles exclude each other in trtllm-build"
            )
        if self.plugins.user_buffer and not self.plugins.reduce_fusion:
            raise ValueError("plugins.user_buffer needs plugins.reduce_fusion")
        if self.launch == "orchestrator" and self.parallelism.nodes > 1:
            raise ValueError(
                f"launch: orchestrator works on one machine; this needs {self.parallelism.nodes} (use launch: leader)"
            )
        if self.launch == "leader" and len(self.devices) > 1:
            raise ValueError(
                "several instances (devices) need launch: orchestrator, or one server per instance"
            )
        return self


class LlmApiTarget(_TensorRtLlmCommon):
    """TensorRT-LLM's LLM API (PyTorch backend) on the quantized Hugging Face checkpoint; the only way from 1.3 on."""

    runtime: Literal["tensorrt_llm_llmapi"]
    name: str = Field(default="llmapi", pattern=TARGET_NAME)
    llm_options: dict[str, Any] = Field(
        default={},
        description="Further keyword arguments of tensorrt_llm.LLM, written into model.yaml as they are.",
    )


Target = Annotated[OnnxRuntimeTarget | TensorRtLlmTarget | LlmApiTarget, Field(discriminator="runtime")]
