"""Quantized checkpoints: integers stay the source's, scales mean the same, and what cannot be exact is bounded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trtllm_shards import Geometry, describe, equal, gathered, load_ranks, random_checkpoint

from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.engines.tensorrt_llm.recoding import rescaled_fp8
from enginesmith.errors import SourceError, SpecError

ONE_RANK = Mapping()
DENSE = Geometry(layers=3, heads=4, kv_heads=2, head_dim=8, hidden=64, ffn=32)
MIXTRAL = replace(DENSE, architecture="MixtralForCausalLM", experts=4)
QWEN2_MOE = replace(DENSE, architecture="Qwen2MoeForCausalLM", experts=4, shared_ffn=64)
MODELS = {"llama": DENSE, "mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
ALGORITHMS = ("W8A16", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "FP8")
MAPPINGS = {"tp1": Mapping(), "tp4": Mapping(4), "tp2_pp2": Mapping(2, 2)}
LINEAR = ("_proj", ".w1", ".w2", ".w3")
COMBINATIONS = [
    (model, algorithm, smoothing)
    for model in MODELS
    for algorithm in ALGORITHMS
    for smoothing in (True, False)  # Only AWQ folds smoothing into norms.
    if (smoothing or algorithm.endswith("AWQ"))
    and (model == "llama" or algorithm not in ("W8A8_SQ_PER_CHANNEL", "W4A8_AWQ"))
]


def converted(source: Path, tmp_path: Path, mapping: Mapping = ONE_RANK) -> Path:
    """The TensorRT-LLM checkpoint of ``source``."""
    convert_checkpoint(source, tmp_path / "out", mapping=mapping, workers=2)
    return tmp_path / "out"


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("model", "algorithm", "smoothing"), COMBINATIONS)
def test_every_layer_dequantizes_to_the_source(
    tmp_path: Path, model: str, algorithm: str, mapping: str, smoothing: bool
) -> None:
    geometry = replace(MODELS[model], algorithm=algorithm, smoothing=smoothing)
    source = random_checkpoint(tmp_path / "source", geometry)
    tensors = load_file(source / "model.safetensors")
    chosen = Mapping(4, 1, 2) if mapping == "tp4" and geometry.experts else MAPPINGS[mapping]
    found = gathered(converted(source, tmp_path, chosen), geometry)
    layers = [name.removesuffix(".weight") for name in tensors if is_linear(name)]
    assert len(layers) >= 7 * geometry.layers
    for layer in layers:
        check_layer(layer, found, tensors, algorithm)


def is_linear(name: str) -> bool:
    """Whether ``name`` is the weight of a layer that a scheme quantizes."""
    return name.endswith(".weight") and name.removesuffix(".weight").endswith(LINEAR)


def check_layer(layer: str, found: Any, source: Any, algorithm: str) -> None:
    """Codes are the source's, and the scales beside them."""
    weight = found[f"{layer}.weight"]
    scale = source[f"{layer}.weight_scale"]
    if algorithm == "W8A16":
        exact = source[f"{layer}.weight"].float() * scale[:, None]
        assert equal(weight, exact.to(torch.bfloat16))
        return
    if algorithm == "FP8":
        # One scale for what is fused: the nearest code under the largest of the scales.
        shared = found[f"{layer}.weights_scaling_factor"].reshape(())
        assert shared >= scale
        meant = source[f"{layer}.weight"].float() * scale
        assert equal(weight, (meant / shared).to(torch.float8_e4m3fn))
    else:
        assert equal(weight, source[f"{layer}.weight"].view(torch.int8))
        assert equal(found[f"{layer}.weights_scaling_factor"], scale)
        vector = source.get(f"{layer}.pre_quant_scale", torch.ones(weight.shape[1], dtype=torch.bfloat16))
        assert equal(found[f"{layer}.prequant_scaling_factor"], vector)
    if algorithm == "W4A8_AWQ":
        assert found[f"{layer}.weights_scaling_factor_2"] >= source[f"{layer}.weight_scale_2"]
    if f"{layer}.input_scale" in source:
        assert found[f"{layer}.activation_scaling_factor"] == source[f"{layer}.input_scale"]


def test_fp8_codes_are_the_nearest_under_the_larger_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()]
    for own, largest in ((0.013, 0.017), (0.5, 1.0), (1e-3, 0.3)):
        import ml_dtypes

        array = finite.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        fresh = rescaled_fp8(array, own, largest).astype(np.float64) * largest
        meant = array.astype(np.float64) * own
        grid = finite.double().numpy() * largest
        nearest = np.abs(grid[None, :] - meant[:, None]).min(axis=1)
        np.testing.assert_allclose(np.abs(fresh - meant), nearest, rtol=1e-5, atol=1e-12)


