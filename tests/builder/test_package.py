"""The package step: what it writes, what it links, what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from enginesmith.errors import GateError, SourceError, SpecError
from enginesmith.legality import check_targets
from enginesmith.spec import ModelSpec, Serving
from enginesmith.targets import KvCacheMemory
from enginesmith.triton.config import parse_config
from enginesmith.triton.package import run


@dataclass
class Context:
    """A step's context without a build."""

    root: Path
    params: dict[str, Any]
    inputs: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("engine", "verdict", "checkpoint"):
            self.inputs[name] = self.root / name
            self.inputs[name].mkdir()
        self.out.mkdir()
        self.scratch.mkdir()

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def progress(self, fraction: float | None, note: str = "") -> None:
        pass


@pytest.fixture
def context(tmp_path: Path) -> Context:
    serving = Serving.model_validate(
        {"max_batch_size": 4, "max_sequence_length": 64, "default_max_tokens": 9}
    )
    params = {
        "model_name": "tiny-int8",
        "variant": "int8",
        "scheme": "int8_wo",
        "serving": serving.model_dump(mode="json"),
        "threads": 2,
        "kv_cache": KvCacheMemory().model_dump(mode="json"),
        "prefill_chunk_tokens": 128,
        "batch_invariant": True,
    }
    made = Context(tmp_path, params)
    for name in ("model.onnx", "exact.onnx", "weights.bin"):
        (made.inputs["engine"] / name).write_text(name)
    (made.inputs["engine"] / "engine.json").write_text('{"layers": 3, "kv_heads": 2, "head_dim": 8}')
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (made.inputs["checkpoint"] / name).write_text(name)
    (made.inputs["checkpoint"] / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    verdict(made, passed=True)
    return made


def verdict(context: Context, *, passed: bool) -> None:
    checks = [{"name": "quality.min_top1_agreement", "measured": 0.5, "limit": 0.6, "passed": passed}]
    (context.inputs["verdict"] / "verdict.json").write_text(json.dumps({"passed": passed, "checks": checks}))


def test_the_package_is_a_complete_model_directory(context: Context) -> None:
    facts = run(context)
    model = context.out / "tiny-int8"
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    runtime = {file for file in files if file.endswith(".py")}
    assert files - runtime == {
        "config.pbtxt",
        *(f"1/{name}" for name in ("model.onnx", "weights.bin", "engine.json", "serving.json")),
        *(f"1/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
    }
    assert {"1/model.py", "1/llm_runtime.py"} <= runtime
    assert "1/__init__.py" not in runtime
    assert json.loads((model / "1/serving.json").read_text()) == {
        "max_sequence_length": 64,
        "max_prompt_length": 63,
        "default_max_tokens": 9,
        "max_batch_size": 4,
        "threads": 2,
        "max_queue_size": 0,
        "queue_timeout_us": 0,
        "prefill_chunk_tokens": 128,
        "batch_invariant": True,
        "kv_cache": {"reuse": True, "reuse_tokens": 4096, "tokens_per_block": 32},
    }
    config = parse_config((model / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny-int8", "python", 4)
    assert config.model_transaction_policy.decoupled
    assert config.parameters["scheme"].string_value == "int8_wo"
    assert facts["model_name"] == "tiny-int8"
    assert facts["package_bytes"] == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())


def test_weights_are_linked_and_not_copied(context: Context) -> None:
    run(context)
    assert (context.out / "tiny-int8/1/weights.bin").samefile(context.inputs["engine"] / "weights.bin")


def test_a_failed_verdict_is_refused_and_names_the_broken_check(context: Context) -> None:
    verdict(context, passed=False)
    with pytest.raises(GateError, match=r"did not pass .*quality\.min_top1_agreement"):
        run(context)
    assert not any(context.out.iterdir())


def test_a_missing_verdict_is_refused(context: Context) -> None:
    (context.inputs["verdict"] / "verdict.json").unlink()
    with pytest.raises(GateError, match="no verdict"):
        run(context)


def test_a_sequence_length_beyond_the_models_positions_is_refused(context: Context) -> None:
    (context.inputs["checkpoint"] / "config.json").write_text(json.dumps({"max_position_embeddings": 63}))
    with pytest.raises(SpecError, match="max_sequence_length is 64, but the model knows only 63"):
        run(context)


def test_a_checkpoint_without_a_tokenizer_is_refused(context: Context) -> None:
    (context.inputs["checkpoint"] / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer\.json is missing"):
        run(context)


def test_limits_of_the_queue_go_to_the_model_and_not_to_triton(context: Context) -> None:
    """The model takes every request at once, so that Triton's own queue is always empty."""
    policy = {"max_queue_size": 7, "default_timeout_us": 2_000_000}
    context.params["serving"]["dynamic_batching"] = {"max_queue_delay_us": 9000, "queue_policy": policy}
    run(context)
    model = context.out / "tiny-int8"
    limits = json.loads((model / "1/serving.json").read_text())
    assert (limits["max_queue_size"], limits["queue_timeout_us"]) == (7, 2_000_000)
    batching = parse_config((model / "config.pbtxt").read_text()).dynamic_batching
    assert batching.max_queue_delay_microseconds == 0
    assert not batching.HasField("default_queue_policy")


@pytest.mark.parametrize(
    ("kv_cache", "tokens"),
    [
        ({}, 4 * 64 + 4096),
        ({"reuse": False}, 4 * 64),
        ({"reuse_tokens": 100, "tokens_per_block": 32}, 4 * 64 + 96),
    ],
    ids=["default", "no reuse", "whole blocks only"],
)
def test_key_value_memory_is_the_slots_and_what_is_kept_for_reuse(
    context: Context, kv_cache: dict[str, Any], tokens: int
) -> None:
    context.params["kv_cache"] = kv_cache | {
        name: value for name, value in KvCacheMemory().model_dump(mode="json").items() if name not in kv_cache
    }
    assert run(context)["kv_cache_bytes"] == tokens * 3 * 2 * 2 * 8 * 4


def test_more_key_value_memory_than_the_spec_allows_is_refused_with_its_parts(context: Context) -> None:
    context.params["kv_cache"] |= {"max_bytes": 384 * 1000}
    with pytest.raises(
        SpecError,
        match=r"takes 1671168 bytes, but kv_cache\.max_bytes is 384000: 384 bytes for each of 256 tokens \(max_batch_size 4 x "
        r"max_sequence_length 64\) and 4096 tokens to reuse(?s:.*)it holds 1000 tokens",
    ):
        run(context)
    assert not any(context.out.iterdir())


def test_plan_refuses_key_value_memory_that_the_checkpoint_would_exceed() -> None:
    document = {
        "name": "tiny",
        "source": {"path": "."},
        "variants": {"bf16": {"scheme": "none"}},
        "targets": [
            {"runtime": "onnxruntime", "kv_cache": {"reuse": False, "max_bytes": 16 * 1024 * 384 - 1}}
        ],
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    config = {
        **sizes,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "architectures": ["LlamaForCausalLM"],
    }
    with pytest.raises(SpecError, match=r"takes 6291456 bytes, but kv_cache\.max_bytes is 6291455"):
        check_targets(ModelSpec.model_validate(document), config)
    document["targets"] = [
        {"runtime": "onnxruntime", "kv_cache": {"reuse": False, "max_bytes": 16 * 1024 * 384}}
    ]
    check_targets(ModelSpec.model_validate(document), config)
