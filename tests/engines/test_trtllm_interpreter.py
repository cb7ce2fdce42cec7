"""The second proof of the TensorRT-LLM checkpoint: all its ranks, interpreted, give the logits of what was converted.

Two readers that share nothing but float64 arithmetic: ``trtllm_interpreter`` reads ranks, ``hf_arithmetic`` the Hugging
Face checkpoint (itself held against PyTorch here). What they agree on was neither lost nor exchanged on the way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoint_factory import tiny_checkpoint
from engine_cases import edit_config, edit_tensors, quantized
from hf_arithmetic import HuggingFaceArithmetic, relative_error
from trtllm_interpreter import CheckpointRefusedError, Interpreter

from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_torch_thread")]

TOLERANCE = 1e-5
FAULT = 1e-3
"""A planted fault must be at least this far off; seen: 0.01 to 1."""
TOKENS = np.random.default_rng(3).integers(3, 500, 24)
SHAPE: dict[str, Any] = {
    "layers": 3,
    "hidden": 128,
    "intermediate": 256,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 16,
}
MAPPINGS = {
    "tp1": Mapping(),
    "tp2": Mapping(tensor=2),
    "tp4": Mapping(tensor=4),  # Two key-value heads: each is held by two ranks.
    "pp3": Mapping(pipeline=3),
    "pp2": Mapping(pipeline=2),  # Three layers: two and one.
    "tp2-pp2": Mapping(tensor=2, pipeline=2),
}
SCHEMES = {
    "none": {},
    "int8_sq": {},
    "int8_sq-kvint8": {"kv_cache": "int8"},
    "int8_wo": {},
    "int4_awq": {},
    "int4_awq-kvint8": {"kv_cache": "int8"},
    "w4a8_awq": {},
    "w4a8_awq-kvfp8": {"kv_cache": "fp8"},
    "fp8": {},
    "fp8-kvfp8": {"kv_cache": "fp8"},
    "fp8-head": {"lm_head": "scheme"},
    "int8_sq-excluded": {"exclude": ["*.down_proj", "model.layers.1.*"]},
}


def odd_vocabulary(checkpoint: Path) -> None:
    """509 tokens: no multiple of two, so the head is padded and the embedding's last shard is short."""

    def cut(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:509].clone()

    edit_tensors(checkpoint, cut)
    edit_config(checkpoint, vocab_size=509)


@dataclass(frozen=True)
class Model:
    arguments: dict[str, Any]
    edit: Callable[[Path], None] = lambda _checkpoint: None


MODELS = {
    "llama": Model({}),
    "llama_tied": Model({"tied": True}),
    "llama_biases": Model({"qkv_bias": True}),
    "llama_rope": Model({"rope_scaling": "llama3"}),
    "llama_odd_vocabulary": Model({}, odd_vocabulary),
    "llama_sharded": Model({"shards": 3}),
    "mistral": Model({"architecture": "MistralForCausalLM"}),
    "qwen2": Model({"architecture": "Qwen2ForCausalLM"}),
    "qwen3": Model({"architecture": "Qwen3ForCausalLM", "head_dim": 32}),
    "mixtral": Model({"architecture": "MixtralForCausalLM"}),
    "qwen2_moe": Model({"architecture": "Qwen2MoeForCausalLM"}),
    "qwen3_moe": Model({"architecture": "Qwen3MoeForCausalLM", "norm_topk_prob": True}),
}
EXPERT_MAPPINGS = {
    "tp2-ep2": Mapping(tensor=2, expert=2),
    "tp4-ep2": Mapping(tensor=4, expert=2),
    "tp4-ep4-pp2": Mapping(tensor=4, pipeline=2, expert=4),
}


