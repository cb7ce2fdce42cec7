"""Plays ``trtllm-build`` of TensorRT-LLM 1.0 to 1.2: its whole flag table, its refusals, its log, its output directory.

No kernels are compiled: an engine is a file of about the size of its rank's weights. Flags, types, choices, defaults and
conflicts are those of ``commands/build.py``, ``plugin/plugin.py``, ``builder.py`` and ``_common.py``; where the tool
overrides a choice with a warning, so does this, and tests look for the warnings. ``install`` puts it on a PATH, with an
``nvidia-smi``. Environment: ``STANDIN_VERSION``, ``STANDIN_SM``, ``STANDIN_GPUS``, ``STANDIN_FAULT``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

DTYPE_PLUGIN = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
PLUGINS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "bert_attention_plugin": ("auto", DTYPE_PLUGIN),
    "gpt_attention_plugin": ("auto", DTYPE_PLUGIN),
    "gemm_plugin": (None, ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable")),
    "gemm_swiglu_plugin": ("disable", ("fp8", "disable")),
    "fp8_rowwise_gemm_plugin": ("disable", DTYPE_PLUGIN),
    "nccl_plugin": ("auto", DTYPE_PLUGIN),
    "lora_plugin": ("disable", DTYPE_PLUGIN),
    "moe_plugin": ("auto", DTYPE_PLUGIN),
    "mamba_conv1d_plugin": ("auto", DTYPE_PLUGIN),
    "low_latency_gemm_plugin": ("disable", ("fp8", "disable")),
    "low_latency_gemm_swiglu_plugin": ("disable", ("fp8", "disable")),
    "gemm_allreduce_plugin": ("disable", ("float16", "bfloat16", "disable")),
}
FEATURES = {
    "dora_plugin": False,
    "context_fmha": True,
    "bert_context_fmha_fp32_acc": False,
    "remove_input_padding": True,
    "norm_quant_fusion": False,
    "reduce_fusion": False,
    "user_buffer": False,
    "use_paged_context_fmha": True,
    "use_fp8_context_fmha": True,
    "fuse_fp4_quant": False,
    "multiple_profiles": False,
    "paged_state": True,
    "streamingllm": False,
    "use_fused_mlp": True,
    "pp_reduce_scatter": False,
}
LORA_MODULES = (
    *("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"),
    *("cross_attn_qkv", "cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_dense"),
    *("moe_h_to_4h", "moe_4h_to_h", "moe_gate", "moe_router", "mlp_router", "mlp_gate_up"),
)
MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "QWenForCausalLM"}
MODELS |= {"Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}
QUANTIZATION_KEYS = {
    *("quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe"),
    *("has_zero_point", "pre_quant_scale", "exclude_modules"),
}
MANDATORY = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads")
FP8_WORKFLOWS = ("FP8", "W4A8_AWQ", "NVFP4")


def parse_enum(value: str) -> str:
    if value.upper() not in ("CONTINUOUS", "PAGED", "DISABLED"):
        raise ValueError(f"Invalid KV cache type: {value}")
    return value.upper()


def parser() -> argparse.ArgumentParser:
    table = argparse.ArgumentParser(prog="trtllm-build")
    for name in ("checkpoint_dir", "model_config", "build_config", "model_cls_file", "model_cls_name"):
        table.add_argument(f"--{name}", type=str)
    table.add_argument("--output_dir", type=str, default="engine_outputs")
    table.add_argument("--max_batch_size", type=int, default=2048)
    table.add_argument("--max_input_len", type=int, default=1024)
    table.add_argument("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int)
    table.add_argument("--max_beam_width", type=int, default=1)
    table.add_argument("--max_num_tokens", type=int, default=8192)
    table.add_argument("--opt_num_tokens", type=int)
    table.add_argument("--max_encoder_input_len", type=int, default=1024)
    table.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    table.add_argument("--kv_cache_type", type=parse_enum, default=argparse.SUPPRESS)
    table.add_argument("--paged_kv_cache", type=str, default=argparse.SUPPRESS)
    table.add_argument("--input_timing_cache", type=str)
    table.add_argument("--output_timing_cache", type=str, default="model.cache")
    table.add_argument(
        "--profiling_verbosity", default="layer_names_only", choices=["layer_names_only", "detailed", "none"]
    )
    for name in ("strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output"):
        table.add_argument(f"--{name}", action="store_true")
    table.add_argument("--workers", type=int, default=1)
    levels = ["internal_error", "error", "warning", "info", "verbose", "debug", "trace"]
    table.add_argument("--log_level", default="info", choices=levels)
    table.add_argument("--visualize_network", type=str)
    for name in ("dry_run", "monitor_memory"):
        table.add_argument(f"--{name}", action="store_true")
    table.add_argument("--logits_dtype", choices=["float16", "float32"])
    for name in ("gather_context_logits", "gather_generation_logits", "gather_all_token_logits"):
        table.add_argument(f"--{name}", action="store_true")
    table.add_argument("--lora_dir", nargs="+")
    table.add_argument("--lora_ckpt_source", default="hf", choices=["hf", "nemo"])
    table.add_argument("--lora_target_modules", nargs="+", choices=LORA_MODULES)
    table.add_argument("--max_lora_rank", type=int, default=64)
    modes = ["draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"]
    table.add_argument("--speculative_decoding_mode", choices=modes)
    table.add_argument("--max_draft_len", type=int, default=0)
    for name, (default, choices) in PLUGINS.items():
        table.add_argument(f"--{name}", type=str, default=default, choices=choices)
    for name, enabled in FEATURES.items():
        default = "enable" if enabled else "disable"
        table.add_argument(f"--{name}", type=str, default=default, choices=["enable", "disable"])
    table.add_argument("--tokens_per_block", type=int, default=32)
    return table


def log(level: str, text: str) -> None:
    print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT-LLM] [{level}] {text}", flush=True)


def warn(text: str) -> None:
    log("W", text)


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """The config, refused as ``PretrainedConfig`` and ``from_checkpoint`` refuse it."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    for key in MANDATORY:
        if key not in config:
            raise KeyError(key)
    for key in config.get("quantization") or {}:
        if key not in QUANTIZATION_KEYS:
            raise TypeError(f"QuantConfig.__init__() got an unexpected keyword argument '{key}'")
    mapping = config.get("mapping") or {"world_size": 1, "tp_size": 1, "pp_size": 1}
    product = mapping.get("tp_size", 1) * mapping.get("pp_size", 1) * mapping.get("cp_size", 1)
    if mapping["world_size"] != product:
        raise ValueError(f"world_size must equal to tp_size * pp_size * cp_size, but got {mapping}")
    assert config["architecture"] in MODELS, f"Unsupported model architecture: {config['architecture']}"
    for rank in range(mapping["world_size"]):
        if not (directory / f"rank{rank}.safetensors").is_file():
            raise FileNotFoundError(f"{directory}/rank{rank}.safetensors")
    return config


