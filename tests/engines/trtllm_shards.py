"""Random Hugging Face checkpoints in any algorithm, and ranks put together again, written from the format's description.

Neither uses the writer's code. ``random_checkpoint`` draws integers and scales directly, so nothing is calibrated;
``gathered`` inverts TensorRT-LLM's sharding by the rules of its ``mapping.py`` and its layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a random checkpoint."""

    architecture: str = "LlamaForCausalLM"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 48
    ffn: int = 32
    vocab: int = 50
    tied: bool = False
    bias: bool = False
    experts: int = 0
    shared_ffn: int = 0
    algorithm: str = "none"
    group_size: int = 8
    smoothing: bool = True
    """Whether AWQ's vectors are stored for q, k, v, gate and up, or folded into the norms."""

    @property
    def qwen_moe(self) -> bool:
        """Whether experts are named as Qwen names them."""
        return self.architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")

    def expert(self, layer: int, number: int) -> dict[str, str]:
        """Module names of one expert by role."""
        base = f"model.layers.{layer}"
        if self.qwen_moe:
            return {role: f"{base}.mlp.experts.{number}.{role}_proj" for role in ("gate", "up", "down")}
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        return {role: f"{base}.block_sparse_moe.experts.{number}.{name}" for role, name in names.items()}

    def router(self, layer: int) -> str:
        """The router's module name."""
        return f"model.layers.{layer}.{'mlp' if self.qwen_moe else 'block_sparse_moe'}.gate"


def random_checkpoint(directory: Path, geometry: Geometry, *, seed: int = 0, **config: Any) -> Path:
    """``directory``, filled with a random unified checkpoint; ``config`` overrides keys of ``config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(geometry, seed=seed)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(hf_config(geometry) | config))
    if geometry.algorithm != "none":
        describe(directory, geometry.algorithm, group_size=geometry.group_size)
    return directory


def describe(directory: Path, algorithm: str, **section: Any) -> None:
    """Write ``hf_quant_config.json`` as ModelOpt does."""
    quantization = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "model.embed_tokens", "*gate", "*shared_expert_gate"],
        **section,
    }
    document = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(document))


def hf_config(geometry: Geometry) -> dict[str, Any]:
    """A ``config.json`` as transformers 5 writes it."""
    config: dict[str, Any] = {
        "architectures": [geometry.architecture],
        "model_type": _MODEL_TYPES[geometry.architecture],
        "hidden_act": "silu",
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.ffn,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "vocab_size": geometry.vocab,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": geometry.tied,
        "sliding_window": None,
    }
    if geometry.architecture == "LlamaForCausalLM":
        config |= {"attention_bias": geometry.bias, "mlp_bias": geometry.bias}
    if geometry.experts:
        count = "num_experts" if geometry.qwen_moe else "num_local_experts"
        config |= {count: geometry.experts, "num_experts_per_tok": min(2, geometry.experts)}
        config |= {"moe_intermediate_size": geometry.ffn, "norm_topk_prob": True}
        if geometry.shared_ffn:
            config["shared_expert_intermediate_size"] = geometry.shared_ffn
    return config


def random_tensors(geometry: Geometry, *, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its Hugging Face name."""
    draw = _Draw(geometry, seed)
    hidden = geometry.hidden
    draw.plain("model.embed_tokens.weight", (geometry.vocab, hidden))
    draw.plain("model.norm.weight", (hidden,))
    if not geometry.tied:
        draw.plain("lm_head.weight", (geometry.vocab, hidden))
    query, key = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    qkv_bias = geometry.bias or geometry.architecture.startswith("Qwen2")
    for layer in range(geometry.layers):
        base = f"model.layers.{layer}"
        draw.plain(f"{base}.input_layernorm.weight", (hidden,))
        draw.plain(f"{base}.post_attention_layernorm.weight", (hidden,))
        draw.group(
            [f"{base}.self_attn.{kind}_proj" for kind in "qkv"], [query, key, key], hidden, bias=qkv_bias
        )
        draw.group([f"{base}.self_attn.o_proj"], [hidden], query, bias=geometry.bias, after_norm=False)
        if geometry.architecture.startswith("Qwen3"):
            for kind in "qk":
                draw.plain(f"{base}.self_attn.{kind}_norm.weight", (geometry.head_dim,))
        if geometry.experts:
            draw.experts(layer)
        else:
            draw.gated(f"{base}.mlp", geometry.ffn, bias=geometry.bias)
    return draw.tensors


