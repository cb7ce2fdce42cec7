"""The command line of ``trtllm-build`` for a target: pure, no files read, nothing started.

Every choice is written out, also where it is the tool's default, because defaults moved between versions and a command
line should say what was compiled. Flags and their values: ``tensorrt_llm/commands/build.py`` and
``tensorrt_llm/plugin/plugin.py`` of the 1.0 to 1.2 line. Where ``trtllm-build`` would override a choice with no more than
a warning in its log, the value that takes effect is passed; ``enginesmith.legality`` refuses what cannot take effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget

_FP8_ATTENTION_ALGORITHMS = ("FP8", "W4A8_AWQ")
"""Weight quantization with which ``trtllm-build`` leaves FP8 context attention enabled (``build`` in builder.py)."""


@dataclass(frozen=True)
class Precision:
    """What the checkpoint's ``config.json`` says in its ``quantization`` section; None is 16-bit."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None


@dataclass(frozen=True)
class TimingCache:
    """Kernel timings of earlier builds. ``read`` is None when there are none yet."""

    read: Path | None
    write: Path


def trtllm_build_arguments(
    target: TensorRtLlmTarget,
    serving: Serving,
    *,
    checkpoint_dir: Path,
    output_dir: Path,
    precision: Precision,
    workers: int = 1,
    timing_cache: TimingCache | None = None,
) -> tuple[str, ...]:
    """The arguments after ``trtllm-build``, as one flag or value each."""
    flags: dict[str, str | int | Path | None] = {
        "checkpoint_dir": checkpoint_dir,
        "output_dir": output_dir,
        **_limits(target, serving),
        "kv_cache_type": "paged",
        "logits_dtype": target.logits_dtype,
        **_plugins(target, precision),
        "workers": min(workers, target.parallelism.world_size),
        "profiling_verbosity": "layer_names_only",
        "log_level": "info",
        "input_timing_cache": timing_cache.read if timing_cache else None,
        # Left out, the tool would write it into the working directory, which in a container is nobody's.
        "output_timing_cache": timing_cache.write if timing_cache else output_dir / "model.cache",
    }
    arguments = [
        part for flag, value in flags.items() if value is not None for part in (f"--{flag}", str(value))
    ]
    switches = {
        "--gather_context_logits": target.gather_context_logits,
        "--gather_generation_logits": target.gather_generation_logits,
    }
    return (*arguments, *(switch for switch, wanted in switches.items() if wanted))


def effective_max_num_tokens(target: TensorRtLlmTarget, serving: Serving) -> int:
    """Tokens per step that ``trtllm-build`` keeps: never more than the batch can hold, at least one KV block."""
    most = serving.max_batch_size * serving.max_sequence_length
    return max(min(target.max_num_tokens, most), target.kv_cache.tokens_per_block)


def paged_context_attention(target: TensorRtLlmTarget, precision: Precision) -> bool:
    """Whether prompts attend to paged blocks, which KV reuse and chunked prompts need; never with an INT8 KV cache."""
    return target.plugins.use_paged_context_fmha and precision.kv_cache_quant_algo != "INT8"


def fp8_context_attention(target: TensorRtLlmTarget, precision: Precision) -> bool:
    """Whether prompts are attended to in FP8: FP8 weights, and with paged blocks an FP8 KV cache too."""
    if not target.plugins.use_fp8_context_fmha or precision.quant_algo not in _FP8_ATTENTION_ALGORITHMS:
        return False
    return precision.kv_cache_quant_algo == "FP8" or not paged_context_attention(target, precision)


def fused_mlp(target: TensorRtLlmTarget, precision: Precision) -> bool:
    """Whether gate and up projection become one product: unquantized or FP8 weights only."""
    return target.plugins.use_fused_mlp and precision.quant_algo in (None, "FP8")


def _limits(target: TensorRtLlmTarget, serving: Serving) -> dict[str, int | None]:
    max_num_tokens = effective_max_num_tokens(target, serving)
    opt_num_tokens = target.opt_num_tokens
    return {
        "max_batch_size": serving.max_batch_size,
        "max_input_len": serving.prompt_limit,
        "max_seq_len": serving.max_sequence_length,
        "max_num_tokens": max_num_tokens,
        "opt_num_tokens": None if opt_num_tokens is None else min(opt_num_tokens, max_num_tokens),
        "max_beam_width": target.max_beam_width,
    }


def _plugins(target: TensorRtLlmTarget, precision: Precision) -> dict[str, str | int]:
    plugins = target.plugins
    switches = {
        "context_fmha": True,
        "remove_input_padding": True,
        "use_paged_context_fmha": paged_context_attention(target, precision),
        "use_fp8_context_fmha": fp8_context_attention(target, precision),
        "multiple_profiles": plugins.multiple_profiles,
        "reduce_fusion": plugins.reduce_fusion,
        "user_buffer": plugins.user_buffer,
        "norm_quant_fusion": plugins.norm_quant_fusion,
        "use_fused_mlp": fused_mlp(target, precision),
    }
    return {
        "gpt_attention_plugin": plugins.gpt_attention_plugin,
        "gemm_plugin": plugins.gemm_plugin,
        "nccl_plugin": plugins.nccl_plugin,
        "moe_plugin": plugins.moe_plugin,
        "gemm_swiglu_plugin": plugins.gemm_swiglu_plugin,
        "low_latency_gemm_plugin": plugins.low_latency_gemm_plugin,
        "tokens_per_block": target.kv_cache.tokens_per_block,
        **{name: "enable" if enabled else "disable" for name, enabled in switches.items()},
    }
