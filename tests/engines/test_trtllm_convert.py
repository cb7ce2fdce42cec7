"""The TensorRT-LLM checkpoint: every rank together is the source again, and ``config.json`` says what the model is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_factory import LLAMA3_ROPE, split_into_shards, tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from trtllm_shards import Geometry, equal, gathered, load_ranks, random_checkpoint

from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint, run
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.engines.tensorrt_llm.stream import BLOCK_BYTES

ONE_RANK = Mapping()
MIXTRAL = Geometry("MixtralForCausalLM", experts=4)
QWEN2_MOE = Geometry("Qwen2MoeForCausalLM", experts=4, shared_ffn=16)
QWEN3_MOE = Geometry("Qwen3MoeForCausalLM", experts=4)
GEOMETRIES = {
    "llama": Geometry(),
    "llama_biases": Geometry(bias=True),
    "mistral": Geometry("MistralForCausalLM"),
    "qwen2": Geometry("Qwen2ForCausalLM"),
    "qwen3": Geometry("Qwen3ForCausalLM"),
    "tied": Geometry(tied=True),
    "odd_vocabulary": Geometry(vocab=53),
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}
MAPPINGS = {
    "tp1": Mapping(),
    "tp2": Mapping(2),
    "tp4": Mapping(4),
    "pp2": Mapping(1, 2),
    "tp4_pp2": Mapping(4, 2),
}


def converted(source: Path, tmp_path: Path, mapping: Mapping = ONE_RANK, *, workers: int = 1) -> Path:
    """The TensorRT-LLM checkpoint of ``source``."""
    out = tmp_path / "out"
    convert_checkpoint(source, out, mapping=mapping, workers=workers)
    return out


def assert_restored(out: Path, geometry: Geometry, source: Path) -> None:
    """All ranks together are the source's tensors, bit for bit; routers are float32."""
    found = gathered(out, geometry)
    for name, tensor in load_file(source / "model.safetensors").items():
        router = geometry.experts and name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight"))
        assert equal(found.pop(name), tensor.float() if router else tensor), name
    assert set(found) <= {"lm_head.weight"}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_all_ranks_together_are_the_source(tmp_path: Path, geometry: str, mapping: str) -> None:
    source = random_checkpoint(tmp_path / "source", GEOMETRIES[geometry])
    assert_restored(converted(source, tmp_path, MAPPINGS[mapping], workers=2), GEOMETRIES[geometry], source)


@pytest.mark.parametrize("expert", [1, 2, 4])
@pytest.mark.parametrize("geometry", [MIXTRAL, QWEN2_MOE], ids=["mixtral", "qwen2_moe"])
def test_experts_are_spread_over_ranks_and_cut_into_slices(
    tmp_path: Path, geometry: Geometry, expert: int
) -> None:
    source = random_checkpoint(tmp_path / "source", geometry)
    out = converted(source, tmp_path, Mapping(4, 1, expert))
    config, ranks = load_ranks(out)
    assert config["mapping"]["moe_ep_size"] == expert
    assert config["mapping"]["moe_tp_size"] == 4 // expert
    slices = 2 * geometry.ffn // (4 // expert)
    assert ranks[0]["transformer.layers.0.mlp.fc.weight"].shape == (4 // expert, slices, geometry.hidden)
    assert_restored(out, geometry, source)


@st.composite
def spread_models(draw: st.DrawFn) -> tuple[Geometry, Mapping]:
    """Any geometry with a mapping that divides it."""
    tensor = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([*(n for n in range(1, tensor) if tensor % n == 0), tensor, 2 * tensor]))
    heads = math.lcm(kv_heads, tensor) * draw(st.integers(1, 2))
    layers = draw(st.integers(1, 5))
    expert = draw(st.sampled_from([degree for degree in range(1, tensor + 1) if tensor % degree == 0]))
    architecture = draw(st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM"]))
    experts = expert * draw(st.integers(1, 3)) if architecture == "MixtralForCausalLM" else 0
    geometry = Geometry(
        architecture,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 3, 8])),
        hidden=draw(st.integers(1, 40)),
        ffn=tensor * draw(st.integers(1, 7)),
        vocab=draw(st.integers(1, 70)),
        tied=draw(st.booleans()),
        bias=architecture == "LlamaForCausalLM" and draw(st.booleans()),
        experts=experts,
    )
    return geometry, Mapping(tensor, draw(st.integers(1, layers)), expert if experts else 1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spread=spread_models())