def refuse(args: argparse.Namespace, config: dict[str, Any], plugins: dict[str, Any], sm: int) -> None:
    """What the tool ends with an exception for."""
    if args.gather_context_logits and args.max_draft_len > 0:
        raise RuntimeError("Gather context logits is not support with draft len > 0.")
    if sm == 100:
        for name in ("gemm_swiglu_plugin", "fp8_rowwise_gemm_plugin", "low_latency_gemm_plugin"):
            if plugins[name] is not None:
                raise NotImplementedError(f"{name}={plugins[name]} is not supported on SM {sm}.")
    if args.multiple_profiles == "enable" and args.opt_num_tokens is not None:
        raise RuntimeError("multiple_profiles is enabled, while opt_num_tokens is set.")
    assert not plugins["streamingllm"], "StreamingLLM is no longer supported"
    assert not plugins["pp_reduce_scatter"] or config["architecture"] == "MixtralForCausalLM", (
        "PP reduce scatter is only supported in the mixtral model."
    )
    quantization = config.get("quantization") or {}
    algo, kv = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if 100 <= sm < 120:
        if algo in ("W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W4A16_GPTQ") or kv == "INT8":
            raise RuntimeError("INT8/INT4 quantization is not supported on SM>=100.")
        if algo and algo.startswith("W8A8_SQ"):
            raise RuntimeError("SmoothQuant is not supported on SM>=100.")
    swiglu = plugins["gemm_swiglu_plugin"] or plugins["low_latency_gemm_swiglu_plugin"]
    if swiglu and not plugins["use_fused_mlp"]:
        raise RuntimeError("GemmSwiGLU plugin requires --use_fused_mlp flag")
    if args.fast_build and algo in ("W8A16", "W4A16_AWQ") and config.get("disable_weight_only_quant_plugin"):
        raise RuntimeError("Manage weights of weight only quant works only with plugin currently.")


