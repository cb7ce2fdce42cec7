"""config.pbtxt: golden files, and everything that is written can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.errors import SourceError
from enginesmith.spec import Serving
from enginesmith.spec_part import DynamicBatching, QueuePolicy
from enginesmith.triton.config import (
    LLM_INPUTS,
    LLM_OUTPUTS,
    ModelConfig,
    config_text,
    model_config,
    parse_config,
    serve_only_version,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SERVING = Serving.model_validate({})


def llm_config(serving: Serving = SERVING) -> ModelConfig:
    return model_config(
        "smollm2-135m-int4-awq",
        inputs=LLM_INPUTS,
        outputs=LLM_OUTPUTS,
        max_batch_size=serving.max_batch_size,
        dynamic_batching=serving.dynamic_batching,
        instances=serving.instances,
        parameters={"scheme": "int4_awq", "variant": "int4-awq"},
        decoupled=True,
    )


CASES = {
    "config_default": llm_config(),
    "config_no_dynamic_batching": llm_config(
        Serving.model_validate({"dynamic_batching": None, "instances": 2})
    ),
    "config_all_queue_policy_fields": llm_config(
        Serving.model_validate(
            {
                "dynamic_batching": {
                    "preferred_batch_sizes": [4, 8],
                    "max_queue_delay_us": 250,
                    "preserve_ordering": True,
                    "queue_policy": {
                        "max_queue_size": 256,
                        "default_timeout_us": 1_000_000,
                        "timeout_action": "DELAY",
                        "allow_timeout_override": True,
                    },
                }
            }
        )
    ),
    "config_published_version": serve_only_version(llm_config(), 7),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_the_golden_file(name: str) -> None:
    assert config_text(CASES[name]) == (GOLDEN / f"{name}.pbtxt").read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_golden_file_parses_to_the_same_message(name: str) -> None:
    assert parse_config((GOLDEN / f"{name}.pbtxt").read_text()) == CASES[name]


def test_max_batch_size_0_is_written_although_proto3_drops_zeros() -> None:
    config = model_config(
        "m", inputs=LLM_INPUTS, outputs=LLM_OUTPUTS, max_batch_size=0, dynamic_batching=None
    )
    text = config_text(config)
    assert text.startswith("max_batch_size: 0\n")
    assert parse_config(text) == config


def test_an_unknown_field_is_refused_with_its_place() -> None:
    with pytest.raises(SourceError, match=r'here/config.pbtxt is not .*2:1 .*no field named "nam"'):
        parse_config('backend: "python"\nnam: "x"\n', origin="here/config.pbtxt")


def test_pinning_a_version_leaves_the_original_as_it_was() -> None:
    config = llm_config()
    assert serve_only_version(serve_only_version(config, 1), 2).version_policy.specific.versions == [2]
    assert config == llm_config()


@given(
    st.dictionaries(st.text(), st.text(), max_size=4),
    st.builds(
        DynamicBatching,
        preferred_batch_sizes=st.lists(st.integers(1, 1024)).map(tuple),
        max_queue_delay_us=st.integers(0, 2**40),
        preserve_ordering=st.booleans(),
        queue_policy=st.builds(
            QueuePolicy,
            max_queue_size=st.integers(0, 2**31),
            default_timeout_us=st.integers(0, 2**40),
            timeout_action=st.sampled_from(["REJECT", "DELAY"]),
            allow_timeout_override=st.booleans(),
        ),
    ),
)
def test_any_configuration_reads_back_as_it_was_written(
    parameters: dict[str, str], batching: DynamicBatching
) -> None:
    config = model_config(
        "m",
        inputs=LLM_INPUTS,
        outputs=LLM_OUTPUTS,
        max_batch_size=1024,
        dynamic_batching=batching,
        parameters=parameters,
    )
    assert parse_config(config_text(config)) == config
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == batching.queue_policy.max_queue_size
    assert policy.default_timeout_microseconds == batching.queue_policy.default_timeout_us
    assert policy.allow_timeout_override == batching.queue_policy.allow_timeout_override
    assert policy.TimeoutAction.Name(policy.timeout_action) == batching.queue_policy.timeout_action