def test_any_geometry_spread_in_any_way_is_restored(
    tmp_path_factory: pytest.TempPathFactory, spread: tuple[Geometry, Mapping]
) -> None:
    geometry, mapping = spread
    directory = tmp_path_factory.mktemp("spread")
    source = random_checkpoint(directory / "source", geometry)
    assert_restored(converted(source, directory, mapping, workers=2), geometry, source)


def test_95_layers_over_2_stages_are_48_and_47(tmp_path: Path) -> None:
    geometry = Geometry(layers=95, heads=2, kv_heads=1, hidden=4, head_dim=2, ffn=4, vocab=8)
    source = random_checkpoint(tmp_path / "source", geometry)
    out = converted(source, tmp_path, Mapping(1, 2))
    _, ranks = load_ranks(out)
    norms = [sum(name.endswith("input_layernorm.weight") for name in rank) for rank in ranks]
    assert norms == [48, 47]
    assert "transformer.vocab_embedding.weight" in ranks[0]
    assert not {"transformer.ln_f.weight", "lm_head.weight"} & set(ranks[0])
    assert {"transformer.ln_f.weight", "lm_head.weight"} <= set(ranks[1])
    assert_restored(out, geometry, source)


def test_tensors_larger_than_a_block_are_restored(tmp_path: Path) -> None:
    geometry = Geometry(layers=1, heads=4, kv_heads=2, head_dim=64, hidden=3072, ffn=6144, vocab=301)
    assert 2 * geometry.ffn * geometry.hidden > 2 * BLOCK_BYTES
    source = random_checkpoint(tmp_path / "source", geometry)
    assert_restored(converted(source, tmp_path, Mapping(2), workers=3), geometry, source)


def test_a_sharded_source_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = converted(random_checkpoint(tmp_path / "whole", Geometry()), tmp_path / "a", Mapping(2))
    sharded = random_checkpoint(tmp_path / "sharded", Geometry())
    split_into_shards(sharded, 3)
    other = converted(sharded, tmp_path / "b", Mapping(2))
    for name in ("config.json", "rank0.safetensors", "rank1.safetensors"):
        assert (whole / name).read_bytes() == (other / name).read_bytes()


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", MIXTRAL)
    one = converted(source, tmp_path / "a", Mapping(2))
    five = converted(source, tmp_path / "b", Mapping(2), workers=5)
    assert [p.read_bytes() for p in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(five.iterdir())]


