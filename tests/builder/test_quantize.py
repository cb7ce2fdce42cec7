"""Quantization: the stored checkpoint is the calibrated model, on every architecture and scheme."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from checkpoint_factory import tiny_checkpoint, write_tokenizer

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.checkpoints.validate import MOE_ARCHITECTURES
from enginesmith.corpora import load_documents, token_windows
from enginesmith.errors import GateError, SpecError, ToolchainError
from enginesmith.quantize import run
from enginesmith.quantize.calibration import calibrate
from enginesmith.quantize.export import export
from enginesmith.quantize.recipe import Recipe, choose_layers
from enginesmith.quantize.snapping import snap
from enginesmith.schemes import SCHEMES
from enginesmith.torch_models import load_model, read_tensor, require_modelopt, third_party_warnings

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
RECIPES = {
    "int8_sq": Recipe(SCHEMES["int8_sq"]),
    "int8_wo": Recipe(SCHEMES["int8_wo"]),
    "int4_awq": Recipe(SCHEMES["int4_awq"], group_size=32, alpha_step=0.5),
    "fp8": Recipe(SCHEMES["fp8"]),
    "w4a8_awq": Recipe(SCHEMES["w4a8_awq"], group_size=32, alpha_step=0.5),
    "fp8 with FP8 KV cache": Recipe(SCHEMES["fp8"], kv_cache="fp8"),
    "w4a8_awq with FP8 KV cache": Recipe(SCHEMES["w4a8_awq"], group_size=32, alpha_step=0.5, kv_cache="fp8"),
    "int8_sq with INT8 KV cache": Recipe(SCHEMES["int8_sq"], kv_cache="int8"),
    "int8_wo with INT8 KV cache": Recipe(SCHEMES["int8_wo"], kv_cache="int8"),
    "int4_awq with INT8 KV cache": Recipe(
        SCHEMES["int4_awq"], group_size=32, alpha_step=0.5, kv_cache="int8"
    ),
    "int8_sq with lm_head": Recipe(SCHEMES["int8_sq"], quantize_lm_head=True),
    "int4_awq with lm_head": Recipe(
        SCHEMES["int4_awq"], group_size=32, alpha_step=0.5, quantize_lm_head=True
    ),
}
PARAMS: dict[str, Any] = {
    "scheme": "int4_awq",
    "group_size": 32,
    "alpha": 0.5,
    "alpha_step": 0.5,
    "kv_cache": "none",
    "lm_head": "none",
    "exclude": [],
    "calibration": {"corpus": {"builtin": "english"}, "samples": 4, "length": 32, "seed": 0},
    "location": {"corpus_path": None},
}


@dataclass
class Context:
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)
    reports: list[tuple[float | None, str]] = field(default_factory=list)

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.reports.append((fraction, note))


@cache
def windows_of(seed: int) -> Any:
    """Calibration (seed 0) or evaluation (seed 1) windows; every tiny checkpoint has the same tokenizer."""
    with TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        documents = load_documents({"builtin": "english"})[:20]
        return token_windows(documents, Path(directory), count=4, length=32, seed=seed)


def logits_of(model: Any) -> Any:
    with torch.no_grad(), third_party_warnings():
        return model(input_ids=torch.from_numpy(windows_of(1)), use_cache=False).logits


def snapped(checkpoint: Path, recipe: Recipe, *, dtype: Any = torch.bfloat16) -> tuple[Any, list[str]]:
    model = load_model(checkpoint)
    layers = choose_layers(model, recipe)
    calibrate(model, recipe, layers, windows=windows_of(0) if recipe.needs_activations else None)
    snap(model, layers, dtype=dtype)
    return model, layers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_say_exactly_what_was_calibrated(tmp_path: Path, architecture: Any, recipe: Recipe) -> None:
    tied = architecture == "Qwen2ForCausalLM" and not recipe.quantize_lm_head
    checkpoint = tiny_checkpoint(tmp_path / "in", architecture=architecture, tied=tied)
    unquantized = logits_of(load_model(checkpoint))
    model, layers = snapped(checkpoint, recipe)
    in_memory = logits_of(model)
    export(model, layers, checkpoint=checkpoint, out=tmp_path / "out")
    from_files = logits_of(load_model(tmp_path / "out"))
    assert torch.equal(in_memory.argmax(-1), from_files.argmax(-1))
    assert (in_memory - from_files).abs().max() <= 1e-4
    # The quantizers are at work, and the model is still the same model.
    assert 1e-4 < (unquantized - from_files).abs().mean() < unquantized.std()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_snapping_fits_the_dtype_of_the_checkpoint(tmp_path: Path, dtype: Any) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "in", dtype=dtype)
    model, layers = snapped(checkpoint, RECIPES["int4_awq"], dtype=getattr(torch, dtype))
    in_memory = logits_of(model)
    export(model, layers, checkpoint=checkpoint, out=tmp_path / "out")
    assert (in_memory - logits_of(load_model(tmp_path / "out"))).abs().max() <= 1e-4
    stored = CheckpointTensors(tmp_path / "out").dtype("model.layers.0.self_attn.o_proj.pre_quant_scale")
    assert stored == {"float16": "F16", "float32": "F32"}[dtype]


def test_snapping_twice_changes_nothing(llama: Path) -> None:
    model, layers = snapped(llama, RECIPES["int8_sq"])
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snap(model, layers, dtype=torch.bfloat16)
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, once[name])] == []


def test_snapping_costs_no_accuracy(tmp_path: Path) -> None:
    """Rounding smoothing scales without making up for it would move every weight by up to 2^-9 of itself."""
    checkpoint = tiny_checkpoint(tmp_path, seed=5)
    exact, _ = snapped(checkpoint, RECIPES["int8_sq"], dtype=torch.float32)
    rounded, _ = snapped(checkpoint, RECIPES["int8_sq"], dtype=torch.bfloat16)
    unquantized = logits_of(load_model(checkpoint))
    error, rounded_error = ((logits_of(model) - unquantized).square().mean() for model in (exact, rounded))
    assert rounded_error < 1.25 * error


@pytest.mark.parametrize("scheme", ["int8_sq", "int4_awq", "fp8"])
def test_what_is_not_quantized_is_stored_bit_for_bit(llama: Path, tmp_path: Path, scheme: str) -> None:
    excluded = "model.layers.1.mlp.down_proj"
    params = {**PARAMS, "scheme": scheme, "exclude": [excluded]}
    facts = run(Context(params, {"checkpoint": llama}, tmp_path))
    before, after = CheckpointTensors(llama), CheckpointTensors(tmp_path)
    assert facts["excluded_layers"] == [excluded, "lm_head"]
    assert facts["quantized_layers"] == 13
    untouched = [f"{excluded}.weight", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    if scheme != "int4_awq":
        untouched += [name for name in before.names() if "layernorm" in name]
    for name in untouched:
        assert after.dtype(name) == before.dtype(name)
        assert torch.equal(read_tensor(after, name), read_tensor(before, name)), name
    assert f"{excluded}.weight_scale" not in after
    assert "model.layers.0.mlp.down_proj.weight_scale" in after
    algorithm = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
    assert algorithm == SCHEMES[scheme].quant_algo


def test_the_step_writes_a_complete_checkpoint_and_says_what_it_did(llama: Path, tmp_path: Path) -> None:
    context = Context(PARAMS, {"checkpoint": llama}, tmp_path)
    facts = run(context)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config")["quant_algo"] == "W4A16_AWQ"
    assert config == json.loads((llama / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (llama / name).read_bytes()
    tensors = CheckpointTensors(tmp_path)
    assert facts["weight_bytes"] == sum(tensors.nbytes(name) for name in tensors.names())
    assert len(facts["corpus_sha256"]) == 64
    assert set(facts["seconds"]) == {"load", "calibrate", "snap", "export"}
    json.dumps(facts)
    fractions = [fraction for fraction, _ in context.reports if fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_weight_only_quantization_reads_no_corpus(llama: Path, tmp_path: Path) -> None:
    params = {
        **PARAMS,
        "scheme": "int8_wo",
        "group_size": None,
        "calibration": {"corpus": {"file": "nowhere.txt"}},
    }
    assert run(Context(params, {"checkpoint": llama}, tmp_path))["corpus_sha256"] is None


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(SCHEMES["fp8"], exclude=("layers.0.*",)), r"exclude 'layers.0.\*' matches no linear layer.*\n.*'\*layers.0.\*' matches 7 layers"),
        (Recipe(SCHEMES["fp8"], exclude=("*.downproj",)), r"matches no linear layer.*\n.*near: .*down_proj"),
        (Recipe(SCHEMES["fp8"], exclude=("*",)), "leaves no layer to quantize"),
        (Recipe(SCHEMES["int4_awq"], group_size=128), r"group_size 128 does not divide the 64 input channels of model\.layers\.0\.self_attn\.q_proj\n.*fits every layer: 32, 64"),
        (Recipe(SCHEMES["int4_awq"], group_size=32, exclude=("*.v_proj",)), r"leaves out .*v_proj but not .*q_proj, .*k_proj; AWQ smooths"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_the_model_is_refused(llama: Path, recipe: Recipe, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        choose_layers(load_model(llama), recipe)


@pytest.mark.parametrize("architecture", MOE_ARCHITECTURES)
def test_a_mixture_of_experts_is_refused_rather_than_quantized_in_part(
    tmp_path: Path, architecture: Any
) -> None:
    model = load_model(tiny_checkpoint(tmp_path, architecture=architecture))
    with pytest.raises(SpecError, match=r"experts would stay unquantized\n.*use scheme none"):
        choose_layers(model, Recipe(SCHEMES["fp8"]))


@pytest.mark.parametrize(("scheme", "suffix"), [("w4a8_awq", "weight_scale_2"), ("fp8", "weight_scale")])
def test_layers_that_tensorrt_llm_fuses_share_their_fp8_scale(
    llama: Path, tmp_path: Path, scheme: str, suffix: str
) -> None:
    run(Context({**PARAMS, "scheme": scheme}, {"checkpoint": llama}, tmp_path))
    tensors = CheckpointTensors(tmp_path)
    for layer in (0, 1):
        for block, parts in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("gate_proj", "up_proj")),
        ):
            names = [f"model.layers.{layer}.{block}.{part}.{suffix}" for part in parts]
            assert len({float(tensors.read(name)) for name in names}) == 1


@pytest.mark.parametrize(("scheme", "cache", "least"), [("int8_sq", "int8", 0.0), ("fp8", "fp8", 1.0)])
def test_keys_and_values_share_their_cache_scale(
    llama: Path, tmp_path: Path, scheme: str, cache: str, least: float
) -> None:
    run(Context({**PARAMS, "scheme": scheme, "kv_cache": cache}, {"checkpoint": llama}, tmp_path))
    tensors = CheckpointTensors(tmp_path)
    for layer in (0, 1):
        scales = {
            float(tensors.read(f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale")) for part in "kv"
        }
        assert len(scales) == 1
        assert scales.pop() >= least


@pytest.mark.parametrize("scheme", ["int4_awq", "w4a8_awq"])
def test_group_scales_survive_the_dtype_that_tensorrt_llm_loads_them_in(
    llama: Path, tmp_path: Path, scheme: str
) -> None:
    run(Context({**PARAMS, "scheme": scheme}, {"checkpoint": llama}, tmp_path))
    tensors = CheckpointTensors(tmp_path)
    for name in tensors.names():
        if name.endswith("weight_scale"):
            scale = read_tensor(tensors, name)
            assert torch.equal(scale.to(torch.bfloat16).to(scale.dtype), scale), name


@pytest.mark.parametrize("scheme", ["int8_sq", "int8_wo", "int4_awq"])
def test_an_int8_cache_is_described_as_modelopt_describes_an_fp8_one(
    llama: Path, tmp_path: Path, scheme: str
) -> None:
    run(Context({**PARAMS, "scheme": scheme, "kv_cache": "int8"}, {"checkpoint": llama}, tmp_path))
    tensors = CheckpointTensors(tmp_path)
    assert tensors.quantization is not None
    assert tensors.quantization["kv_cache_quant_algo"] == "INT8"
    assert tensors.quantization["quant_algo"] == SCHEMES[scheme].quant_algo
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "int"}
    for layer in (0, 1):
        for part in "kv":
            name = f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"
            assert (tensors.dtype(name), tensors.shape(name)) == ("F32", ())
            assert 0 < float(tensors.read(name)) < 1


def test_a_tied_head_cannot_be_quantized(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="tied to its embedding"):
        choose_layers(
            load_model(tiny_checkpoint(tmp_path, tied=True)), Recipe(SCHEMES["fp8"], quantize_lm_head=True)
        )


@pytest.mark.parametrize(
    ("scheme", "value", "said"),
    [
        ("fp8", float("nan"), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
        ("int8_wo", float("inf"), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
        ("fp8", 3e38, r"calibration met NaN or Inf in the output of model\.layers\.1\.mlp\.up_proj"),
        ("int4_awq", 3e38, r"calibration met NaN or Inf in the output of model\.layers\.1\.mlp\.up_proj"),
    ],
)
def test_values_without_a_range_stop_the_calibration_and_are_named(
    llama: Path, scheme: str, value: float, said: str
) -> None:
    model = load_model(llama)
    model.get_submodule("model.layers.1.mlp.up_proj").weight[3] = value
    recipe = RECIPES[scheme]
    windows = windows_of(0) if recipe.needs_activations else None
    with pytest.raises(GateError, match=said):
        calibrate(model, recipe, choose_layers(model, recipe), windows=windows)


def test_another_modelopt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.50.1")
    with pytest.raises(ToolchainError, match=r"nvidia-modelopt 0\.50\.1 is installed; 0\.47\.x is needed"):
        require_modelopt()
