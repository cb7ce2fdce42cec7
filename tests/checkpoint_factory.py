"""Tiny random checkpoints of every supported architecture, with a small real tokenizer, for tests.

Weights are drawn wide (standard deviation 0.15) and norms around 1, so that logits differ from token to token
and a swapped, transposed or unscaled tensor changes them.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any, Literal

Architecture = Literal[
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
]

VOCAB_SIZE = 512
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_checkpoint(
    directory: Path,
    *,
    architecture: Architecture = "LlamaForCausalLM",
    tied: bool = False,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    rope_scaling: Literal["llama3"] | None = None,
    sliding_window: int | None = None,
    qkv_bias: bool = False,
    seed: int = 0,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    shards: int = 1,
    experts: int = 4,
    experts_per_token: int = 2,
    expert_intermediate: int = 32,
    shared_intermediate: int = 96,
    **config_keys: Any,
) -> Path:
    """``directory``, filled with a random checkpoint in Hugging Face format. The same arguments give the same bytes.

    ``experts`` and what follows shape the mixture-of-experts architectures alone; Mixtral's experts have the
    ``intermediate`` size. ``config_keys`` are further keys of the config, e.g. ``norm_topk_prob=True``.

    ``qkv_bias`` adds projection biases to Llama and Qwen3 (theirs include the output projection); Qwen2 always has
    them on q, k and v, Mistral has none. ``sliding_window`` limits attention in Mistral and, in every layer, Qwen.
    """
    import torch
    import transformers

    config = _config(
        architecture,
        tie_word_embeddings=tied,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_parameters=LLAMA3_ROPE if rope_scaling else {"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=sliding_window,
        qkv_bias=qkv_bias,
        **_moe_keys(architecture, experts, experts_per_token, expert_intermediate, shared_intermediate),
        **config_keys,
    )
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    write_tokenizer(directory)
    if shards > 1:
        split_into_shards(directory, shards)
    return directory


def _moe_keys(
    architecture: Architecture, experts: int, experts_per_token: int, intermediate: int, shared: int
) -> dict[str, Any]:
    if architecture == "MixtralForCausalLM":
        return {"num_local_experts": experts, "num_experts_per_tok": experts_per_token}
    if not architecture.endswith("MoeForCausalLM"):
        return {}
    keys = {
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": intermediate,
    }
    return keys | (
        {"shared_expert_intermediate_size": shared} if architecture == "Qwen2MoeForCausalLM" else {}
    )


def write_tokenizer(directory: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a byte-level BPE with 512 tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def split_into_shards(directory: Path, shards: int) -> None:
    """Replace ``model.safetensors`` by exactly ``shards`` files and an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _config(architecture: Architecture, *, sliding_window: int | None, qkv_bias: bool, **shape: Any) -> Any:
    import transformers

    config_class = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")
    options: dict[str, Any] = {}
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        options["sliding_window"] = sliding_window
    elif architecture.startswith("Qwen") and sliding_window is not None:
        options |= {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 0}
    elif sliding_window is not None:
        raise ValueError(f"{architecture} has no sliding window")
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        options["attention_bias"] = qkv_bias
    elif qkv_bias and architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        raise ValueError(f"{architecture} has no projection biases")
    if (
        architecture in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")
        and shape["head_dim"] * shape["num_attention_heads"] == shape["hidden_size"]
    ):
        del shape["head_dim"]
    return config_class(
        **shape,
        **options,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()


def tiny_gguf(
    checkpoint: Path, path: Path, *, quantization: str = "Q8_0", rope_freqs: Any = None, **overrides: Any
) -> Path:
    """``path``, written as the GGUF form of the tiny checkpoint in ``checkpoint``: matrices in ``quantization``.

    ``overrides`` replace key-value pairs by their full GGUF name with dots written as double underscores; None leaves
    a pair out. ``rope_freqs`` (float32 [head_dim / 2]) is stored as the tensor of that name. The layout follows llama.cpp's convert_hf_to_gguf.py: rows of q and k are paired for ``llama``.
    """
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    pairs = _gguf_pairs(checkpoint, config, arch, head_dim)
    pairs |= {key.replace("__", "."): value for key, value in overrides.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in pairs.items():
        if value is not None:
            _add_pair(writer, key, value)
    matrix_type = gguf.GGMLQuantizationType[quantization]
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config["num_hidden_layers"]
    )
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        data = tensor.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = data.reshape(-1, 2, head_dim // 2, *data.shape[1:])
            data = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))
        base, kind = name.rsplit(".", 1)
        raw_type = matrix_type if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(base)}.{kind}", gguf.quantize(data, raw_type), raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_pairs(checkpoint: Path, config: dict[str, Any], arch: str, head_dim: int) -> dict[str, Any]:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": config["vocab_size"],
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add_pair(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
