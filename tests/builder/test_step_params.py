"""What is left out of a deployment's parameters decides none of its bytes: full parameters give the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmapi_package
import pytest
import trtllm_deployment
import yaml
from checkpoint_factory import tiny_checkpoint

from enginesmith.spec import ModelSpec
from enginesmith.spec_file import parse_spec
from enginesmith.step_params import deployment_params
from enginesmith.targets import LlmApiTarget, TensorRtLlmTarget
from enginesmith.triton.llmapi import package as llmapi
from enginesmith.triton.placement import contents_digest, tree_contents

Edit = tuple[str, Any]

ENGINE_ONLY: tuple[Edit, ...] = (
    ("target.gpu", "l40s"),
    ("target.opt_num_tokens", 64),
    ("target.gather_context_logits", True),
    ("target.gather_generation_logits", True),
    ("target.plugins", {"gemm_plugin": "float16", "use_fused_mlp": False}),
    ("target.kv_cache", {"tokens_per_block": 64}),
    ("target.workers", 2),
    ("target.nccl", {"debug": "INFO"}),
    ("serving.instances", 2),
    ("serving.default_max_tokens", 7),
)
NOT_OF_THE_LLM_API: tuple[Edit, ...] = (
    ("target.gpu", "l40s"),
    ("target.toolchain", "26.05"),
    ("target.name", "other"),
    ("target.nccl", {"debug": "INFO"}),
    ("serving.instances", 2),
    ("serving.dynamic_batching", {"preferred_batch_sizes": [2], "max_queue_delay_us": 1}),
    ("serving.dynamic_batching", {"preserve_ordering": True}),
    ("serving.dynamic_batching", {"queue_policy": {"default_timeout_us": 9, "timeout_action": "DELAY"}}),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("params") / "checkpoint")


def spec_with(runtime: str, edit: Edit | None) -> ModelSpec:
    parts: dict[str, dict[str, Any]] = {
        "target": {"runtime": runtime},
        "serving": {"max_batch_size": 4, "max_sequence_length": 96},
    }
    if edit is not None:
        part, _, key = edit[0].partition(".")
        parts[part][key] = edit[1]
    document = {
        "name": "tiny",
        "source": {"path": "checkpoint"},
        "variants": {"plain": {"scheme": "none"}},
        "targets": [parts["target"]],
        "serving": parts["serving"],
    }
    return parse_spec(yaml.safe_dump(document), origin="test", base_dir=Path())


def params_of(spec: ModelSpec) -> dict[str, Any]:
    (target,) = spec.targets
    assert isinstance(target, (TensorRtLlmTarget, LlmApiTarget))
    return deployment_params(spec, "plain", target)


def full_params(spec: ModelSpec) -> dict[str, Any]:
    (target,) = spec.targets
    whole = {"target": target.model_dump(mode="json"), "serving": spec.serving.model_dump(mode="json")}
    return params_of(spec) | whole


@pytest.mark.parametrize("edit", ENGINE_ONLY, ids=lambda edit: edit[0])
def test_what_only_the_engine_needs_is_not_in_the_repository(
    tmp_path: Path, checkpoint: Path, edit: Edit
) -> None:
    before, after = spec_with("tensorrt_llm", None), spec_with("tensorrt_llm", edit)
    assert before != after
    assert params_of(before) == params_of(after)
    digests = {
        contents_digest(tree_contents(trtllm_deployment.assembled(tmp_path / str(place), checkpoint, params)))
        for place, params in enumerate((params_of(before), full_params(before), full_params(after)))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("edit", NOT_OF_THE_LLM_API, ids=lambda edit: edit[0])
def test_what_the_llm_api_does_not_take_is_not_in_its_package(
    tmp_path: Path, checkpoint: Path, edit: Edit
) -> None:
    before, after = spec_with("tensorrt_llm_llmapi", None), spec_with("tensorrt_llm_llmapi", edit)
    assert before != after
    assert params_of(before) == params_of(after)
    digests = set()
    for place, params in enumerate((params_of(before), full_params(before), full_params(after))):
        context = llmapi_package.Context(tmp_path / str(place), params, {"checkpoint": checkpoint})
        llmapi.run(context)
        digests.add(contents_digest(tree_contents(context.out)))
    assert len(digests) == 1