@dataclass
class Workshop:
    """Checkpoints of this run, each made once."""

    directory: Path
    expected: dict[tuple[str, str], Any] = field(default_factory=dict)

    def source(self, model: str, scheme: str) -> Path:
        path = self.directory / f"{model}-{scheme}"
        if path.exists():
            return path
        if scheme != "none":
            return quantized(self.source(model, "none"), path, scheme.partition("-")[0], **SCHEMES[scheme])
        tiny_checkpoint(path, **{**SHAPE, **MODELS[model].arguments})
        MODELS[model].edit(path)
        return path

    def logits(self, model: str, scheme: str) -> Any:
        """What a runtime with fused layers must compute."""
        if (model, scheme) not in self.expected:
            arithmetic = HuggingFaceArithmetic(self.source(model, scheme), fused=True)
            self.expected[model, scheme] = arithmetic.logits(TOKENS)
        return self.expected[model, scheme]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def logits_of_pytorch(checkpoint: Path) -> npt.NDArray[np.float64]:
    import torch

    from enginesmith.torch_models import load_model, third_party_warnings

    with torch.no_grad(), third_party_warnings():
        output = load_model(checkpoint)(input_ids=torch.from_numpy(TOKENS)[None], use_cache=False)
    logits: npt.NDArray[np.float64] = output.logits[0].double().numpy()
    return logits


@pytest.mark.parametrize(
    ("model", "scheme"), [*((model, "none") for model in MODELS), *(("llama", scheme) for scheme in SCHEMES)]
)
def test_the_reference_computes_what_pytorch_computes(model: str, scheme: str, workshop: Workshop) -> None:
    source = workshop.source(model, scheme)

    seen = HuggingFaceArithmetic(source, fused=False).logits(TOKENS)

    expected = logits_of_pytorch(source)
    # PyTorch computes in float32: an activation may fall on the other side of a rounding boundary, and all later
    # positions see it. What comes before agrees closely.
    assert np.quantile(np.abs(seen - expected), 0.1) <= 1e-5
    assert relative_error(seen, expected) <= 5e-2


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_of_every_scheme_compute_what_the_source_computes(
    scheme: str, mapping: str, workshop: Workshop, tmp_path: Path
) -> None:
    if scheme == "int8_sq-excluded" and "pp" in mapping:
        pytest.skip(
            "exclusions of one layer cannot be said for several stages; see the converter's own tests"
        )
    convert_checkpoint(workshop.source("llama", scheme), tmp_path / "out", mapping=MAPPINGS[mapping])

    seen = Interpreter(tmp_path / "out").logits(TOKENS)

    assert relative_error(seen, workshop.logits("llama", scheme)) <= TOLERANCE


@pytest.mark.parametrize("mapping", ["tp2", "tp4", "pp2", "tp2-pp2"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "llama"])
def test_ranks_of_every_architecture_compute_what_the_source_computes(
    model: str, mapping: str, workshop: Workshop, tmp_path: Path
) -> None:
    convert_checkpoint(workshop.source(model, "none"), tmp_path / "out", mapping=MAPPINGS[mapping])

    seen = Interpreter(tmp_path / "out").logits(TOKENS)

    assert relative_error(seen, workshop.logits(model, "none")) <= TOLERANCE


@pytest.mark.parametrize("mapping", EXPERT_MAPPINGS)
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_given_out_to_ranks_compute_what_the_source_computes(
    model: str, mapping: str, workshop: Workshop, tmp_path: Path
) -> None:
    convert_checkpoint(workshop.source(model, "none"), tmp_path / "out", mapping=EXPERT_MAPPINGS[mapping])

    seen = Interpreter(tmp_path / "out").logits(TOKENS)

    assert relative_error(seen, workshop.logits(model, "none")) <= TOLERANCE


@pytest.mark.parametrize("model", ["qwen2", "qwen3", "llama_biases", "llama_tied"])
@pytest.mark.parametrize("scheme", ["int4_awq", "fp8", "int8_sq"])
def test_quantized_models_with_biases_and_head_norms_compute_the_same(
    scheme: str, model: str, workshop: Workshop, tmp_path: Path
) -> None:
    convert_checkpoint(workshop.source(model, scheme), tmp_path / "out", mapping=Mapping(tensor=4))

    seen = Interpreter(tmp_path / "out").logits(TOKENS)

    assert relative_error(seen, workshop.logits(model, scheme)) <= TOLERANCE


Tensors = dict[str, Any]
LAYER = "transformer.layers.1"