class _Draw:
    """Draws tensors; layers that read the same input share scales of the input."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._geometry = geometry
        self._generator = torch.Generator().manual_seed(seed)

    def plain(self, name: str, shape: tuple[int, ...]) -> None:
        self.tensors[name] = self._normal(shape).to(torch.bfloat16)

    def gated(self, base: str, size: int, *, bias: bool = False) -> None:
        hidden = self._geometry.hidden
        self.group([f"{base}.gate_proj", f"{base}.up_proj"], [size, size], hidden, bias=bias)
        self.group([f"{base}.down_proj"], [hidden], size, bias=bias, after_norm=False)

    def experts(self, layer: int) -> None:
        geometry = self._geometry
        self.plain(f"{geometry.router(layer)}.weight", (geometry.experts, geometry.hidden))
        names = [geometry.expert(layer, number) for number in range(geometry.experts)]
        ups = [expert[role] for expert in names for role in ("gate", "up")]
        self.group(ups, [geometry.ffn] * len(ups), geometry.hidden)
        downs = [expert["down"] for expert in names]
        self.group(downs, [geometry.hidden] * len(downs), geometry.ffn, after_norm=False)
        if geometry.shared_ffn:
            self.gated(f"model.layers.{layer}.mlp.shared_expert", geometry.shared_ffn)
            self.plain(f"model.layers.{layer}.mlp.shared_expert_gate.weight", (1, geometry.hidden))

    def group(
        self, names: list[str], rows: list[int], columns: int, *, bias: bool = False, after_norm: bool = True
    ) -> None:
        """Layers that share their input."""
        algorithm = self._geometry.algorithm
        smoothing = (self._normal((columns,)).abs() + 0.5).to(torch.bfloat16)
        input_scale = self._normal(()).abs() + 0.01
        stored = algorithm == "W8A8_SQ_PER_CHANNEL" or (
            algorithm.endswith("AWQ") and (self._geometry.smoothing or not after_norm)
        )
        for name, count in zip(names, rows, strict=True):
            self._weight(name, count, columns)
            if bias:
                self.plain(f"{name}.bias", (count,))
            if stored:
                self.tensors[f"{name}.pre_quant_scale"] = smoothing.clone()
            if algorithm in ("W8A8_SQ_PER_CHANNEL", "FP8", "W4A8_AWQ"):
                self.tensors[f"{name}.input_scale"] = input_scale.clone()

    def _weight(self, name: str, rows: int, columns: int) -> None:
        match self._geometry.algorithm:
            case "none":
                self.plain(f"{name}.weight", (rows, columns))
            case "W8A16" | "W8A8_SQ_PER_CHANNEL":
                self._codes(name, rows, columns, torch.int8)
                # As after calibration: 127 steps are a weight, and that has the model's dtype.
                largest = self._scales((rows,)).to(torch.bfloat16).float()
                self.tensors[f"{name}.weight_scale"] = largest / 127
            case "FP8":
                values = self._normal((rows, columns)) * 60
                self.tensors[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
                self.tensors[f"{name}.weight_scale"] = self._scales(())
            case "W4A16_AWQ" | "W4A8_AWQ":
                self._codes(name, rows // 2, columns, torch.uint8)
                groups = columns // self._geometry.group_size
                self.tensors[f"{name}.weight_scale"] = self._scales((rows, groups))
                if self._geometry.algorithm == "W4A8_AWQ":
                    self.tensors[f"{name}.weight_scale_2"] = self._scales(())

    def _codes(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
        low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
        codes = torch.randint(low, high, (rows, columns), generator=self._generator).to(dtype)
        if dtype == torch.int8:
            codes[:, 0] = 127  # As after calibration: the largest weight of a row has the largest code.
        self.tensors[f"{name}.weight"] = codes

    def _scales(self, shape: tuple[int, ...]) -> torch.Tensor:
        return (self._normal(shape).abs() + 0.1) / 100

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def load_ranks(directory: Path) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """``config.json`` and the tensors of every rank of a TensorRT-LLM checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    count = config["mapping"]["world_size"]
    return config, [load_file(directory / f"rank{rank}.safetensors") for rank in range(count)]


def gathered(directory: Path, geometry: Geometry) -> dict[str, torch.Tensor]:
    """The source's tensors by Hugging Face name, with TensorRT-LLM's last names, put together from all ranks.

    Raises:
        AssertionError: ranks disagree about what they hold together, or hold something that belongs nowhere.
    """
    config, ranks = load_ranks(directory)
    return _Gather(config, ranks, geometry).run()


