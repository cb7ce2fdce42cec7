"""What makes a checkpoint acceptable, on tiny checkpoints of every architecture with one thing wrong at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.checkpoints.validate import CheckpointSummary, validate_checkpoint
from enginesmith.errors import SourceError
from enginesmith.platforms import ARCHITECTURES


def edit_config(directory: Path, **changes: Any) -> None:
    """Set keys of ``config.json``; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory: Path, edit: Any) -> None:
    """Replace the weights by what ``edit`` makes of the dictionary of torch tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{"tied": True, "shards": 2}, {"head_dim": 32, "dtype": "float16"}])
def test_checkpoint_that_transformers_wrote_is_valid(architecture: Any, options: Any, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, architecture=architecture, **options)
    tensors = CheckpointTensors(directory)
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors.names())
    dtype = "F16" if "dtype" in options else "BF16"
    assert validate_checkpoint(directory) == CheckpointSummary(
        architecture, parameters, parameters * 2, dtype
    )


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_projection_biases_are_expected_where_config_has_them(architecture: Any, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, architecture=architecture, qkv_bias=True)
    validate_checkpoint(directory)
    edit_config(directory, attention_bias=False)
    with pytest.raises(SourceError, match=r"holds tensor model\.layers\.0\..*bias.*does not call for"):
        validate_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM, which is not supported; supported: LlamaForCausalLM, Mis",
        ),
        ({"architectures": None}, "must name one architecture, seen: None"),
        ({"architectures": []}, r"must name one architecture, seen: \[\]"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number of at least 1, seen: '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": None}, "vocab_size must be a whole number of at least 1, seen: None"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\..*calls for \(9 tensors are missing\)"),
        ({"num_hidden_layers": 1}, r"holds tensor model\.layers\.1\..*num_hidden_layers: 1"),
        ({"vocab_size": 500}, r"has shape \[512, 64\], config\.json implies \[500, 64\]"),
        ({"intermediate_size": 96}, r"mlp\.(down|gate|up)_proj\.weight has shape .* implies"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight has shape \[32, 64\], config\.json implies \[64, 64\]"),
        ({"head_dim": 32}, r"self_attn\..*has shape .* implies"),
    ],
)
def test_config_that_does_not_fit_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    edit_config(directory, **changes)
    with pytest.raises(SourceError, match=message):
        validate_checkpoint(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[]", "must hold a JSON object"), (b"\xff{}", "not valid JSON")],
)
def test_config_that_cannot_be_read_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    (directory / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        validate_checkpoint(directory)


@pytest.mark.parametrize("dtype", ["int8", "float64", "int64", "float8_e4m3fn"])
def test_wrong_dtype_shard_names_the_tensor_and_what_is_allowed(dtype: str, tmp_path: Path) -> None:
    import torch

    directory = tiny_checkpoint(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].to(getattr(torch, dtype))}))
    with pytest.raises(SourceError, match=rf"{name} has dtype \w+; allowed: BF16, F16, F32"):
        validate_checkpoint(directory)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, tied=True)
    edit_tensors(directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(SourceError, match=r"no tensor model\.norm\.weight.*\(1 tensors are missing\)"):
        validate_checkpoint(directory)


def test_tensors_that_exporters_add_without_meaning_are_accepted(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, tied=True)
    before = validate_checkpoint(directory)

    def add(tensors: Any) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"][:8].clone()

    edit_tensors(directory, add)
    assert validate_checkpoint(directory).parameters == before.parameters


def test_quantized_weights_are_legal_beside_modelopts_description_only(tmp_path: Path) -> None:
    import torch

    directory = tiny_checkpoint(tmp_path)
    parameters = validate_checkpoint(directory).parameters

    def quantize(tensors: Any) -> None:
        packed, whole = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
        tensors[f"{packed}.weight"] = torch.zeros(64, 64, dtype=torch.uint8)  # two INT4 rows in each byte
        tensors[f"{packed}.weight_scale"] = torch.ones(128, 1)
        tensors[f"{whole}.weight"] = torch.zeros(128, 64, dtype=torch.int8)
        tensors[f"{whole}.input_scale"] = torch.ones(())

    edit_tensors(directory, quantize)
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "MIXED"}}')
    assert validate_checkpoint(directory).parameters == parameters
    (directory / "hf_quant_config.json").unlink()
    with pytest.raises(
        SourceError, match=r"allowed: BF16, F16, F32\n.*hf_quant_config\.json must be beside it"
    ):
        validate_checkpoint(directory)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("MixtralForCausalLM", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("Qwen2MoeForCausalLM", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("Qwen3MoeForCausalLM", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("Qwen3MoeForCausalLM", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_a_missing_part_of_an_expert_is_named(architecture: Any, name: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, architecture=architecture)
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(SourceError, match=name.replace(".", r"\.")):
        validate_checkpoint(directory)


def test_more_experts_than_the_config_says_are_refused(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, architecture="MixtralForCausalLM")
    edit_config(directory, num_local_experts=3)
    with pytest.raises(
        SourceError, match=r"gate\.weight.*has shape \[4, 64\]|experts\.3\..*does not call for"
    ):
        validate_checkpoint(directory)


def test_layers_that_are_dense_among_sparse_ones_are_expected_dense(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, architecture="Qwen2MoeForCausalLM", mlp_only_layers=[0])
    validate_checkpoint(directory)
    edit_config(directory, mlp_only_layers=[1])
    with pytest.raises(SourceError, match=r"model\.layers\.[01]\.mlp\."):
        validate_checkpoint(directory)