def test_qkv_with_three_fp8_scales_has_the_largest(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(DENSE, algorithm="FP8"))
    tensors = load_file(source / "model.safetensors")
    scales = [tensors[f"model.layers.0.self_attn.{kind}_proj.weight_scale"].item() for kind in "qkv"]
    assert len(set(scales)) == 3
    _, [rank] = load_ranks(converted(source, tmp_path))
    assert rank["transformer.layers.0.attention.qkv.weights_scaling_factor"].tolist() == [max(scales)]


def requantized(weights: torch.Tensor) -> torch.Tensor:
    """What trtllm-build makes of 16-bit weights for W8A16: symmetric, one scale per row, the largest weight is 127."""
    scale = weights.float().abs().amax(dim=1, keepdim=True) / 127
    return (weights.float() / scale).round().clamp(-127, 127).to(torch.int8)


def test_requantizing_int8_weights_gives_the_same_integers_where_rows_are_whole(tmp_path: Path) -> None:
    """A row's largest weight is code 127 and exact in BF16, so all others move by less than half a step."""
    geometry = replace(DENSE, algorithm="W8A16")
    source = random_checkpoint(tmp_path / "source", geometry)
    tensors = load_file(source / "model.safetensors")
    found = gathered(converted(source, tmp_path), geometry)
    for name in filter(is_linear, tensors):
        assert equal(requantized(found[name]), tensors[name]), name


def test_requantizing_a_slice_of_a_row_moves_weights_by_half_a_step_at_most(tmp_path: Path) -> None:
    """Layers split by columns are quantized rank by rank: other integers under finer scales, never a coarser one."""
    geometry = replace(DENSE, algorithm="W8A16")
    source = random_checkpoint(tmp_path / "source", geometry)
    tensors = load_file(source / "model.safetensors")
    _, ranks = load_ranks(converted(source, tmp_path, Mapping(4)))
    for rank, held in enumerate(ranks):
        part = held["transformer.layers.0.mlp.proj.weight"].float()
        step = part.abs().amax(dim=1, keepdim=True) / 127
        scale = tensors["model.layers.0.mlp.down_proj.weight_scale"][:, None]
        meant = tensors["model.layers.0.mlp.down_proj.weight"][:, rank * 8 : rank * 8 + 8].float() * scale
        assert (step <= scale * 1.005).all()
        bfloat16_rounding = meant.abs() / 256
        assert ((requantized(part).float() * step - meant).abs() <= step / 2 + bfloat16_rounding).all()