def in_rank(rank: int, change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """A fault in the tensors of one rank."""

    def plant(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = directory / f"rank{rank}.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return plant


def in_every_rank(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def plant(directory: Path) -> None:
        for path in sorted(directory.glob("rank*.safetensors")):
            in_rank(int(path.stem.removeprefix("rank")), change)(directory)

    return plant


def in_config(**changes: Any) -> Callable[[Path], None]:
    def plant(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def exchanged(left: str, right: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[left], tensors[right] = tensors[right], tensors[left]

    return change


def query_and_key_exchanged(tensors: Tensors) -> None:
    """The first head of the query, and the key, which is as wide: 4 query, 1 key and 1 value head of 16 rows."""
    weight = tensors[f"{LAYER}.attention.qkv.weight"]
    first, key = weight[:16].clone(), weight[64:80].clone()
    weight[:16], weight[64:80] = key, first


def key_and_value_exchanged(tensors: Tensors) -> None:
    weight = tensors[f"{LAYER}.attention.qkv.weight"]
    weight[64:] = weight[64:].roll(16, dims=0)


def rolled(name: str, by: int, dim: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"].roll(by, dims=dim)

    return change


def scaled(name: str, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"] * factor

    return change


def nibbles_exchanged(tensors: Tensors) -> None:
    import torch

    packed = tensors[f"{LAYER}.mlp.proj.weight"].view(torch.uint8)
    tensors[f"{LAYER}.mlp.proj.weight"] = ((packed << 4) | (packed >> 4)).view(torch.int8)


def key_head_of_the_neighbour(directory: Path) -> None:
    """Rank 1 of 4 gets the key and value that ranks 2 and 3 hold: 2 query, 1 key and 1 value head of 16 rows."""
    from safetensors.torch import load_file

    name = f"{LAYER}.attention.qkv.weight"
    other = load_file(directory / "rank2.safetensors")[name]
    in_rank(1, lambda tensors: tensors[name][32:].copy_(other[32:]))(directory)


def ranks_exchanged(directory: Path) -> None:
    first, second = directory / "rank0.safetensors", directory / "rank1.safetensors"
    first.rename(directory / "kept")
    second.rename(first)
    (directory / "kept").rename(second)


def rank_lost(directory: Path) -> None:
    (directory / "rank1.safetensors").unlink()


def rank_repeated(directory: Path) -> None:
    shutil.copyfile(directory / "rank0.safetensors", directory / "rank1.safetensors")


def experts_exchanged(tensors: Tensors) -> None:
    weight = tensors[f"{LAYER}.mlp.proj.weight"]
    weight[[0, 1]] = weight[[1, 0]]


def up_and_gate_of_experts_exchanged(tensors: Tensors) -> None:
    weight = tensors[f"{LAYER}.mlp.fc.weight"]
    tensors[f"{LAYER}.mlp.fc.weight"] = weight.roll(weight.shape[1] // 2, dims=1)


def tensor_removed(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.mlp.proj.weights_scaling_factor"]


@dataclass(frozen=True)
class Planted:
    model: str
    scheme: str
    mapping: Mapping
    plant: Callable[[Path], None]


TP2, TP4, PP3 = Mapping(tensor=2), Mapping(tensor=4), Mapping(pipeline=3)
FAULTS = {
    "a head of q and k exchanged": Planted("llama", "none", TP2, in_every_rank(query_and_key_exchanged)),
    "k and v exchanged": Planted("llama", "fp8", TP2, in_rank(1, key_and_value_exchanged)),
    "gate and up exchanged": Planted("llama", "none", TP2, in_every_rank(exchanged(f"{LAYER}.mlp.fc.weight", f"{LAYER}.mlp.gate.weight"))),
    "gate and up exchanged in one rank": Planted("llama", "int8_sq", TP2, in_rank(0, exchanged(f"{LAYER}.mlp.fc.weight", f"{LAYER}.mlp.gate.weight"))),
    "norms exchanged": Planted("llama", "none", TP2, in_every_rank(exchanged(f"{LAYER}.input_layernorm.weight", f"{LAYER}.post_layernorm.weight"))),
    "a norm of one rank": Planted("llama", "none", TP2, in_rank(1, rolled("input_layernorm.weight", 1, 0))),
    "nibble order": Planted("llama", "int4_awq", TP2, in_rank(1, nibbles_exchanged)),
    "nibble order under FP8": Planted("llama", "w4a8_awq", TP2, in_rank(1, nibbles_exchanged)),
    "scale of the neighbouring group": Planted("llama", "int4_awq", TP2, in_rank(0, rolled("mlp.proj.weights_scaling_factor", 1, 1))),
    "scale of the neighbouring row": Planted("llama", "int8_sq", TP2, in_rank(0, rolled("mlp.fc.weights_scaling_factor", 1, 0))),
    "smoothing of the neighbouring channel": Planted("llama", "int8_sq", TP2, in_rank(1, rolled("attention.dense.prequant_scaling_factor", 1, 0))),
    "weight scale": Planted("llama", "fp8", TP2, in_rank(1, scaled("mlp.gate.weights_scaling_factor", 1.25))),
    "second weight scale": Planted("llama", "w4a8_awq", TP2, in_rank(1, scaled("mlp.proj.weights_scaling_factor_2", 0.5))),
    "activation scale": Planted("llama", "fp8", TP2, in_rank(0, scaled("attention.dense.activation_scaling_factor", 0.3))),
    "cache scale": Planted("llama", "int8_sq-kvint8", TP2, in_every_rank(scaled("attention.kv_cache_scaling_factor", 3.0))),
    "RoPE base": Planted("llama", "none", TP2, in_config(rotary_base=500000.0)),
    "RoPE scaling lost": Planted("llama_rope", "none", TP2, in_config(rotary_scaling=None)),
    "rank lost": Planted("llama", "none", TP2, rank_lost),
    "rank repeated": Planted("llama", "none", TP2, rank_repeated),
    "ranks exchanged": Planted("llama", "none", TP2, ranks_exchanged),
    "stages exchanged": Planted("llama", "none", PP3, ranks_exchanged),
    "key-value head of the neighbour": Planted("llama", "none", TP4, key_head_of_the_neighbour),
    "tensor lost": Planted("llama", "int8_sq", TP2, in_rank(1, tensor_removed)),
    "algorithm not said": Planted("llama", "fp8", TP2, in_config(quantization={"quant_algo": None})),
    "head norms exchanged": Planted("qwen3", "none", TP2, in_every_rank(exchanged(f"{LAYER}.attention.q_layernorm.weight", f"{LAYER}.attention.k_layernorm.weight"))),
    "bias of the neighbouring row": Planted("qwen2", "none", TP2, in_rank(0, rolled("attention.qkv.bias", 1, 0))),
    "experts exchanged": Planted("mixtral", "none", TP2, in_every_rank(experts_exchanged)),
    "experts exchanged in one rank": Planted("qwen3_moe", "none", Mapping(tensor=2, expert=2), in_rank(1, experts_exchanged)),
    "up and gate of experts exchanged": Planted("mixtral", "none", TP2, in_rank(0, up_and_gate_of_experts_exchanged)),
    "router of one rank": Planted("qwen2_moe", "none", TP2, in_rank(1, rolled("mlp.router.weight", 1, 0))),
    "gate and up of the shared expert exchanged": Planted("qwen2_moe", "none", TP2, in_every_rank(rolled("mlp.shared_expert.fc.weight", 48, 0))),
    "routing weights not normalized": Planted("mixtral", "none", TP2, in_config(moe={"num_experts": 4, "top_k": 2, "normalization_mode": 0})),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(fault: Planted, workshop: Workshop, tmp_path: Path) -> None:
    convert_checkpoint(workshop.source(fault.model, fault.scheme), tmp_path / "out", mapping=fault.mapping)
    expected = workshop.logits(fault.model, fault.scheme)
    assert relative_error(Interpreter(tmp_path / "out").logits(TOKENS), expected) <= TOLERANCE

    fault.plant(tmp_path / "out")

    try:
        seen = Interpreter(tmp_path / "out").logits(TOKENS)
    except CheckpointRefusedError:
        return
    assert relative_error(seen, expected) > FAULT
