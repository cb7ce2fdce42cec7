"""The command line for ``trtllm-build``: accepted by a stand-in with the tool's own flag table, and nothing overridden."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_build_cases import SERVING, make_target, run_standin, write_checkpoint
from trtllm_build_standin import parser

from enginesmith.engines.tensorrt_llm.arguments import Precision, TimingCache, trtllm_build_arguments
from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget

PRECISIONS = {
    "none": Precision(),
    "int8_sq": Precision("W8A8_SQ_PER_CHANNEL"),
    "int8_wo": Precision("W8A16"),
    "int4_awq": Precision("W4A16_AWQ"),
    "int4_awq, int8 cache": Precision("W4A16_AWQ", "INT8"),
    "w4a8_awq": Precision("W4A8_AWQ"),
    "w4a8_awq, fp8 cache": Precision("W4A8_AWQ", "FP8"),
    "fp8": Precision("FP8"),
    "fp8, fp8 cache": Precision("FP8", "FP8"),
}


def arguments_of(
    target: TensorRtLlmTarget, checkpoint: Path, precision: Precision, serving: Serving = SERVING
) -> tuple[str, ...]:
    return trtllm_build_arguments(
        target,
        serving,
        checkpoint_dir=checkpoint,
        output_dir=checkpoint.parent / "engines",
        precision=precision,
        workers=target.workers,
    )


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_compiles_what_was_asked_for_without_an_override(name: str, tmp_path: Path) -> None:
    precision = PRECISIONS[name]
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint",
        tensor=2,
        quant_algo=precision.quant_algo,
        kv_cache_quant_algo=precision.kv_cache_quant_algo,
    )
    target = make_target(parallelism={"tensor": 2}, workers=2, max_num_tokens=1024)
    done = run_standin(arguments_of(target, checkpoint, precision))
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stdout.splitlines() if "[W]" in line]
    assert len(warnings) == 1, "only the one that the tool always prints"
    assert "gather_generation_logits is deprecated" in warnings[0]
    build = json.loads((tmp_path / "engines" / "config.json").read_text())["build_config"]
    assert (build["max_batch_size"], build["max_input_len"], build["max_seq_len"]) == (8, 256, 512)
    assert (build["max_num_tokens"], build["kv_cache_type"]) == (1024, "PAGED")
    plugins = build["plugin_config"]
    assert plugins["use_fp8_context_fmha"] == (precision.kv_cache_quant_algo == "FP8")
    assert plugins["use_paged_context_fmha"] == (precision.kv_cache_quant_algo != "INT8")
    assert plugins["use_fused_mlp"] == (precision.quant_algo in (None, "FP8"))


CHOICES = {
    "gpt_attention_plugin": ("auto", "float16", "bfloat16"),
    "gemm_plugin": ("auto", "float16", "bfloat16", "fp8", "disable"),
    "gemm_swiglu_plugin": ("fp8", "disable"),
    "low_latency_gemm_plugin": ("fp8", "disable"),
    "moe_plugin": ("auto", "bfloat16", "disable"),
}


@given(data=st.data())
@settings(max_examples=60)
def test_flags_parse_with_the_tools_own_table_whatever_the_target(data: st.DataObject) -> None:
    plugins = {name: data.draw(st.sampled_from(values), name) for name, values in CHOICES.items()}
    multiple = data.draw(st.booleans(), "multiple_profiles")
    target = make_target(
        parallelism={
            "tensor": data.draw(st.sampled_from((1, 2, 4))),
            "pipeline": data.draw(st.integers(1, 3)),
        },
        plugins={**plugins, "multiple_profiles": multiple},
        opt_num_tokens=None if multiple else data.draw(st.none() | st.integers(1, 20000)),
        max_num_tokens=data.draw(st.integers(16, 40000)),
        max_beam_width=data.draw(st.integers(1, 4)),
        logits_dtype=data.draw(st.sampled_from(("float16", "float32"))),
        gather_context_logits=data.draw(st.booleans()),
        gather_generation_logits=data.draw(st.booleans()),
        kv_cache={"tokens_per_block": data.draw(st.sampled_from((16, 32, 64, 128)))},
        workers=data.draw(st.integers(1, 8)),
    )
    precision = data.draw(st.sampled_from(list(PRECISIONS.values())))
    serving = Serving(
        max_batch_size=data.draw(st.integers(1, 64)), dynamic_batching=None, max_sequence_length=256
    )
    arguments = trtllm_build_arguments(
        target,
        serving,
        checkpoint_dir=Path("/in"),
        output_dir=Path("/out"),
        precision=precision,
        workers=target.workers,
        timing_cache=TimingCache(Path("/kept"), Path("/fresh")),
    )
    parsed = parser().parse_args(arguments)
    assert parsed.max_num_tokens <= max(serving.max_batch_size * 256, target.kv_cache.tokens_per_block)
    assert parsed.opt_num_tokens is None or parsed.opt_num_tokens <= parsed.max_num_tokens
    assert parsed.workers <= target.parallelism.world_size
    assert (parsed.input_timing_cache, parsed.output_timing_cache) == ("/kept", "/fresh")
    assert parsed.gather_context_logits == target.gather_context_logits


def test_without_earlier_timings_none_are_read() -> None:
    arguments = trtllm_build_arguments(
        make_target(),
        SERVING,
        checkpoint_dir=Path("/in"),
        output_dir=Path("/out"),
        precision=Precision(),
        timing_cache=TimingCache(None, Path("/fresh")),
    )
    assert "--input_timing_cache" not in arguments
    assert arguments[arguments.index("--output_timing_cache") + 1] == "/fresh"


def test_paths_stay_one_argument(tmp_path: Path) -> None:
    hostile = tmp_path / "a b; $(c) 'd'"
    arguments = arguments_of(make_target(), hostile, Precision())
    assert arguments[arguments.index("--checkpoint_dir") + 1] == str(hostile)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max_output_len", "5"], "unrecognized arguments: --max_output_len 5"),
        (["--gemm_plugin", "int8"], "argument --gemm_plugin: invalid choice"),
        (["--use_fused_mlp"], "expected one argument"),
        (["--use_paged_context_fmha", "true"], "invalid choice"),
        (["--kv_cache_type", "block"], "invalid parse_enum value"),
        (["--logits_dtype", "bfloat16"], "invalid choice"),
        (["--max_batch_size", "many"], "invalid int value"),
        (["--multiple_profiles", "enable", "--opt_num_tokens", "8"], "while opt_num_tokens is set"),
        (["--streamingllm", "enable"], "no longer supported"),
        (["--pp_reduce_scatter", "enable"], "only supported in the mixtral model"),
        (["--gather_context_logits", "--max_draft_len", "2"], "not support with draft len"),
        (["--gemm_swiglu_plugin", "fp8", "--use_fused_mlp", "disable"], "requires --use_fused_mlp"),
    ],
)
def test_standin_refuses_what_the_tool_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    places = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "engines")]
    done = run_standin([*places, *arguments])
    assert done.returncode != 0
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--user_buffer", "enable"], "Overriding user_buffer"),
        (["--reduce_fusion", "enable"], "Overriding reduce_fusion"),
        (["--norm_quant_fusion", "enable"], "Overriding norm_quant_fusion"),
        ([], "Overriding use_fp8_context_fmha"),
        (["--paged_kv_cache", "enable"], "paged_kv_cache is deprecated"),
    ],
)
def test_standin_overrides_what_the_tool_overrides(arguments: list[str], words: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    done = run_standin(
        ["--checkpoint_dir", str(checkpoint), "--output_dir", str(tmp_path / "engines"), *arguments]
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_blackwell_refuses_integer_schemes_as_the_table_of_platforms_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from enginesmith.platforms import GPUS, execution_on
    from enginesmith.schemes import SCHEMES

    for sm, (name, scheme) in itertools.product((90, 100), SCHEMES.items()):
        monkeypatch.setenv("STANDIN_SM", str(sm))
        checkpoint = write_checkpoint(tmp_path / f"{name}-{sm}", quant_algo=scheme.quant_algo)
        done = run_standin(arguments_of(make_target(), checkpoint, Precision(scheme.quant_algo)))
        gpu = GPUS["b200" if sm == 100 else "h100"]
        assert (done.returncode == 0) == (name in execution_on("tensorrt_llm", gpu).schemes), (sm, name)