@pytest.mark.parametrize(("algorithm", "floor"), [("FP8", 1.0), ("INT8", 0.0)])
def test_kv_cache_scales_are_kept_and_the_larger_serves_both(
    tmp_path: Path, algorithm: str, floor: float
) -> None:
    source = random_checkpoint(tmp_path / "source", replace(DENSE, algorithm="FP8"))
    tensors = load_file(source / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = torch.tensor(0.25 * 4**layer)
        tensors[f"model.layers.{layer}.self_attn.v_proj.v_scale"] = torch.tensor(0.5 * 3**layer)
    save_file(tensors, source / "model.safetensors")
    describe(source, "FP8", kv_cache_quant_algo=algorithm)
    config, ranks = load_ranks(converted(source, tmp_path, Mapping(2, 3)))
    assert config["quantization"]["kv_cache_quant_algo"] == algorithm
    for layer in range(3):
        for rank in ranks[2 * layer : 2 * layer + 2]:
            key, value, merged = (
                rank[f"transformer.layers.0.attention.{kind}_cache_scaling_factor"]
                for kind in ("k", "v", "kv")
            )
            assert key.tolist() == [max(floor, 0.25 * 4**layer)]
            assert value.tolist() == [max(floor, 0.5 * 3**layer)]
            assert merged.tolist() == [max(key.item(), value.item())]


def without(source: Path, layers: list[str], patterns: list[str]) -> None:
    """Leave ``layers`` in 16 bits, and say so with ``patterns``."""
    tensors = load_file(source / "model.safetensors")
    for layer in layers:
        rows, columns = tensors[f"{layer}.weight"].shape
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            del tensors[name]
        tensors[f"{layer}.weight"] = torch.randn(rows, columns).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors")
    document = json.loads((source / "hf_quant_config.json").read_text())
    document["quantization"]["exclude_modules"] += patterns
    (source / "hf_quant_config.json").write_text(json.dumps(document))


def test_excluded_layers_stay_in_16_bits_and_are_named(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(DENSE, algorithm="FP8"))
    without(source, [f"model.layers.{n}.self_attn.o_proj" for n in range(3)], ["*.o_proj"])
    without(source, ["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"])
    config, [rank] = load_ranks(converted(source, tmp_path))
    assert config["quantization"]["exclude_modules"] == [
        "*lm_head",
        "*router",
        "*vocab_embedding",
        "*position_embedding",
        "*block_embedding",
        "*shared_expert_gate",
        "*fused_a",
        "transformer.layers.0.attention.dense",
        "transformer.layers.1.attention.dense",
        "transformer.layers.1.mlp.gate",
        "transformer.layers.2.attention.dense",
    ]
    assert rank["transformer.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert "transformer.layers.1.mlp.gate.weights_scaling_factor" not in rank
    # Its partner is not fused with an FP8 layer any more and keeps its own codes.
    tensors = load_file(source / "model.safetensors")
    assert equal(rank["transformer.layers.1.mlp.fc.weight"], tensors["model.layers.1.mlp.gate_proj.weight"])


def test_exclusions_that_repeat_in_every_stage_are_named_once(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(DENSE, layers=4, algorithm="FP8"))
    without(
        source,
        ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"],
        ["*.1.mlp.down_proj", "*.3.mlp.down_proj"],
    )
    config, _ = load_ranks(converted(source, tmp_path, Mapping(1, 2)))
    assert config["quantization"]["exclude_modules"][7:] == ["transformer.layers.1.mlp.proj"]


def test_exclusions_that_differ_between_stages_are_refused(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(DENSE, layers=4, algorithm="FP8"))
    without(source, ["model.layers.1.mlp.down_proj"], ["model.layers.1.mlp.down_proj"])
    with pytest.raises(
        SpecError, match=r"transformer\.layers\.1\.mlp\.proj names both layer 1, which is excluded"
    ):
        converted(source, tmp_path, Mapping(1, 2))


def test_a_quantized_head_is_split_like_any_layer(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(DENSE, vocab=64, algorithm="FP8"))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors |= {"lm_head.weight_scale": torch.tensor(0.5), "lm_head.input_scale": torch.tensor(0.25)}
    save_file(tensors, source / "model.safetensors")
    describe(source, "FP8", exclude_modules=["model.embed_tokens"])
    config, ranks = load_ranks(converted(source, tmp_path, Mapping(2)))
    assert "*lm_head" not in config["quantization"]["exclude_modules"]
    assert equal(ranks[1]["lm_head.weight"], tensors["lm_head.weight"][32:])
    assert ranks[1]["lm_head.weights_scaling_factor"].tolist() == [0.5]


def test_the_description_inside_config_json_is_enough(tmp_path: Path) -> None:
    geometry = replace(DENSE, algorithm="W4A16_AWQ")
    source = random_checkpoint(tmp_path / "source", geometry)
    inline = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 8, "ignore": ["lm_head"]}
    beside = converted(source, tmp_path / "beside")
    (source / "hf_quant_config.json").unlink()
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": inline}
    (source / "config.json").write_text(json.dumps(config))
    inside = converted(source, tmp_path / "inside")
    for name in ("config.json", "rank0.safetensors"):
        assert (beside / name).read_bytes() == (inside / name).read_bytes()


@pytest.mark.parametrize("algorithm", ["W8A8_SQ_PER_CHANNEL", "W4A8_AWQ"])
def test_experts_in_an_algorithm_without_kernels_are_refused(tmp_path: Path, algorithm: str) -> None:
    source = random_checkpoint(tmp_path / "source", replace(MIXTRAL, algorithm=algorithm))
    with pytest.raises(SourceError, match=f"cannot run experts quantized with {algorithm}; supported .*FP8"):
        converted(source, tmp_path)


def expert_layers(geometry: Geometry) -> list[str]:
    """The modules of every expert that is chosen."""
    return [
        module
        for layer in range(geometry.layers)
        for number in range(geometry.experts)
        for module in geometry.expert(layer, number).values()
    ]


def test_experts_left_in_16_bits_are_excluded_as_one_module(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(MIXTRAL, algorithm="FP8"))
    without(source, expert_layers(MIXTRAL), ["*.experts.*"])
    config, [rank] = load_ranks(converted(source, tmp_path))
    excluded = config["quantization"]["exclude_modules"]
    assert [name for name in excluded if name.endswith(".mlp")] == [
        f"transformer.layers.{n}.mlp" for n in range(3)
    ]
    assert rank["transformer.layers.0.mlp.fc.weight"].dtype == torch.bfloat16
    assert rank["transformer.layers.0.attention.qkv.weight"].dtype == torch.float8_e4m3fn


def test_experts_left_in_16_bits_beside_a_shared_expert_are_refused(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(QWEN2_MOE, algorithm="FP8"))
    without(source, expert_layers(QWEN2_MOE), ["*.experts.*"])
    with pytest.raises(SourceError, match="cannot leave the experts of Qwen2MoeForCausalLM in 16 bits"):
        converted(source, tmp_path)
