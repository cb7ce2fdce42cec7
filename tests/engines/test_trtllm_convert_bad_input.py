"""What cannot be converted ends in one error that names the cause, before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_factory import split_into_shards
from safetensors.torch import load_file, save_file
from trtllm_shards import Geometry, describe, random_checkpoint

from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.errors import EnginesmithError, OperatorError, SourceError, SpecError

ONE_RANK = Mapping()
DENSE = Geometry(layers=2, heads=12, kv_heads=4, head_dim=8, hidden=48, ffn=36)
MIXTRAL = replace(DENSE, architecture="MixtralForCausalLM", experts=6, ffn=48)
AWQ = replace(DENSE, hidden=96, heads=12, ffn=96, algorithm="W4A16_AWQ", group_size=16)
SQ = replace(DENSE, algorithm="W8A8_SQ_PER_CHANNEL")


def refused(source: Path, mapping: Mapping = ONE_RANK) -> EnginesmithError:
    """The error of a conversion that must not leave a trace."""
    out = source.parent / "out"
    with pytest.raises(EnginesmithError) as caught:
        convert_checkpoint(source, out, mapping=mapping)
    assert not out.exists(), "something was written"
    return caught.value


def change(source: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the tensors of a checkpoint."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize(
    ("geometry", "mapping", "message", "hint"),
    [
        (DENSE, Mapping(5), "5 does not divide the model's 12 attention heads", "1, 2, 4, 12"),
        (DENSE, Mapping(3), "3 neither divides nor is a multiple of the model's 4 KV heads", "1, 2, 4, 12"),
        (replace(DENSE, ffn=30), Mapping(4), "4 does not divide the model's intermediate size 30", "1, 2"),
        (AWQ, Mapping(4), "width 96 into parts of 24 columns, which is no multiple of the 16", "1, 2"),
        (
            replace(AWQ, hidden=88),
            Mapping(),
            "group size 16 does not divide the model's hidden size 88",
            "none",
        ),
        (DENSE, Mapping(1, 3), "3 is more than the model's 2 layers", "at most 2"),
        (DENSE, Mapping(2, 1, 2), "LlamaForCausalLM, which has no experts", "leave it at 1"),
        (MIXTRAL, Mapping(4, 1, 4), "4 does not divide the model's 6 experts", "1, 2"),
        (
            replace(MIXTRAL, ffn=46),
            Mapping(4),
            "4 does not divide the model's experts' intermediate size 46",
            "fits: 2",
        ),
    ],
)
def test_a_mapping_that_does_not_divide_the_model(
    tmp_path: Path, geometry: Geometry, mapping: Mapping, message: str, hint: str
) -> None:
    error = refused(random_checkpoint(tmp_path / "source", geometry), mapping)
    assert isinstance(error, SpecError)
    assert message in error.message
    assert error.hint is not None
    assert hint in error.hint


def test_degrees_that_are_no_counts_or_do_not_nest() -> None:
    with pytest.raises(SpecError, match="expert parallelism 3 does not divide tensor parallelism 4"):
        Mapping(4, 1, 3)
    with pytest.raises(SpecError, match="pipeline must be a whole number of at least 1, seen: 0"):
        Mapping(1, 0)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """An edit that removes a tensor."""
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    """An edit that sets a tensor."""
    return lambda tensors: tensors.update({name: tensor})


LAYER = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("geometry", "edit", "message"),
    [
        (DENSE, drop(f"{LAYER}.k_proj.weight"), f"has no tensor {LAYER}.k_proj.weight"),
        (DENSE, drop("model.norm.weight"), "has no tensor model.norm.weight"),
        (
            DENSE,
            put("model.layers.2.x.weight", torch.ones(2)),
            "model.safetensors holds tensor model.layers.2.x.weight",
        ),
        (DENSE, put(f"{LAYER}.q_proj.bias", torch.ones(96)), f"holds tensor {LAYER}.q_proj.bias"),
        (DENSE, put(f"{LAYER}.q_proj.weight", torch.ones(8, 48)), f"{LAYER}.q_proj.weight has shape [8, 48]"),
        (
            DENSE,
            put("model.norm.weight", torch.ones(47)),
            "model.norm.weight has shape [47], config.json implies [48]",
        ),
        (SQ, drop(f"{LAYER}.o_proj.weight_scale"), f"has no tensor '{LAYER}.o_proj.weight_scale'"),
        (SQ, drop(f"{LAYER}.k_proj.input_scale"), f"has no tensor '{LAYER}.k_proj.input_scale'"),
        (
            SQ,
            put(f"{LAYER}.o_proj.weight_scale", torch.ones(9)),
            f"{LAYER}.o_proj.weight_scale has shape [9]",
        ),
        (
            SQ,
            put(f"{LAYER}.o_proj.input_scale", torch.tensor(float("nan"))),
            "one finite number above 0, seen: nan",
        ),
        (SQ, put(f"{LAYER}.o_proj.input_scale", torch.tensor(0.0)), "one finite number above 0, seen: 0.0"),
        (SQ, drop(f"{LAYER}.k_proj.pre_quant_scale"), "only one of them has a pre_quant_scale"),
        (SQ, put(f"{LAYER}.k_proj.pre_quant_scale", torch.ones(48)), "with one vector"),
        (
            DENSE,
            put(f"{LAYER}.q_proj.weight", torch.ones(96, 48, dtype=torch.int8)),
            "nothing says how it was quantized",
        ),
        (
            SQ,
            put(f"{LAYER}.q_proj.weight", torch.ones(96, 48).to(torch.float8_e4m3fn)),
            "W8A8_SQ_PER_CHANNEL stores I8",
        ),
        (SQ, put(f"{LAYER}.k_proj.k_scale", torch.tensor(1.0)), "gives no kv_cache_quant_algo"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, geometry: Geometry, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    source = random_checkpoint(tmp_path / "source", geometry)
    change(source, edit)
    error = refused(source)
    assert isinstance(error, SourceError)
    assert message in error.message


def test_a_misshapen_tensor_is_named_with_its_shard(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", DENSE)
    change(source, put("model.norm.weight", torch.ones(47)))
    split_into_shards(source, 3)
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map["model.norm.weight"] in refused(source).message


def test_an_excluded_layer_that_is_quantized(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", SQ)
    describe(source, "W8A8_SQ_PER_CHANNEL", exclude_modules=["lm_head", "model.layers.1*"])
    message = refused(source).message
    assert "model.safetensors: model.layers.1.self_attn.q_proj is quantized (I8)" in message
    assert "hf_quant_config.json excludes it ('model.layers.1*')" in message


def test_a_plain_layer_that_is_not_excluded(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", SQ)

    def leave_plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.mlp.down_proj.")]:
            del tensors[name]
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(48, 36).to(torch.bfloat16)

    change(source, leave_plain)
    message = refused(source).message
    assert "model.safetensors: model.layers.0.mlp.down_proj is stored as BF16, not quantized" in message
    assert "does not exclude it" in message


def test_a_part_of_a_fused_layer_that_is_excluded(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", SQ)

    def leave_plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.self_attn.q_proj.")]:
            del tensors[name]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(96, 48).to(torch.bfloat16)

    change(source, leave_plain)
    describe(source, "W8A8_SQ_PER_CHANNEL", exclude_modules=["lm_head", "*.0.self_attn.q_proj"])
    message = refused(source).message
    assert (
        "fuses model.layers.0.self_attn.q_proj and model.layers.0.self_attn.k_proj into one layer" in message
    )


@pytest.mark.parametrize("algorithm", ["FP8_PB_WO", "NVFP4", "MIXED_PRECISION", "W4A16"])
def test_an_algorithm_without_engines_names_the_runtime_that_has_it(tmp_path: Path, algorithm: str) -> None:
    source = random_checkpoint(tmp_path / "source", DENSE)
    describe(source, algorithm)
    error = refused(source)
    assert f"quant_algo {algorithm} cannot become a TensorRT-LLM engine" in error.message
    assert error.hint is not None
    assert "tensorrt_llm_llmapi" in error.hint


def test_two_descriptions_that_disagree(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", SQ, quantization_config={"quant_algo": "FP8"})
    assert "hf_quant_config.json says W8A8_SQ_PER_CHANNEL, config.json says FP8" in refused(source).message


def test_a_checkpoint_that_another_tool_quantized(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", DENSE, quantization_config={"quant_method": "gptq"})
    assert "quantized by 'gptq'; only ModelOpt's checkpoints are read" in refused(source).message


@pytest.mark.parametrize(
    ("geometry", "keys", "message"),
    [
        (DENSE, {"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        (
            DENSE,
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "RoPE scaling 'yarn' is not supported",
        ),
        (DENSE, {"rope_parameters": {"rope_type": "linear"}}, "RoPE scaling 'linear' lacks the key 'factor'"),
        (
            DENSE,
            {"architectures": ["DeepseekV3ForCausalLM"]},
            "DeepseekV3ForCausalLM, which is not supported",
        ),
        (
            replace(DENSE, architecture="Qwen3ForCausalLM"),
            {"attention_bias": True},
            "no projection biases in Qwen3",
        ),
        (
            replace(MIXTRAL, architecture="Qwen3MoeForCausalLM"),
            {"mlp_only_layers": [0]},
            "has experts in every layer",
        ),
    ],
)
def test_a_config_that_engines_cannot_express(
    tmp_path: Path, geometry: Geometry, keys: dict[str, Any], message: str
) -> None:
    assert message in refused(random_checkpoint(tmp_path / "source", geometry, **keys)).message


def test_a_weight_that_the_models_dtype_cannot_hold(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", DENSE)

    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float16)
        tensors["model.norm.weight"] = torch.full((48,), 1e6)

    change(source, overflow)
    out = tmp_path / "out"
    with pytest.raises(SourceError, match=r"model\.norm\.weight reaches 1e\+06, more than F16 can hold"):
        convert_checkpoint(source, out, mapping=Mapping())
    assert list(out.iterdir()) == []


def test_an_output_directory_that_holds_a_checkpoint(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", DENSE)
    convert_checkpoint(source, tmp_path / "out", mapping=Mapping())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OperatorError, match="holds a checkpoint already"):
        convert_checkpoint(source, tmp_path / "out", mapping=Mapping(2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