def test_experts_have_the_linear_half_before_the_activated_half(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", MIXTRAL)
    tensors = load_file(source / "model.safetensors")
    _, [rank] = load_ranks(converted(source, tmp_path))
    experts = "model.layers.0.block_sparse_moe.experts"
    assert equal(
        rank["transformer.layers.0.mlp.fc.weight"][1],
        torch.cat([tensors[f"{experts}.1.w3.weight"], tensors[f"{experts}.1.w1.weight"]]),
    )


def test_mixtral_is_read_with_the_names_of_transformers_5(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", MIXTRAL)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        *path, last, kind = name.replace("block_sparse_moe", "mlp").split(".")
        renamed[".".join([*path, names.get(last, last), kind])] = tensor
    other = random_checkpoint(tmp_path / "other", MIXTRAL)
    from safetensors.torch import save_file

    save_file(renamed, other / "model.safetensors")
    one, two = converted(source, tmp_path / "a"), converted(other, tmp_path / "b")
    assert (one / "rank0.safetensors").read_bytes() == (two / "rank0.safetensors").read_bytes()


def config_of(tmp_path: Path, geometry: Geometry, mapping: Mapping = ONE_RANK, **keys: Any) -> dict[str, Any]:
    """The ``config.json`` that a random checkpoint's conversion writes; ``keys`` override the source's."""
    source = random_checkpoint(tmp_path / "source", geometry, **keys)
    config: dict[str, Any] = json.loads((converted(source, tmp_path, mapping) / "config.json").read_text())
    return config


def test_config_describes_model_and_mapping(tmp_path: Path) -> None:
    config = config_of(tmp_path, Geometry(vocab=51), Mapping(2, 2, gpus_per_node=4))
    assert config["mapping"] == {
        "world_size": 4,
        "gpus_per_node": 4,
        "cp_size": 1,
        "tp_size": 2,
        "pp_size": 2,
        "moe_tp_size": 2,
        "moe_ep_size": 1,
    }
    expected = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "vocab_size": 51,
        "hidden_size": 48,
        "head_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 256,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    assert config.items() >= expected.items()


OLD_LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
        {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": OLD_LLAMA3},
    ],
    ids=["transformers5", "transformers4"],
)
def test_rope_is_read_from_either_transformers_generation(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = config_of(tmp_path, Geometry(), **keys)
    assert config["rotary_base"] == 500000.0
    assert config["rotary_scaling"] == {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def test_rope_without_scaling_has_none(tmp_path: Path) -> None:
    config = config_of(tmp_path, Geometry(), rope_parameters=None, rope_theta=1e6, rope_scaling=None)
    assert (config["rotary_base"], config["rotary_scaling"]) == (1e6, None)


def test_a_sliding_window_becomes_the_runtime_default_of_every_layer(tmp_path: Path) -> None:
    config = config_of(tmp_path, Geometry("MistralForCausalLM", layers=3), sliding_window=64)
    assert config["runtime_defaults"] == {"max_attention_window": [64, 64, 64]}


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    config = config_of(tmp_path, Geometry("MistralForCausalLM"), sliding_window=256)
    assert "runtime_defaults" not in config


@pytest.mark.parametrize(("renormalize", "mode"), [(True, 1), (False, 0)])
def test_qwen_moe_says_how_expert_weights_are_normalized(
    tmp_path: Path, renormalize: bool, mode: int
) -> None:
    config = config_of(tmp_path, QWEN2_MOE, norm_topk_prob=renormalize)
    assert config["moe"] == {"num_experts": 4, "top_k": 2, "normalization_mode": mode}
    assert config["hidden_act"] == "swiglu"
    assert config["qwen_type"] == "qwen2_moe"
    assert config["moe_shared_expert_intermediate_size"] == 16


def test_qwen3_says_that_q_and_k_are_normalized(tmp_path: Path) -> None:
    config = config_of(tmp_path, Geometry("Qwen3ForCausalLM"))
    assert (config["qk_layernorm"], config["attn_bias"], config["qwen_type"]) == (True, False, "qwen3")


def test_float16_and_float32_models_keep_their_dtype(tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        source = tiny_checkpoint(tmp_path / dtype, dtype=dtype, layers=1)  # type: ignore[arg-type]
        out = converted(source, tmp_path / f"{dtype}-out")
        config, [rank] = load_ranks(out)
        assert config["dtype"] == dtype
        assert {str(tensor.dtype) for tensor in rank.values()} == {f"torch.{dtype}"}


def test_norms_stored_wider_than_the_model_are_rounded_to_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = random_checkpoint(tmp_path / "source", Geometry())
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.randn(48)
    save_file(tensors, source / "model.safetensors")
    _, [rank] = load_ranks(converted(source, tmp_path))
    assert equal(rank["transformer.ln_f.weight"], tensors["model.norm.weight"].to(torch.bfloat16))


def test_the_step_reports_ranks_bytes_and_progress(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source", replace(MIXTRAL, algorithm="FP8"))
    seen: list[float | None] = []

    class Context:
        params = {"tensor": 2, "pipeline": 1, "expert": 2, "gpus_per_node": 8, "workers": 2}  # noqa: RUF012
        inputs = {"checkpoint": source}  # noqa: RUF012
        out = tmp_path / "out"
        scratch = tmp_path

        def progress(self, fraction: float | None, note: str = "") -> None:
            seen.append(fraction)

    facts = run(Context())
    sizes = [(tmp_path / "out" / f"rank{rank}.safetensors").stat().st_size for rank in range(2)]
    assert facts["ranks"] == 2
    assert facts["quant_algo"] == "FP8"
    assert 0 < sum(sizes) - facts["weight_bytes"] < 20_000, "weight_bytes is all but the headers"
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
