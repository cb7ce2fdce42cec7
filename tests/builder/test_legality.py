"""Illegal combinations fail in ``plan``, and each message names what is legal instead."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.checkpoints.validate import dimensions_of
from enginesmith.checks import check_legal
from enginesmith.errors import SourceError, SpecError
from enginesmith.graph_legality import check_graph_targets
from enginesmith.graph_spec import GraphSpec
from enginesmith.legality import check_targets
from enginesmith.model_fit import variant_bytes
from enginesmith.platforms import (
    ARCHITECTURES,
    GPUS,
    TOOLCHAINS,
    GpuName,
    GpuRuntime,
    Toolchain,
    execution_on,
    toolchain_with,
)
from enginesmith.schemes import SCHEMES
from enginesmith.spec import KV_CACHES, ModelSpec
from enginesmith.spec_file import load_spec

Document = dict[str, Any]

LLAMA_8B: Document = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MIXTRAL: Document = LLAMA_8B | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
QWEN2_MOE: Document = LLAMA_8B | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
}
DEEPSEEK_V3: Document = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
DEEPSEEK_67B: Document = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_hidden_layers": 95,
    "vocab_size": 102400,
    "max_position_embeddings": 4096,
}


def make_spec(target: Document, variant: Document | None = None, **keys: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": "m",
            "source": {"path": "checkpoint"},
            "variants": {"v": variant or {"scheme": "none"}},
            "targets": [{"runtime": "tensorrt_llm", **target}],
            **keys,
        }
    )


def refused(spec: ModelSpec, hf_config: Document | None = None, **keys: Any) -> str:
    with pytest.raises(SpecError) as raised:
        check_targets(spec, hf_config, **keys)
    assert raised.value.hint, "every refusal says what is legal"
    return str(raised.value)


LLMAPI = {"runtime": "tensorrt_llm_llmapi"}
AWQ = {"scheme": "int4_awq"}
FP8_CACHE = {"scheme": "fp8", "kv_cache": "fp8"}
INT8_CACHE = {"scheme": "int4_awq", "kv_cache": "int8"}
NO_REUSE = {"kv_cache": {"reuse": False}, "chunked_context": False}

WITHOUT_MODEL: dict[str, tuple[Document, Document, str]] = {
    "fp8 on a100": ({"gpu": "a100"}, {"scheme": "fp8"}, r"FP8 needs SM89.*schemes for this target: none, int8_sq, int8_wo, int4_awq; gpu for this scheme: l4, l40"),
    "fp8 on a10": ({"gpu": "a10"}, {"scheme": "fp8"}, "tensorrt_llm on a10, SM86"),
    "w4a8 on a100": ({"gpu": "a100"}, {"scheme": "w4a8_awq"}, "FP8 needs SM89"),
    "fp8 cache on a100, llmapi": ({**LLMAPI, "gpu": "a100"}, FP8_CACHE, "FP8 needs SM89"),
    "smoothquant with the LLM API": (LLMAPI, {"scheme": "int8_sq"}, r"does not take ModelOpt's INT8 checkpoints.*schemes for this target: none, int4_awq, w4a8_awq, fp8; runtime: tensorrt_llm"),
    "int8 weights with the LLM API": (LLMAPI, {"scheme": "int8_wo"}, "does not take ModelOpt's INT8 checkpoints"),
    "int8 cache with the LLM API": (LLMAPI, INT8_CACHE, "the LLM API has no INT8 KV cache.*kv_cache for this target: none, fp8"),
    "smoothquant on b200": ({"gpu": "b200"}, {"scheme": "int8_sq"}, "no INT8 and INT4 kernels for SM100"),
    "awq on b200": ({"gpu": "b200"}, AWQ, "schemes for this target: none, fp8"),
    "unknown toolchain": ({"toolchain": "26.7"}, {"scheme": "none"}, r"'26.7' is not a known tag.*did you mean '26.07'\?"),
    "engines of an old toolchain": ({"toolchain": "25.08"}, {"scheme": "none"}, r"TensorRT-LLM 0\.21\.0, too old for runtime tensorrt_llm.*toolchain 26\.07 or"),
    "LLM API of an old toolchain": ({**LLMAPI, "toolchain": "26.02"}, {"scheme": "none"}, r"TensorRT-LLM 1\.1\.0, too old for runtime tensorrt_llm_llmapi.*26\.07 or 26\.06 or 26\.05 or 26\.04 or 26\.03$"),
    "int8 cache with reuse": ({"chunked_context": False}, INT8_CACHE, "INT8 KV cache excludes kv_cache.reuse.*set kv_cache.reuse: false"),
    "int8 cache with chunks": ({"kv_cache": {"reuse": False}}, INT8_CACHE, "INT8 KV cache excludes chunked_context"),
    "reuse without paged attention": ({"plugins": {"use_paged_context_fmha": False}}, {"scheme": "none"}, "kv_cache.reuse and chunked_context need plugins.use_paged_context_fmha"),
    "fp8 cache without fp8 attention": ({"plugins": {"use_fp8_context_fmha": False}}, FP8_CACHE, "needs plugins.use_fp8_context_fmha"),
    "no attention plugin": ({"plugins": {"gpt_attention_plugin": "disable"}}, {"scheme": "none"}, "need plugins.gpt_attention_plugin"),
    "nvfp4 gemm": ({"plugins": {"gemm_plugin": "nvfp4"}}, {"scheme": "fp8"}, "no scheme here makes NVFP4"),
    "fp8 gemm of other weights": ({"plugins": {"gemm_plugin": "fp8"}}, AWQ, "gemm_plugin: fp8 cannot take effect: it needs scheme fp8, and variant v has another"),
    "swiglu of other weights": ({"plugins": {"gemm_swiglu_plugin": "fp8"}}, AWQ, "it needs scheme fp8"),
    "swiglu before Hopper": ({"gpu": "l40s", "plugins": {"gemm_swiglu_plugin": "fp8"}}, {"scheme": "fp8"}, r"Hopper \(SM90\) only"),
    "swiglu without fused MLP": ({"plugins": {"gemm_swiglu_plugin": "fp8", "use_fused_mlp": False}}, {"scheme": "fp8"}, "needs use_fused_mlp"),
    "low latency gemm on b200": ({"gpu": "b200", "plugins": {"low_latency_gemm_plugin": "fp8"}}, {"scheme": "fp8"}, "not supported on SM100"),
    "norm fusion": ({"plugins": {"norm_quant_fusion": True}}, {"scheme": "fp8"}, "NVFP4 weights only"),
    "reduce fusion on one GPU": ({"plugins": {"reduce_fusion": True}}, {"scheme": "none"}, "nothing to reduce with parallelism.tensor 1"),
    "user buffer without fp8": ({"parallelism": {"tensor": 2}, "plugins": {"reduce_fusion": True, "user_buffer": True}}, AWQ, "user_buffer cannot take effect: it needs scheme fp8"),
    "no NCCL for two GPUs": ({"parallelism": {"tensor": 2}, "plugins": {"nccl_plugin": "disable"}}, {"scheme": "none"}, "2 GPUs talk through it"),
    "fewer tokens than answers": ({"max_num_tokens": 16, "max_beam_width": 2}, {"scheme": "none"}, "less than max_batch_size 16 x max_beam_width 2.*max_num_tokens 32 or more"),
    "prompts longer than a step": ({"max_num_tokens": 512, "chunked_context": False}, {"scheme": "none"}, "prompts may have 1023 tokens, but max_num_tokens is 512"),
    "optimum over the limit": ({"opt_num_tokens": 9000}, {"scheme": "none"}, "opt_num_tokens 9000 is more than max_num_tokens 8192"),
    "cache for less than one sequence": ({"kv_cache": {"max_tokens": 100}}, {"scheme": "none"}, "cannot hold one sequence"),
    "GPU that a machine does not have": ({"devices": [[8]]}, {"scheme": "none"}, "devices names GPU 8, a machine has 8"),
    "tensor group across machines": ({"parallelism": {"tensor": 3, "pipeline": 4}}, {"scheme": "none"}, "12 GPUs need 2 machines of 8, and a tensor-parallel group of 3 would lie across.*parallelism.tensor 1, 2, 4, 8"),
    "name that begins with a dot": ({"model_prefix": "..x"}, {"scheme": "none"}, "makes the Triton model name '..xtensorrt_llm_bls'"),
    "name that begins with a dash": ({"model_prefix": "-x"}, {"scheme": "none"}, "names begin with a letter or digit"),
    "name that climbs": ({"model_prefix": "a..b"}, {"scheme": "none"}, "single dots"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_illegal_whatever_the_model(name: str) -> None:
    target, variant, words = WITHOUT_MODEL[name]
    message = refused(make_spec(target, variant)).replace("\n", " ")
    assert re.search(words, message), message


WITH_MODEL: dict[str, tuple[Document, Document, Document, str]] = {
    "DeepSeek-V3 engines": (DEEPSEEK_V3, {}, {"scheme": "none"}, r"architecture DeepseekV3ForCausalLM cannot run on runtime tensorrt_llm; TensorRT-LLM has it in the PyTorch backend only.*runtime: tensorrt_llm_llmapi"),
    "architecture that nothing takes": (LLAMA_8B | {"architectures": ["BloomForCausalLM"]}, {}, {"scheme": "none"}, "supported: LlamaForCausalLM"),
    "TP that does not divide heads": (LLAMA_8B, {"parallelism": {"tensor": 3}}, {"scheme": "none"}, r"tensor parallelism 3 does not divide the model's 32 attention heads and 8 key-value heads.*parallelism.tensor 1 or 2 or 4 or 8 or 16 or 32"),
    "TP that does not divide key-value heads": (LLAMA_8B | {"num_attention_heads": 30, "num_key_value_heads": 10, "hidden_size": 3840}, {"parallelism": {"tensor": 6}}, {"scheme": "none"}, "parallelism.tensor 1 or 2 or 5 or 10 or 30"),
    "TP that does not divide the MLP": (LLAMA_8B | {"intermediate_size": 14340}, {"parallelism": {"tensor": 8}}, {"scheme": "none"}, r"intermediate_size of 14340 cannot be split into 8 equal parts.*parallelism.tensor 1 or 2 or 4$"),
    "PP of more stages than layers": (LLAMA_8B, {"parallelism": {"pipeline": 33}}, {"scheme": "none"}, "pipeline parallelism 33 is more than the model's 32 layers"),
    "experts of a dense model": (LLAMA_8B, {"parallelism": {"tensor": 2, "expert": 2}}, {"scheme": "none"}, "this one is dense"),
    "experts that cannot be shared out": (QWEN2_MOE, {"parallelism": {"tensor": 8, "expert": 8}}, {"scheme": "none"}, "expert parallelism 8 does not divide the model's 60 experts.*parallelism.expert 1 or 2 or 4 with tensor 8"),
    "experts too narrow for TP": (QWEN2_MOE | {"moe_intermediate_size": 1412}, {"parallelism": {"tensor": 8}}, {"scheme": "none"}, "experts' intermediate_size of 1412 cannot be split into 8.*or more expert parallelism"),
    "smoothquant of experts": (MIXTRAL, {"parallelism": {"tensor": 2}}, {"scheme": "int8_sq"}, "no int8_sq for mixtures of experts"),
    "AWQ groups cut by TP": (LLAMA_8B | {"intermediate_size": 11008}, {"parallelism": {"tensor": 4}}, AWQ, r"each of 4 GPUs has 2752 inputs of down_proj, no multiple of group_size 128.*group_size 32 or 64; parallelism.tensor 1 or 2$"),
    "AWQ groups of attention cut by TP": (LLAMA_8B | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}, {"parallelism": {"tensor": 3}}, {"scheme": "int4_awq", "group_size": 128}, "192 inputs of o_proj"),
    "exclusions of one stage only": (LLAMA_8B, {"parallelism": {"pipeline": 2}}, {"scheme": "fp8", "exclude": ["model.layers.0.*"]}, "counts the layers of each from 0.*parallelism.pipeline 1"),
    "exclusion of a third of a fused layer": (LLAMA_8B, {}, {"scheme": "fp8", "exclude": ["*.q_proj"]}, r"makes one layer of them.*exclude self_attn.k_proj, self_attn.v_proj too"),
    "reduce fusion of another model": (LLAMA_8B | {"architectures": ["Qwen2ForCausalLM"]}, {"parallelism": {"tensor": 2}, "plugins": {"reduce_fusion": True}}, {"scheme": "none"}, "turns it off for Qwen2ForCausalLM"),
    "checkpoint that came in FP8, on Ampere": (LLAMA_8B | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, {"gpu": "a100"}, {"scheme": "none"}, "came quantized with FP8.*it executes: none, int8_sq"),
    "checkpoint of another quantizer": (LLAMA_8B | {"quantization_config": {"quant_method": "gptq"}}, {}, {"scheme": "none"}, "came quantized with gptq, which cannot become engines"),
    "FP8 blocks on Ampere": (DEEPSEEK_V3, {**LLMAPI, "gpu": "a100", "parallelism": {"tensor": 8}}, {"scheme": "none"}, "FP8 weights in blocks"),
    "DeepSeek-V3 on eight H100": (DEEPSEEK_V3, {**LLMAPI, "parallelism": {"tensor": 8}}, {"scheme": "none"}, r"at least 6\d\d\.\d GiB of weights over 8 GPUs.*gpu: h200 or gh200 or b200"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_MODEL)
def test_illegal_for_the_model(name: str) -> None:
    hf_config, target, variant, words = WITH_MODEL[name]
    message = refused(make_spec(target, variant), hf_config).replace("\n", " ")
    assert re.search(words, message), message


LEGAL: dict[str, tuple[Document, Document, Document]] = {
    "fp8 on h100": (LLAMA_8B, {"parallelism": {"tensor": 4}}, FP8_CACHE),
    "user buffer": (LLAMA_8B, {"parallelism": {"tensor": 2}, "plugins": {"reduce_fusion": True, "user_buffer": True}}, {"scheme": "fp8"}),
    "int8 cache": (LLAMA_8B, NO_REUSE, INT8_CACHE),
    "key-value heads copied": (LLAMA_8B, {"parallelism": {"tensor": 16, "gpus_per_node": 16}}, {"scheme": "none"}),
    "tensor group of two whole machines": (LLAMA_8B, {"parallelism": {"tensor": 16}}, {"scheme": "none"}),
    "95 layers over 2 stages": (DEEPSEEK_67B, {"parallelism": {"tensor": 4, "pipeline": 2}}, {"scheme": "none"}),
    "experts shared out": (MIXTRAL, {"parallelism": {"tensor": 4, "expert": 4}}, {"scheme": "fp8"}),
    "experts and slices": (QWEN2_MOE, {"parallelism": {"tensor": 4, "expert": 2}}, {"scheme": "none"}),
    "the same layers of every stage": (LLAMA_8B, {"parallelism": {"pipeline": 2}}, {"scheme": "fp8", "exclude": ["*.down_proj"]}),
    "AWQ groups whole": (LLAMA_8B, {"parallelism": {"tensor": 8}}, AWQ),
    "DeepSeek-V3 on eight H200": (DEEPSEEK_V3, {**LLMAPI, "gpu": "h200", "parallelism": {"tensor": 8}}, {"scheme": "none"}),
    "ModelOpt's FP8 checkpoint": (LLAMA_8B | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, LLMAPI, {"scheme": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal_combinations_pass(name: str) -> None:
    hf_config, target, variant = LEGAL[name]
    check_targets(make_spec(target, variant), hf_config)


@pytest.mark.parametrize("runtime", get_args(GpuRuntime))
@pytest.mark.parametrize("gpu", GPUS)
def test_alternatives_that_a_hint_names_are_legal(runtime: GpuRuntime, gpu: GpuName) -> None:
    execution = execution_on(runtime, GPUS[gpu])
    for scheme, kv_cache in itertools.product(SCHEMES, ("none", "int8", "fp8")):
        if kv_cache != "none" and kv_cache not in KV_CACHES[scheme]:
            continue
        variant = {"scheme": scheme, "kv_cache": kv_cache}
        spec = make_spec({"runtime": runtime, "gpu": gpu, **NO_REUSE}, variant)
        if scheme in execution.schemes and kv_cache in execution.kv_caches:
            check_targets(spec)
        else:
            message = refused(spec)
            assert (
                ", ".join(execution.kv_caches if scheme in execution.schemes else execution.schemes)
                in message
            )


def test_targets_judge_their_own_variants_only() -> None:
    variants = {"a": {"scheme": "int8_sq"}, "b": {"scheme": "fp8"}}
    targets = [{"runtime": "onnxruntime"}, {**LLMAPI, "variants": ["b"]}]
    check_targets(make_spec(LLMAPI, variants=variants, targets=targets))
    assert "leave it out with the target's key variants" in refused(make_spec(LLMAPI, variants=variants))


@pytest.mark.parametrize("version", ["1.3.0rc23", "1.3.0", "1.4.0rc1"])
def test_engines_ended_with_1_2(version: str) -> None:
    newer = replace(TOOLCHAINS["26.07"], tag="27.01", tensorrt_llm=version)
    toolchains = {"27.01": newer, **TOOLCHAINS}
    message = refused(make_spec({"toolchain": "27.01"}), toolchains=toolchains)
    assert "which has no engines" in message
    assert "runtime: tensorrt_llm_llmapi, or for engines toolchain 26.07" in message
    check_targets(make_spec({**LLMAPI, "toolchain": "27.01"}), toolchains=toolchains)


@pytest.mark.parametrize("version", ["0.49.0", "0.49.0rc1", "1.0.0"])
def test_new_modelopt_is_refused_for_engines_and_taken_for_the_llm_api(version: str) -> None:
    message = refused(make_spec({}, {"scheme": "fp8"}), modelopt_version=version)
    assert f"ModelOpt {version} is too new for engines" in message
    assert "nvidia-modelopt==0.47.0" in message
    check_targets(make_spec({}), modelopt_version=version)
    check_targets(make_spec(LLMAPI, {"scheme": "fp8"}), modelopt_version=version)
    check_targets(make_spec({}, {"scheme": "fp8"}), modelopt_version="0.48.0")


def test_weights_that_do_not_fit_are_refused_with_what_would() -> None:
    message = refused(make_spec({"gpu": "h100"}), DEEPSEEK_67B)
    assert "GiB of weights over 1 GPU are 125.6 GiB each, and a h100 has 80" in message
    assert "2 GPUs or more" in message
    assert "gpu: h200 or b200" in message
    check_targets(make_spec({"gpu": "h100"}, {"scheme": "int4_awq", "group_size": 64}), DEEPSEEK_67B)


def test_weight_bytes_are_those_of_the_checkpoint() -> None:
    dimensions = dimensions_of(LLAMA_8B, "LlamaForCausalLM", Path("config.json"))
    variants = make_spec(
        {}, variants={name: {"scheme": name} for name in ("none", "fp8", "int4_awq")}
    ).variants
    sizes = {
        name: variant_bytes("LlamaForCausalLM", dimensions, variant) for name, variant in variants.items()
    }
    assert sizes["none"] == 2 * 8_030_261_248  # Llama-3-8B's parameter count
    linear = sizes["none"] - 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert sizes["none"] - sizes["fp8"] == linear // 2
    assert math.isclose(sizes["none"] - sizes["int4_awq"], 0.75 * linear, rel_tol=1e-9)


@given(
    heads=st.integers(1, 64),
    share=st.sampled_from((1, 2, 4, 8)),
    tensor=st.sampled_from((1, 2, 3, 4, 6, 8)),
    pipeline=st.integers(1, 6),
    width=st.integers(1, 64),
)
def test_what_passes_can_be_cut(heads: int, share: int, tensor: int, pipeline: int, width: int) -> None:
    kv_heads = heads // share if heads % share == 0 else heads
    config = LLAMA_8B | {
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, kv_heads),
        "head_dim": 64,
        "intermediate_size": width,
        "num_hidden_layers": 4,
        "vocab_size": 100,
    }
    parallelism = {"tensor": tensor, "pipeline": pipeline, "gpus_per_node": 72}
    legal = (
        heads % tensor == 0
        and (kv_heads % tensor == 0 or tensor % kv_heads == 0)
        and width % tensor == 0
        and pipeline <= 4
    )
    try:
        check_targets(make_spec({"parallelism": parallelism}), config)
    except SpecError:
        assert not legal
    else:
        assert legal


def test_plan_refuses_what_the_converter_would_refuse() -> None:
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}
    with pytest.raises(
        SourceError, match=r"^config\.json: RoPE scaling 'yarn' is not supported in TensorRT-LLM engines"
    ):
        check_targets(make_spec({}), LLAMA_8B | yarn)
    check_targets(make_spec(LLMAPI), LLAMA_8B | yarn)


def test_plan_and_build_judge_targets_through_one_door() -> None:
    spec = make_spec({"gpu": "a100"}, {"scheme": "fp8"})
    with pytest.raises(SpecError, match="FP8 needs SM89"):
        check_legal(spec, LLAMA_8B)


def test_lengths_are_held_against_the_model_for_every_target() -> None:
    spec = make_spec(LLMAPI, serving={"max_sequence_length": 9000})
    with pytest.raises(SpecError, match="9000, but the model has 8192 positions"):
        check_legal(spec, LLAMA_8B)


def test_a_model_without_a_twin_is_judged_by_its_runtime() -> None:
    target = {**LLMAPI, "gpu": "h200", "parallelism": {"tensor": 8}}
    check_legal(make_spec(target, verify={"twin": False}), DEEPSEEK_V3)
    with pytest.raises(SpecError, match="not supported"):
        check_legal(make_spec(target), DEEPSEEK_V3)


def test_config_without_sizes_is_a_damaged_source() -> None:
    with pytest.raises(SourceError, match="num_hidden_layers"):
        check_targets(make_spec(LLMAPI, verify={"twin": False}), {"architectures": ["DeepseekV3ForCausalLM"]})


def test_toolchains_are_sorted_and_complete() -> None:
    tags = list(TOOLCHAINS)
    assert tags == sorted(tags, reverse=True)
    assert all(
        row.tag == tag and row.image.endswith(f":{tag}-trtllm-python-py3") for tag, row in TOOLCHAINS.items()
    )
    assert [tag for tag, row in TOOLCHAINS.items() if row.tensorrt_llm == "1.2.1"] == [
        "26.07",
        "26.06",
        "26.05",
        "26.04",
    ]
    newest = toolchain_with("1.2.1")
    assert isinstance(newest, Toolchain)
    assert newest.tag == "26.07"
    assert toolchain_with("9.9") is None


def test_every_gpu_and_runtime_has_a_row() -> None:
    for runtime, gpu in itertools.product(get_args(GpuRuntime), GPUS.values()):
        assert "none" in execution_on(runtime, gpu).schemes
    assert set(get_args(GpuName)) == set(GPUS)
    assert set(ARCHITECTURES) >= {"LlamaForCausalLM", "MixtralForCausalLM"}


def test_documented_table_is_the_data() -> None:
    document = (Path(__file__).parents[2] / "docs" / "platforms.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in document.splitlines()
        if re.match(r"\| \d\d\.\d\d \|", line)
    ]
    yes = {True: "yes", False: "no"}
    assert rows == [
        [
            *(row.tag, row.tensorrt_llm, row.triton or "not known", row.tensorrt, row.cuda, row.driver),
            *(yes[row.has_engines], yes[row.has_llmapi]),
        ]
        for row in TOOLCHAINS.values()
    ]


def test_specs_of_the_project_are_legal() -> None:
    smollm2 = LLAMA_8B | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    specs = [load_spec(path) for path in (Path(__file__).parents[2] / "models").glob("*.yaml")]
    assert {type(spec) for spec in specs} == {ModelSpec, GraphSpec}
    for spec in specs:
        if isinstance(spec, GraphSpec):
            check_graph_targets(spec)
        else:
            check_targets(spec, smollm2)
