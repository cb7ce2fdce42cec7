"""The writer against ModelOpt 0.47's own TensorRT-LLM exporter: the same quantized model, two ways.

ModelOpt is not followed where it is wrong or cannot: it loses RoPE with transformers 5, stores INT8 weights that
TensorRT-LLM does not read, and refuses to repeat scales of KV heads. Its two exports of an AWQ model differ in
smoothing (the unified one folds it into norms), so there only names, shapes and dtypes are compared. It cannot export
Mixtral with transformers 5.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_factory import Architecture, tiny_checkpoint
from trtllm_oracle import Oracle, Scheme
from trtllm_shards import equal, load_ranks

from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_torch_thread")]

DENSE: tuple[Architecture, ...] = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
EXACT: tuple[Scheme, ...] = ("none", "int8_sq", "fp8", "fp8_kv")
MAPPINGS = {"tp1": Mapping(), "tp2": Mapping(2), "tp4": Mapping(4), "pp2": Mapping(1, 2)}
ALGORITHMS = {
    "none": None,
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "fp8": "FP8",
    "fp8_kv": "FP8",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Quantized models by architecture, scheme and KV heads, each with its unified export."""

    @cache
    def made(architecture: Architecture, scheme: Scheme, kv_heads: int) -> tuple[Oracle, Path]:
        directory = tmp_path_factory.mktemp(f"{architecture}-{scheme}")
        wide = scheme.endswith("awq")  # Four ranks need whole groups of 32 input channels each.
        checkpoint = tiny_checkpoint(
            directory / "source",
            architecture=architecture,
            kv_heads=kv_heads,
            hidden=128 if wide else 64,
            head_dim=32 if wide else 16,
        )
        model = Oracle(checkpoint, scheme)
        return model, model.unified(directory / "unified")

    return made


def both(oracle: tuple[Oracle, Path], tmp_path: Path, mapping: Mapping) -> tuple[Any, Any]:
    """Config and ranks of ModelOpt's checkpoint, and of ours."""
    model, unified = oracle
    theirs = model.tensorrt_llm(tmp_path / "theirs", tensor=mapping.tensor, pipeline=mapping.pipeline)
    convert_checkpoint(unified, tmp_path / "ours", mapping=mapping)
    return load_ranks(theirs), load_ranks(tmp_path / "ours")


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("scheme", EXACT)
@pytest.mark.parametrize("architecture", DENSE)
def test_every_bit_is_what_modelopt_exports(
    oracle: Any, tmp_path: Path, architecture: Architecture, scheme: Scheme, mapping: str
) -> None:
    # ModelOpt cannot repeat the KV heads' scales of SmoothQuant; the next test covers that.
    kv_heads = 4 if (scheme, mapping) == ("int8_sq", "tp4") else 2
    model = oracle(architecture, scheme, kv_heads)
    (_, theirs), (config, ours) = both(model, tmp_path, MAPPINGS[mapping])
    assert config["quantization"]["quant_algo"] == ALGORITHMS[scheme]
    assert len(ours) == len(theirs)
    for own, expected in zip(ours, theirs, strict=True):
        assert own.keys() == expected.keys()
        assert [name for name in own if not equal(own[name], expected[name])] == []


def test_repeated_kv_heads_are_as_if_the_model_had_them(oracle: Any, tmp_path: Path) -> None:
    """Four ranks of a SmoothQuant model with 2 KV heads hold what those of one with each head twice hold."""
    from safetensors.torch import load_file, save_file

    _, unified = oracle("LlamaForCausalLM", "int8_sq", 2)
    repeated = tmp_path / "repeated"
    repeated.mkdir()
    for name in ("config.json", "hf_quant_config.json"):
        text = (unified / name).read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 4')
        (repeated / name).write_text(text)
    tensors = load_file(unified / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("k_proj.weight", "v_proj.weight", "k_proj.weight_scale", "v_proj.weight_scale")):
            heads = tensor.reshape(2, 16, *tensor.shape[1:]).repeat_interleave(2, dim=0)
            tensors[name] = heads.reshape(-1, *tensor.shape[1:]).contiguous()
    save_file(tensors, repeated / "model.safetensors")
    for source, out in ((unified, "few"), (repeated, "many")):
        convert_checkpoint(source, tmp_path / out, mapping=Mapping(4))
    for rank in range(4):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("scheme", ["int4_awq", "w4a8_awq"])
def test_awq_has_the_names_shapes_and_dtypes_of_modelopts_export(
    oracle: Any, tmp_path: Path, scheme: Scheme, mapping: str
) -> None:
    (theirs, expected), (ours, own) = both(oracle("LlamaForCausalLM", scheme, 4), tmp_path, MAPPINGS[mapping])
    for rank, other in zip(own, expected, strict=True):
        assert signature(rank) == signature(other)
    keys = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale")
    assert [ours["quantization"][key] for key in keys] == [theirs["quantization"][key] for key in keys]


def signature(rank: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name, shape and dtype of every tensor."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in rank.items()}


@pytest.mark.parametrize("architecture", DENSE)
def test_config_agrees_with_modelopts_where_that_is_right(
    oracle: Any, tmp_path: Path, architecture: Architecture
) -> None:
    (theirs, _), (ours, _) = both(oracle(architecture, "fp8_kv", 2), tmp_path, Mapping(2))
    for key in (
        "architecture",
        "dtype",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "norm_epsilon",
        "vocab_size",
        "max_position_embeddings",
        "use_parallel_embedding",
        "embedding_sharding_dim",
        "head_size",
        "intermediate_size",
        "position_embedding_type",
    ):
        assert ours[key] == theirs[key], key
    assert ours["mapping"].items() >= theirs["mapping"].items()
    assert (
        ours["quantization"]["kv_cache_quant_algo"] == theirs["quantization"]["kv_cache_quant_algo"] == "FP8"
    )
    assert "rotary_base" not in theirs, "ModelOpt still loses RoPE with transformers 5"
    assert ours["rotary_base"] == 10000.0