def override(config: dict[str, Any], plugins: dict[str, Any], sm: int) -> None:
    """What the tool changes with a warning."""
    quantization = config.get("quantization") or {}
    algo, kv = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    tensor = (config.get("mapping") or {}).get("tp_size", 1)

    def off(name: str, reason: str) -> None:
        warn(f"Overriding {name} to False: {reason}")
        plugins[name] = False

    if plugins["reduce_fusion"] and (tensor == 1 or config["architecture"] != "LlamaForCausalLM"):
        off("reduce_fusion", "llama with tensor parallelism only")
    if plugins["user_buffer"] and not plugins["reduce_fusion"]:
        off("user_buffer", "needs reduce_fusion")
    if plugins["norm_quant_fusion"] and algo != "NVFP4":
        off("norm_quant_fusion", "NVFP4 llama only")
    paged, fp8 = plugins["use_paged_context_fmha"], plugins["use_fp8_context_fmha"]
    if not plugins["context_fmha"]:
        warn("Context FMHA is disabled, FP8 Context FMHA and Paged Context FMHA are disabled.")
        plugins["use_fp8_context_fmha"] = plugins["use_paged_context_fmha"] = False
    elif algo not in FP8_WORKFLOWS or sm < 89:
        if fp8:
            off("use_fp8_context_fmha", "must be used with the fp8 quantization workflow on SM89 and later")
        if paged and kv == "FP8":
            off("use_paged_context_fmha", "FP8 context FMHA is disabled")
    elif paged and fp8 and kv != "FP8":
        off("use_fp8_context_fmha", "must be used together with fp8 KV cache")
    elif paged and kv == "FP8" and not fp8:
        warn("FP8 Context FMHA is enabled to support FP8 Paged Context FMHA.")
        plugins["use_fp8_context_fmha"] = True
    if plugins["use_paged_context_fmha"] and kv == "INT8":
        off("use_paged_context_fmha", "doesn't work with int8 kv cache currently")
    if plugins["use_fused_mlp"] and algo not in (None, "FP8", "MIXED_PRECISION"):
        plugins["use_fused_mlp"] = False  # Silently, also in the tool.


def limit_tokens(args: argparse.Namespace, config: dict[str, Any], plugins: dict[str, Any]) -> None:
    if args.max_seq_len is None:
        args.max_seq_len = config.get("max_position_embeddings") or 2048
        log("I", f"max_seq_len is not specified, using deduced value {args.max_seq_len}")
    elif args.max_seq_len > (config.get("max_position_embeddings") or args.max_seq_len):
        warn(f"max_seq_len {args.max_seq_len} is larger than max_position_embeddings")
    if args.max_input_len > args.max_seq_len:
        warn(f"max_input_len is {args.max_input_len} is larger than max_seq_len, clipping it to max_seq_len")
        args.max_input_len = args.max_seq_len
    if args.opt_num_tokens is None and not plugins["multiple_profiles"]:
        args.opt_num_tokens = min(args.max_batch_size * args.max_beam_width, args.max_num_tokens)
    most = args.max_seq_len * args.max_batch_size
    if args.max_num_tokens > most:
        warn(f"max_num_tokens ({args.max_num_tokens}) shouldn't be greater than max_seq_len * max_batch_size")
        args.max_num_tokens = most
    if args.max_num_tokens < args.tokens_per_block:
        warn(f"max_num_tokens ({args.max_num_tokens}) should be at least tokens_per_block")
        args.max_num_tokens = args.tokens_per_block
    if args.opt_num_tokens is not None and args.opt_num_tokens > args.max_num_tokens:
        warn(f"opt_num_tokens ({args.opt_num_tokens}) shouldn't be greater than max_num_tokens")
        args.opt_num_tokens = args.max_num_tokens


