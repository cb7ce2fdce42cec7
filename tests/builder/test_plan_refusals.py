"""``enginesmith plan`` on combinations that cannot work: one message that names what can, exit status 2, nothing built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from enginesmith import cli

Document = dict[str, Any]

LLAMA: Document = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_70B: Document = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
}
MIXTRAL: Document = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK_V3: Document = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
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
ENGINES: Document = {"runtime": "tensorrt_llm"}
LLMAPI: Document = {"runtime": "tensorrt_llm_llmapi"}
ON_EIGHT_H200: Document = {"gpu": "h200", "parallelism": {"tensor": 8}}
NO_TWIN: Document = {"twin": False}
NO_REUSE: Document = {"kv_cache": {"reuse": False}, "chunked_context": False}


def came(algorithm: str, **keys: Any) -> Document:
    """A ``quantization_config`` as ModelOpt writes it."""
    section = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **keys}
    return {"quantization_config": section}


def write_spec(
    directory: Path, hf_config: Document, target: Document, variant: Document, **keys: Any
) -> Path:
    """A spec beside a checkpoint of which nothing but ``config.json`` is there: all that ``plan`` may read."""
    (directory / "checkpoint").mkdir()
    (directory / "checkpoint" / "config.json").write_text(json.dumps(hf_config))
    path = directory / "model.yaml"
    document = {
        "name": "m",
        "source": {"path": "checkpoint"},
        "variants": {"v": variant},
        "targets": [target],
        **keys,
    }
    path.write_text(yaml.safe_dump(document))
    return path


def plan(capsys: pytest.CaptureFixture[str], spec: Path) -> tuple[int, str, str]:
    status = cli.run(["--store", str(spec.parent / "store"), "plan", str(spec)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


REFUSED: dict[str, tuple[Document, Document, Document, Document, tuple[str, ...]]] = {
    "FP8 on SM80": (LLAMA, ENGINES | {"gpu": "a100"}, {"scheme": "fp8"}, {}, ("FP8 needs SM89", "none, int8_sq, int8_wo, int4_awq", "h100")),
    "W8A8 with the LLM API": (LLAMA, LLMAPI, {"scheme": "int8_sq"}, {}, ("does not take ModelOpt's INT8", "none, int4_awq, w4a8_awq, fp8", "runtime: tensorrt_llm")),
    "DeepSeek-V3 engines": (DEEPSEEK_V3, ENGINES | ON_EIGHT_H200, {"scheme": "none"}, NO_TWIN, ("DeepseekV3ForCausalLM cannot run on runtime tensorrt_llm", "runtime: tensorrt_llm_llmapi")),
    "DeepSeek-V3 with a twin": (DEEPSEEK_V3, LLMAPI | ON_EIGHT_H200, {"scheme": "none"}, {}, ("the runtime tensorrt_llm_llmapi takes it, with verify.twin: false",)),
    "AWQ groups cut by tensor parallelism": (LLAMA, ENGINES | {"parallelism": {"tensor": 4}}, {"scheme": "int4_awq"}, {}, ("2752 inputs of down_proj, no multiple of group_size 128", "group_size 32 or 64", "parallelism.tensor 1 or 2")),
    "experts quantized here": (MIXTRAL, ENGINES | {"parallelism": {"tensor": 4}}, {"scheme": "fp8"}, {}, ("experts are not quantized here", "scheme: none", "verify.twin: false")),
    "experts quantized here, ONNX Runtime": (MIXTRAL, {"runtime": "onnxruntime"}, {"scheme": "int8_wo"}, {}, ("experts are not quantized here",)),
    "experts that came quantized, with a twin": (MIXTRAL | came("FP8"), ENGINES | {"parallelism": {"tensor": 4}}, {"scheme": "none"}, {}, ("nothing here runs as a twin", "verify.twin: false")),
    "experts that came in W4A8": (MIXTRAL | came("W4A8_AWQ", group_size=128), ENGINES | {"parallelism": {"tensor": 4}}, {"scheme": "none"}, NO_TWIN, ("no w4a8_awq for mixtures of experts",)),
    "quantized twice": (LLAMA | came("FP8"), ENGINES, {"scheme": "int4_awq"}, {}, ("int4_awq cannot be made of this checkpoint, which came quantized with FP8", "scheme: none")),
    "quantized twice alike": (LLAMA | came("FP8"), LLMAPI, {"scheme": "fp8"}, {}, ("came quantized with FP8",)),
    "came with an INT8 cache, reused": (LLAMA | came("W4A16_AWQ", group_size=128, kv_cache_quant_algo="INT8"), ENGINES, {"scheme": "none"}, {}, ("INT8 KV cache excludes kv_cache.reuse", "kv_cache.reuse: false")),
    "came with an INT8 cache, LLM API": (LLAMA | came("W4A16_AWQ", group_size=128, kv_cache_quant_algo="INT8"), LLMAPI, {"scheme": "none"}, {}, ("no INT8 KV cache",)),
    "came in groups that are cut": (LLAMA | came("W4A16_AWQ", group_size=128), ENGINES | {"parallelism": {"tensor": 4}}, {"scheme": "none"}, {}, ("2752 inputs of down_proj, no multiple of group_size 128", "hint: parallelism.tensor 1 or 2")),
    "70 billion 16-bit weights on one GH200": (LLAMA_70B | {"dtype": "bfloat16"}, ENGINES | {"gpu": "gh200"}, {"scheme": "none"}, {}, ("of weights over 1 GPU", "gpu: h200 or b200")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_what_can(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_config, target, variant, verify, words = REFUSED[name]
    status, out, err = plan(capsys, write_spec(tmp_path, hf_config, target, variant, verify=verify))
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert "\n  hint: " in err
    assert [word for word in words if word not in err] == [], err


PLANNED: dict[str, tuple[Document, Document, Document]] = {
    "DeepSeek-V3 with the LLM API": (DEEPSEEK_V3, LLMAPI | ON_EIGHT_H200, NO_TWIN),
    "experts that came in FP8": (MIXTRAL | came("FP8"), ENGINES | {"parallelism": {"tensor": 4}}, NO_TWIN),
    "a checkpoint that came in FP8": (LLAMA | came("FP8"), ENGINES, {}),
    "FP8 plugins for a checkpoint that came in FP8": (LLAMA | came("FP8"), ENGINES | {"plugins": {"gemm_plugin": "fp8"}}, {}),
    "an INT8 cache without reuse": (LLAMA | came("W4A16_AWQ", group_size=128, kv_cache_quant_algo="INT8"), ENGINES | NO_REUSE, {}),
    "70 billion FP8 weights on one GH200": (LLAMA_70B | came("FP8"), ENGINES | {"gpu": "gh200"}, {}),
    "70 billion weights of a method that is not ours": (LLAMA_70B | {"quantization_config": {"quant_method": "awq"}}, LLMAPI, NO_TWIN),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_what_came_quantized_is_judged_as_what_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_config, target, verify = PLANNED[name]
    spec = write_spec(tmp_path, hf_config, target, {"scheme": "none"}, verify=verify)
    status, out, err = plan(capsys, spec)
    assert status == 0, err
    assert f"v@{'llmapi' if target['runtime'].endswith('llmapi') else 'tensorrt-llm'}" in out


def test_fp8_plugins_of_16_bit_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, LLAMA, ENGINES | {"plugins": {"gemm_plugin": "fp8"}}, {"scheme": "none"})
    status, _, err = plan(capsys, spec)
    assert status == 2
    assert "gemm_plugin: fp8 cannot take effect: it needs scheme fp8, and variant v has another" in err


def test_a_description_beside_the_checkpoint_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, LLAMA, ENGINES, {"scheme": "fp8"})
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}
    (tmp_path / "checkpoint" / "hf_quant_config.json").write_text(json.dumps(described))
    status, _, err = plan(capsys, spec)
    assert status == 2
    assert "came quantized with W4A16_AWQ" in err


def test_a_modelopt_without_the_exporter_is_refused_for_engines(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, LLAMA, ENGINES, {"scheme": "fp8"})
    newer = tmp_path / "newer" / "nvidia_modelopt-0.49.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 0.49.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "enginesmith.cli", "--store", str(tmp_path / "store"), "plan", str(spec)],
        env={**os.environ, "PYTHONPATH": str(newer.parent)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "ModelOpt 0.49.0 is too new for engines" in done.stderr
    assert "pip install nvidia-modelopt==0.47.0, or runtime: tensorrt_llm_llmapi" in done.stderr


WRONG_KINDS: dict[str, Any] = {
    "architectures": 5,
    "head_dim": "wide",
    "num_hidden_layers": float("inf"),
    "hidden_size": True,
    "intermediate_size": 10**30,
    "sliding_window": [4096],
    "rope_parameters": "llama3",
    "rope_theta": "10000",
    "rms_norm_eps": {},
    "mlp_only_layers": 3,
    "quantization_config": ["FP8"],
}


@pytest.mark.parametrize("key", WRONG_KINDS)
def test_a_config_key_of_the_wrong_kind_is_a_damaged_source(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(tmp_path, LLAMA | {key: WRONG_KINDS[key]}, ENGINES, {"scheme": "none"})
    status, out, err = plan(capsys, spec)
    assert (status, out) == (1, ""), err
    assert f"config.json: {key} must be " in err
    assert "\n  hint: " in err


@pytest.mark.parametrize("path", ["x\0y", "x" * 5000, "~nobody-of-this-name/x", "loop"])
def test_a_path_that_cannot_be_looked_up_is_named(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    spec = write_spec(tmp_path, LLAMA, ENGINES, {"scheme": "none"}, source={"path": path})
    status, out, err = plan(capsys, spec)
    assert out == ""
    assert status in (1, 2), err
    assert "cannot be looked up" in err
    assert len(err) < 1000


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"runtime": "vllm"}, "targets.0: unknown runtime 'vllm'; allowed: onnxruntime, tensorrt_llm, tensorrt_llm_llmapi"),
        ({}, "targets.0: required key runtime is missing"),
        (ENGINES | {"toolchain": 26.07}, "must be text (seen: 26.07); write it in quotes"),
        (ENGINES | {"devices": [[0], [0]]}, "share a GPU between instances"),
        (ENGINES | {"parallelism": {"tensor": 10**30}}, "less than or equal to 64"),
    ],
)  # fmt: skip
def test_a_wrong_target_is_one_problem(
    target: Document, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = plan(capsys, write_spec(tmp_path, LLAMA, target, {"scheme": "none"}))
    assert status == 2
    assert words in err
    assert len(err.splitlines()) == 2, err