class _Gather:
    """Takes tensors out of ranks and puts them together; at the end every rank must be empty."""

    def __init__(
        self, config: dict[str, Any], ranks: list[dict[str, torch.Tensor]], geometry: Geometry
    ) -> None:
        mapping = config["mapping"]
        self._geometry = geometry
        self._tensor, self._pipeline = mapping["tp_size"], mapping["pp_size"]
        self._expert, self._expert_tensor = mapping["moe_ep_size"], mapping["moe_tp_size"]
        self._ranks = ranks
        self._found: dict[str, torch.Tensor] = {}

    def run(self) -> dict[str, torch.Tensor]:
        first, last = self._stage(0), self._stage(self._pipeline - 1)
        vocab = self._geometry.vocab
        self._found["model.embed_tokens.weight"] = self._vocabulary(
            first, "transformer.vocab_embedding.weight"
        )[:vocab]
        self._found["lm_head.weight"] = self._vocabulary(last, "lm_head.weight")[:vocab]
        self._same(last, "transformer.ln_f.weight", "model.norm.weight")
        # The first stages have one layer more when the layers cannot be split evenly.
        for stage, layers in enumerate(np.array_split(range(self._geometry.layers), self._pipeline)):
            for local, layer in enumerate(layers):
                self._layer(self._stage(stage), f"transformer.layers.{local}", int(layer))
        assert not any(self._ranks), f"left over: {sorted({name for rank in self._ranks for name in rank})}"
        return self._found

    def _stage(self, stage: int) -> list[dict[str, torch.Tensor]]:
        return self._ranks[stage * self._tensor : (stage + 1) * self._tensor]

    def _vocabulary(self, ranks: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
        whole = torch.cat([rank.pop(name) for rank in ranks])
        assert len(whole) == -(-self._geometry.vocab // self._tensor) * self._tensor
        assert not whole[self._geometry.vocab :].any(), "padding must be zeros"
        return whole

    def _layer(self, ranks: list[dict[str, torch.Tensor]], base: str, layer: int) -> None:
        source = f"model.layers.{layer}"
        self._same(ranks, f"{base}.input_layernorm.weight", f"{source}.input_layernorm.weight")
        self._same(ranks, f"{base}.post_layernorm.weight", f"{source}.post_attention_layernorm.weight")
        self._qkv(ranks, f"{base}.attention", f"{source}.self_attn")
        self._by_columns(ranks, f"{base}.attention.dense", f"{source}.self_attn.o_proj")
        for kind in "qk":
            name = f"{base}.attention.{kind}_layernorm.weight"
            if name in ranks[0]:
                self._same(ranks, name, f"{source}.self_attn.{kind}_norm.weight")
        if self._geometry.experts:
            self._experts(ranks, f"{base}.mlp", layer)
            return
        self._by_rows(ranks, f"{base}.mlp.fc", [f"{source}.mlp.gate_proj"])
        self._by_rows(ranks, f"{base}.mlp.gate", [f"{source}.mlp.up_proj"])
        self._by_columns(ranks, f"{base}.mlp.proj", f"{source}.mlp.down_proj")

    def _same(self, ranks: list[dict[str, torch.Tensor]], name: str, source: str) -> None:
        copies = [rank.pop(name) for rank in ranks]
        assert all(equal(copies[0], other) for other in copies), f"ranks differ in {name}"
        self._found[source] = copies[0]

    def _qkv(self, ranks: list[dict[str, torch.Tensor]], base: str, source: str) -> None:
        heads, kv_heads = self._geometry.heads, self._geometry.kv_heads
        local = [heads // self._tensor, *[max(1, kv_heads // self._tensor)] * 2]
        for suffix in _row_suffixes(ranks[0], f"{base}.qkv"):
            shards = [rank.pop(f"{base}.qkv.{suffix}") for rank in ranks]
            rows = len(shards[0]) // sum(local)  # Of one head; half of them where pairs are packed.
            pieces = [shard.split([count * rows for count in local]) for shard in shards]
            repeats = max(1, self._tensor // kv_heads)
            for index, kind in enumerate("qkv"):
                parts = [piece[index] for piece in pieces]
                if index and repeats > 1:
                    assert all(
                        equal(part, parts[rank // repeats * repeats]) for rank, part in enumerate(parts)
                    )
                    parts = parts[::repeats]
                self._found[f"{source}.{kind}_proj.{suffix}"] = cat(parts)
        for suffix in _shared_suffixes(ranks[0], f"{base}.qkv"):
            for kind in "qkv":
                self._found[f"{source}.{kind}_proj.{suffix}"] = ranks[0][f"{base}.qkv.{suffix}"]
            self._same(ranks, f"{base}.qkv.{suffix}", f"{source}.q_proj.{suffix}")

    def _by_rows(self, ranks: list[dict[str, torch.Tensor]], name: str, sources: list[str]) -> None:
        for suffix in _row_suffixes(ranks[0], name):
            shards = [rank.pop(f"{name}.{suffix}").chunk(len(sources)) for rank in ranks]
            for index, source in enumerate(sources):
                self._found[f"{source}.{suffix}"] = cat([shard[index] for shard in shards])
        for suffix in _shared_suffixes(ranks[0], name):
            for source in sources:
                self._found[f"{source}.{suffix}"] = ranks[0][f"{name}.{suffix}"]
            self._same(ranks, f"{name}.{suffix}", f"{sources[0]}.{suffix}")

    def _by_columns(self, ranks: list[dict[str, torch.Tensor]], name: str, source: str) -> None:
        for suffix in [key.removeprefix(f"{name}.") for key in list(ranks[0]) if key.startswith(f"{name}.")]:
            split = suffix == "weight" or (
                self._geometry.algorithm.endswith("AWQ") and suffix == "weights_scaling_factor"
            )
            if split or suffix == "prequant_scaling_factor":
                shards = [rank.pop(f"{name}.{suffix}") for rank in ranks]
                self._found[f"{source}.{suffix}"] = cat(shards, dim=-1)
            else:
                self._same(ranks, f"{name}.{suffix}", f"{source}.{suffix}")

    def _experts(self, ranks: list[dict[str, torch.Tensor]], base: str, layer: int) -> None:
        self._same(ranks, f"{base}.router.weight", f"{self._geometry.router(layer)}.weight")
        share = self._geometry.experts // self._expert
        names = [self._geometry.expert(layer, number) for number in range(self._geometry.experts)]
        for group in range(self._expert):
            owners = ranks[group :: self._expert]
            assert len(owners) == self._expert_tensor
            for local in range(share):
                picked = [_expert_of(rank, base, local) for rank in owners]
                expert = names[group * share + local]
                self._by_rows(picked, f"{base}.fc", [expert["up"], expert["gate"]])
                self._by_columns(picked, f"{base}.proj", expert["down"])
                assert not any(picked), f"left over: {sorted(picked[0])}"
        for rank in ranks:
            for name in [name for name in rank if name.startswith((f"{base}.fc.", f"{base}.proj."))]:
                del rank[name]
        if self._geometry.shared_ffn:
            source = f"model.layers.{layer}.mlp.shared_expert"
            self._by_rows(ranks, f"{base}.shared_expert.fc", [f"{source}.up_proj", f"{source}.gate_proj"])
            self._by_columns(ranks, f"{base}.shared_expert.proj", f"{source}.down_proj")
            self._same(ranks, f"{base}.shared_expert_gate.weight", f"{source}_gate.weight")


def _expert_of(rank: dict[str, torch.Tensor], base: str, number: int) -> dict[str, torch.Tensor]:
    """One expert's part of the stacked tensors; the scale of the input is not stacked."""
    names = [name for name in rank if name.startswith((f"{base}.fc.", f"{base}.proj."))]
    return {
        name: rank[name] if name.endswith("activation_scaling_factor") else rank[name][number]
        for name in names
    }


def _row_suffixes(rank: dict[str, torch.Tensor], name: str) -> list[str]:
    """Last names of the tensors that have a row for each output."""
    present = [key.removeprefix(f"{name}.") for key in rank if key.startswith(f"{name}.")]
    return [
        suffix
        for suffix in present
        if suffix in ("weight", "bias")
        or (suffix == "weights_scaling_factor" and rank[f"{name}.{suffix}"].numel() > 1)
    ]


def _shared_suffixes(rank: dict[str, torch.Tensor], name: str) -> list[str]:
    present = [key.removeprefix(f"{name}.") for key in rank if key.startswith(f"{name}.")]
    return [suffix for suffix in present if suffix not in _row_suffixes(rank, name)]


def cat(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """``torch.cat``, for FP8 as well."""
    if parts[0].dtype != torch.float8_e4m3fn:
        return torch.cat(parts, dim)
    return torch.cat([part.view(torch.uint8) for part in parts], dim).view(torch.float8_e4m3fn)


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same: shape, dtype and every bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(
        left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    )