def write_engines(args: argparse.Namespace, config: dict[str, Any], plugins: dict[str, Any]) -> None:
    out, checkpoint = Path(args.output_dir), Path(args.checkpoint_dir)
    mapping = config.get("mapping") or {"world_size": 1, "tp_size": 1, "pp_size": 1}
    fault = os.environ.get("STANDIN_FAULT", "")
    kept = ("max_input_len", "max_seq_len", "max_batch_size", "max_beam_width", "max_num_tokens")
    build = {name: getattr(args, name) for name in (*kept, "opt_num_tokens", "gather_context_logits")}
    build |= {"kv_cache_type": getattr(args, "kv_cache_type", "PAGED"), "strongly_typed": True}
    build["plugin_config"] = plugins
    pretrained = {**config, "logits_dtype": args.logits_dtype or config.get("logits_dtype", "float32")}
    for rank in range(mapping["world_size"]):
        log("I", "Total time of constructing network from module object 1.5 seconds")
        log("I", "Build TensorRT engine Unnamed Network 0")
        if fault == "memory":
            raise RuntimeError("[TRT] [E] [defaultAllocator.cpp::allocate] Error Code 1: out of memory")
        if fault == "disk":
            raise OSError(28, "No space left on device")
        if fault == "killed" and rank == mapping["world_size"] - 1:
            os.kill(os.getpid(), 9)
        print("[TRT] [I] Engine generation completed in 15.4544 seconds.", flush=True)
        if rank == 0:
            document = {"version": version(), "pretrained_config": pretrained, "build_config": build}
            (out / "config.json").write_text(json.dumps(document, indent=4))
            if args.output_timing_cache:
                Path(args.output_timing_cache).write_bytes(b"timings of " + version().encode())
        path = out / f"rank{rank}.engine"
        log("I", f"Serializing engine to {path}...")
        size = (checkpoint / f"rank{rank}.safetensors").stat().st_size
        path.write_bytes(b"ftrt" + bytes(size // 4 if fault == "short" and rank == 0 else size))
        log("I", "Engine serialized. Total time: 00:00:01")


def version() -> str:
    return os.environ.get("STANDIN_VERSION", "1.2.1")


def main(arguments: list[str]) -> None:
    print(f"[TensorRT-LLM] TensorRT LLM version: {version()}", flush=True)
    args = parser().parse_args(arguments)
    warn("Option --gather_generation_logits is deprecated, a build flag is not required anymore.")
    if hasattr(args, "paged_kv_cache"):
        warn("Option --paged_kv_cache is deprecated, use --kv_cache_type=paged/disabled instead.")
    if args.gather_all_token_logits:
        args.gather_context_logits = args.gather_generation_logits = True
    sm = int(os.environ.get("STANDIN_SM", "90"))
    plugins: dict[str, Any] = {
        name: None if (value := getattr(args, name)) == "disable" else value for name in PLUGINS
    }
    plugins |= {name: getattr(args, name) == "enable" for name in FEATURES}
    plugins |= {"tokens_per_block": args.tokens_per_block, "manage_weights": args.fast_build}
    for name, value in plugins.items():
        log("I", f"Set PluginConfig.{name} to {value}.")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    config = read_checkpoint(Path(args.checkpoint_dir))
    refuse(args, config, plugins, sm)
    limit_tokens(args, config, plugins)
    override(config, plugins, sm)
    if not args.dry_run:
        write_engines(args, config, plugins)
    log("I", "Total time of building all engines: 00:00:03")


def install(directory: Path, *, gpu: str = "NVIDIA H100 80GB HBM3, 9.0, 81559, 590.44.01") -> Path:
    """``trtllm-build`` and ``nvidia-smi`` in ``directory``, which is then what PATH needs; returns the former."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "trtllm-build"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    query = directory / "nvidia-smi"
    lines = "\n".join(f"echo {shlex.quote(gpu)}" for _ in range(int(os.environ.get("STANDIN_GPUS", "1"))))
    query.write_text(f"#!/bin/sh\n{lines}\n")
    for file in (program, query):
        file.chmod(0o755)
    return program


if __name__ == "__main__":
    main(sys.argv[1:])
