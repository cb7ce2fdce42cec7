"""The LLM API package: its configuration, model.yaml, files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmapi_package import Context, params

from enginesmith.errors import GateError, SourceError, SpecError
from enginesmith.spec import Serving
from enginesmith.targets import LlmApiTarget
from enginesmith.triton.config import config_text, parse_config
from enginesmith.triton.launch import read_deployments
from enginesmith.triton.llmapi.config import LLMAPI_INPUTS, LLMAPI_OUTPUTS, llmapi_config
from enginesmith.triton.llmapi.options import (
    DERIVED_KV_CACHE_OPTIONS,
    DERIVED_OPTIONS,
    KV_CACHE_OPTIONS,
    LLM_OPTIONS,
    REFUSED_OPTIONS,
    check_options,
    model_yaml,
)
from enginesmith.triton.llmapi.package import run

GOLDEN = Path(__file__).parent.parent / "golden" / "llmapi"
TARGETS: dict[str, dict[str, Any]] = {
    "single": {},
    "instances": {
        "parallelism": {"tensor": 2},
        "devices": [[0, 1], [2, 3]],
        "model_prefix": "llama-",
        "streaming": False,
        "kv_cache": {"max_tokens": 65536, "reuse": False, "host_memory_bytes": 1 << 30, "tokens_per_block": 64},
        "cancellation_check_period_ms": 20,
        "llm_options": {
            "cuda_graph_config": {"enable_padding": True},
            "kv_cache_config": {"enable_partial_reuse": False},
        },
    },
    "experts": {"parallelism": {"tensor": 16, "expert": 8}, "chunked_context": False},
}  # fmt: skip


def target(name: str) -> LlmApiTarget:
    return LlmApiTarget.model_validate({"runtime": "tensorrt_llm_llmapi", **TARGETS[name]})


def checkpoint(directory: Path, quantization: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 96}))
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (directory / name).write_text(name)
    if quantization is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return directory


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "step", params(), {"checkpoint": checkpoint(tmp_path / "checkpoint")})


@pytest.mark.parametrize("name", TARGETS)
def test_the_configuration_is_the_golden_one_and_parses(name: str) -> None:
    config = llmapi_config(target(name), variant="bf16", scheme="none")
    text = config_text(config)
    assert text == (GOLDEN / f"{name}.pbtxt").read_text()
    assert parse_config(text) == config


@pytest.mark.parametrize("name", TARGETS)
def test_model_yaml_is_the_golden_one(name: str, tmp_path: Path) -> None:
    document = model_yaml(target(name), Serving(), tmp_path)
    assert yaml.safe_dump(document, sort_keys=False) == (GOLDEN / f"{name}.yaml").read_text()
    assert document.keys() - {"triton_config"} <= LLM_OPTIONS
    assert document["kv_cache_config"].keys() <= KV_CACHE_OPTIONS


def test_the_policy_is_written_for_servers_that_complete_nothing() -> None:
    """With --disable-auto-complete-config Triton never reads model.yaml; then only config.pbtxt counts."""
    text = config_text(llmapi_config(target("single"), variant="v", scheme="none"))
    assert "decoupled: true" in text
    assert "max_batch_size: 0" in text


def test_every_tensor_has_a_name_of_its_own() -> None:
    names = [tensor.name for tensor in (*LLMAPI_INPUTS, *LLMAPI_OUTPUTS)]
    assert len(set(names)) == len(names) == 33
    assert [tensor.name for tensor in LLMAPI_INPUTS if not tensor.optional] == ["text_input"]


def test_the_tables_of_options_agree_with_each_other() -> None:
    assert DERIVED_OPTIONS.keys() | REFUSED_OPTIONS.keys() <= LLM_OPTIONS
    assert not DERIVED_OPTIONS.keys() & REFUSED_OPTIONS.keys()
    assert DERIVED_KV_CACHE_OPTIONS.keys() <= KV_CACHE_OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph_confg": {}}, r"(?s)llm_options\.cuda_graph_confg is not an argument.*did you mean cuda_graph_config"),
        ({"tensor_parallel_size": 2}, r"decided by the spec: parallelism\.tensor"),
        ({"max_seq_len": 2}, r"decided by the spec: serving\.max_sequence_length"),
        ({"trust_remote_code": True}, r"trust_remote_code cannot be set: .*code of its own"),
        ({"kv_cache_config": {"dtype": "fp8"}}, r"kv_cache_config\.dtype is decided by the spec"),
        ({"kv_cache_config": {"use_uvn": True}}, r"(?s)use_uvn is not an argument of KvCacheConfig.*did you mean use_uvm"),
        ({"kv_cache_config": 0.9}, r"must be a mapping, seen: float"),
        ({"zzz": 1}, r"(?s)zzz is not an argument.*allowed: .*stream_interval"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_with_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_options(options)


def test_an_fp8_kv_cache_in_the_checkpoint_is_asked_for(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    assert model_yaml(target("single"), Serving(), made)["kv_cache_config"]["dtype"] == "fp8"


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, "cannot run W8A8_SQ_PER_CHANNEL"),
        ({"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "INT8"}, "KV cache of type INT8"),
    ],
)
def test_what_the_pytorch_backend_cannot_run_is_refused(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        model_yaml(target("single"), Serving(), checkpoint(tmp_path, quantization))


def test_the_package_is_a_complete_model_directory(context: Context) -> None:
    facts = run(context)
    model = context.out / "tensorrt_llm"
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    runtime = {
        f"1/{name}.py" for name in ("model", "llm_engine", "llm_requests", "llm_settings", "llm_stream")
    }
    placed = {f"1/checkpoint/{path.name}" for path in context.inputs["checkpoint"].iterdir()}
    assert files == runtime | placed | {"config.pbtxt", "1/model.yaml", "1/launch.json"}
    assert facts["triton_model"] == "tensorrt_llm"
    assert facts["package_bytes"] == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    (deployment,) = read_deployments(context.out)
    assert deployment.model == "tensorrt_llm"


def test_the_weights_are_linked_and_not_copied(context: Context) -> None:
    run(context)
    placed = context.out / "tensorrt_llm/1/checkpoint/model.safetensors"
    assert placed.samefile(context.inputs["checkpoint"] / "model.safetensors")


def test_a_failed_verdict_is_refused(context: Context, tmp_path: Path) -> None:
    context.inputs["verdict"] = tmp_path
    (tmp_path / "verdict.json").write_text(
        '{"passed": false, "checks": [{"name": "quality.x", "passed": false}]}'
    )
    with pytest.raises(GateError, match=r"broken: quality\.x"):
        run(context)
    assert not any(context.out.iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_refused(context: Context, name: str) -> None:
    (context.inputs["checkpoint"] / name).unlink()
    with pytest.raises(SourceError, match=f"{name.replace('model.', '')} missing"):
        run(context)


def test_more_positions_than_the_model_has_are_refused(context: Context) -> None:
    context.params = params(serving={"max_sequence_length": 97})
    with pytest.raises(SpecError, match="max_sequence_length is 97, but the model knows only 96"):
        run(context)
