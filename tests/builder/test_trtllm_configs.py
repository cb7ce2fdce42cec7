"""The configurations of a TensorRT-LLM deployment: golden files, and that the parts fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enginesmith.errors import SourceError
from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget
from enginesmith.triton.config import config_text, parse_config
from enginesmith.triton.trtllm.configs import PARTS, Deployment, deployment_configs
from enginesmith.triton.trtllm.wiring import wiring_problems

GOLDEN = Path(__file__).parents[1] / "golden" / "trtllm"
SPECS: dict[str, dict[str, Any]] = {
    "single_gpu": {"target": {}, "serving": {}},
    "tp2_twice": {
        "target": {
            "parallelism": {"tensor": 2},
            "launch": "orchestrator",
            "devices": [[0, 1], [2, 3]],
            "scheduler_policy": "max_utilization",
            "kv_cache": {
                "free_gpu_fraction": 0.85,
                "max_tokens": 65536,
                "reuse": False,
                "host_memory_bytes": 1073741824,
            },
            "chunked_context": False,
            "max_beam_width": 2,
            "logits_dtype": "float16",
            "cancellation_check_period_ms": 50,
            "model_prefix": "llama-fp8-",
            "preprocessing_instances": 2,
            "postprocessing_instances": 3,
            "bls_instances": 20,
            "accumulate_tokens": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        },
        "serving": {
            "max_batch_size": 64,
            "dynamic_batching": {
                "max_queue_delay_us": 100,
                "queue_policy": {"max_queue_size": 256, "default_timeout_us": 5000000},
            },
            "max_sequence_length": 4096,
        },
    },
}


def deployment(target: dict[str, Any], serving: dict[str, Any] | None = None, **fields: Any) -> Deployment:
    made = TensorRtLlmTarget.model_validate_json(
        TensorRtLlmTarget.model_validate(
            {"runtime": "tensorrt_llm", **target}, strict=False
        ).model_dump_json()
    )
    return Deployment(
        made, Serving.model_validate(serving or {}, strict=False), **{"model_dtype": "bfloat16", **fields}
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("spec", SPECS)
def test_configs_equal_their_golden_files(spec: str, part: str) -> None:
    config = deployment_configs(deployment(**SPECS[spec]))[part]
    golden = (GOLDEN / f"{spec}_{part}.pbtxt").read_text()
    assert config_text(config) == golden
    assert parse_config(golden) == config


@pytest.mark.parametrize("spec", SPECS)
def test_the_models_fit_together(spec: str) -> None:
    configs = deployment_configs(deployment(**SPECS[spec]))
    assert wiring_problems({config.name: config for config in configs.values()}) == []


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        (
            "preprocessing",
            lambda c: setattr(c.input[0], "data_type", 6),
            "text_input is TYPE_STRING of ensemble, but",
        ),
        (
            "preprocessing",
            lambda c: c.input.add(name="MORE", data_type=8),
            "preprocessing needs MORE and gets none",
        ),
        ("postprocessing", lambda c: c.output.pop(), "postprocessing has no output OUTPUT"),
        ("postprocessing", lambda c: setattr(c, "name", "p"), "the model postprocessing, which is not in"),
        (
            "ensemble",
            lambda c: c.output.add(name="more", data_type=8),
            "output more is TYPE_INT32, nothing gives it",
        ),
        (
            "ensemble",
            lambda c: c.input.pop(0),
            "nothing gives text_input, which preprocessing takes as QUERY",
        ),
    ],
)
def test_what_does_not_fit_is_named(part: str, change: Callable[[Any], Any], problem: str) -> None:
    configs = deployment_configs(deployment({}))
    change(configs[part])
    assert problem in "; ".join(wiring_problems({config.name: config for config in configs.values()}))


@pytest.mark.parametrize("part", PARTS)
def test_no_tensor_is_listed_twice(part: str) -> None:
    config = deployment_configs(deployment({}))[part]
    for tensors in (config.input, config.output):
        names = [tensor.name for tensor in tensors]
        assert len(names) == len(set(names))


def test_bls_takes_and_gives_what_the_ensemble_does() -> None:
    configs = deployment_configs(deployment({}))
    ensemble, bls = configs["ensemble"], configs["tensorrt_llm_bls"]
    assert {(t.name, t.data_type) for t in ensemble.input} <= {(t.name, t.data_type) for t in bls.input}
    assert list(ensemble.output) == list(bls.output)


def test_the_backend_gets_the_parameters_that_it_refuses_to_load_without() -> None:
    parameters = deployment_configs(deployment({}))["tensorrt_llm"].parameters
    for name in (
        "gpt_model_type",
        "tokenizer_dir",
        "guided_decoding_backend",
        "xgrammar_tokenizer_info_path",
    ):
        assert name in parameters
    # An empty string would be taken for a directory of adapters.
    assert "lora_prefetch_dir" not in parameters


def test_paths_are_those_of_the_repository_inside_the_container() -> None:
    configs = deployment_configs(deployment({"model_prefix": "m-"}, repository_path="/srv/triton/"))
    assert configs["tensorrt_llm"].parameters["gpt_model_path"].string_value == "/srv/triton/m-tensorrt_llm/1"
    assert (
        configs["preprocessing"].parameters["tokenizer_dir"].string_value == "/srv/triton/m-preprocessing/1"
    )


def test_without_streaming_no_model_is_decoupled() -> None:
    configs = deployment_configs(deployment({"streaming": False}))
    assert not any(config.model_transaction_policy.decoupled for config in configs.values())


def test_a_dtype_without_engines_is_refused() -> None:
    with pytest.raises(SourceError, match="dtype 'int7'"):
        deployment_configs(deployment({}, model_dtype="int7"))
