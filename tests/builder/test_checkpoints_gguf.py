"""GGUF to canonical checkpoint: weights against transformers' own loader, tokens against the original tokenizer."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import CHAT_TEMPLATE, tiny_checkpoint, tiny_gguf

from enginesmith.checkpoints.gguf import checkpoint_from_gguf
from enginesmith.checkpoints.gguf_tokenizer import write_tokenizer
from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.errors import SourceError

SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32},
    "Qwen2ForCausalLM": {"hidden": 128, "heads": 8, "kv_heads": 2, "head_dim": 16, "tied": True},
    # transformers 5.14 does not read Qwen3's head size from GGUF, so the comparison needs its default of 128.
    "Qwen3ForCausalLM": {"hidden": 128, "heads": 2, "kv_heads": 1, "head_dim": 128},
}


def ignore_progress(fraction: float | None, note: str = "") -> None:
    """A report that nobody reads."""


def converted(path: Path, out: Path, **options: Any) -> CheckpointTensors:
    out.mkdir()
    checkpoint_from_gguf(path, out, report=ignore_progress, **options)
    return CheckpointTensors(out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), **SHAPES["LlamaForCausalLM"])


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize(("quantization", "dtype"), [("Q8_0", "bfloat16"), ("Q4_1", "float32")])
def test_weights_equal_those_of_transformers_loader_bit_for_bit(
    architecture: Any, quantization: str, dtype: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint(tmp_path / "hf", architecture=architecture, **SHAPES[architecture])
    path = tiny_gguf(source, tmp_path / "tiny.gguf", quantization=quantization)
    ours = converted(path, tmp_path / "out", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    if ours.config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert ours.names() == sorted(theirs)
    for name in ours.names():
        expected = theirs[name].to(getattr(torch, dtype)).reshape(-1).view(torch.uint8).numpy()
        assert ours.read(name).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"qkv_bias": True, "head_dim": 32}),
        ("Qwen2ForCausalLM", {"tied": True}),
        ("Qwen3ForCausalLM", {"head_dim": 32, "qkv_bias": True}),
    ],
)
def test_unquantized_gguf_gives_back_the_original_checkpoint(
    architecture: Any, options: dict[str, Any], quantization: str, tmp_path: Path
) -> None:
    dtype: Any = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[quantization]
    source = tiny_checkpoint(tmp_path / "hf", architecture=architecture, dtype=dtype, **options)
    path = tiny_gguf(source, tmp_path / "tiny.gguf", quantization=quantization)
    ours, original = converted(path, tmp_path / "out", dtype=dtype), CheckpointTensors(source)
    assert ours.names() == original.names()
    assert all(ours.read(name).tobytes() == original.read(name).tobytes() for name in ours.names())
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "eos_token_id"):
        assert ours.config[key] == original.config[key]
    assert ours.config["head_dim"] == original.config.get("head_dim", 16)


def test_pieces_smaller_than_a_tensor_give_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(llama, tmp_path / "tiny.gguf", quantization="Q4_0")
    whole = converted(path, tmp_path / "whole")
    monkeypatch.setattr("enginesmith.checkpoints.writer.PIECE_ELEMENTS", 1000)
    pieced = converted(path, tmp_path / "pieced")
    assert whole.files()[0].read_bytes() == pieced.files()[0].read_bytes()


def test_llama3_rope_factors_become_rope_scaling_that_transformers_computes_alike(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = (plain / scaled.numpy()).astype(np.float32)
    source = tiny_checkpoint(tmp_path / "hf", heads=2, kv_heads=1, head_dim=64)
    with_factors = {"llama__rope__freq_base": 500000.0, "rope_freqs": factors}
    path = tiny_gguf(source, tmp_path / "tiny.gguf", **with_factors)
    assert converted(path, tmp_path / "out").config["rope_parameters"] == scaling
    odd = tiny_gguf(source, tmp_path / "odd.gguf", **(with_factors | {"rope_freqs": factors * 1.1}))
    with pytest.raises(SourceError, match="not Llama 3's"):
        converted(odd, tmp_path / "odd")


def test_tokenizer_encodes_as_the_original_and_keeps_special_tokens_and_template(
    llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    converted(tiny_gguf(llama, tmp_path / "tiny.gguf"), tmp_path / "out")
    ours, original = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", llama))
    text = "".join(pydoc_data.topics.topics.values())[:50_000] + "<|im_start|>naïve 東京 12345<|im_end|>"
    assert ours(text)["input_ids"] == original(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    for kind in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, kind) == getattr(original, kind)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["in", "Ġ2024"]),
        ("smollm", ["in", "Ġ", "2", "0", "2", "4"]),
        ("qwen2", ["in", "Ġ", "2", "0", "2", "4"]),
        ("llama-bpe", ["in", "Ġ", "202", "4"]),
    ],
)
def test_text_is_cut_as_the_named_pre_tokenizer_does(
    pre: str, pieces: list[str], llama: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    converted(tiny_gguf(llama, tmp_path / "tiny.gguf", tokenizer__ggml__pre=pre), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("in 2024")] == pieces


def test_sentencepiece_tokens_equal_those_of_transformers_converter(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers.integrations.ggml import convert_gguf_tokenizer

    words = ["▁the", "▁a", "the", "he", "▁t", "▁m", "mo", "mod", "model", "▁model", "de", "el", "del"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(words) + len(letters))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    write_tokenizer(
        {f"tokenizer.ggml.{key}": value for key, value in fields.items()}, tmp_path, origin=Path("x.gguf")
    )
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs, _ = convert_gguf_tokenizer(
        "llama", {key: value for key, value in fields.items() if key != "model"}
    )
    for text in ("the model modelled a mode", "a  b", "naïve 東京", ""):
        encoded = ours.encode(text)
        assert encoded.ids[0] == 1
        assert encoded.ids[1:] == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(encoded.ids) == text
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
        ({"llama__attention__sliding_window": 512}, "sliding_window = 512"),
        ({"llama__block_count": 3}, r"lacks tensor model\.layers\.2\."),
        ({"llama__block_count": 1}, r"holds unexpected tensor model\.layers\.1\."),
        ({"llama__embedding_length": None}, "hidden_size must be a whole number"),
        ({"llama__feed_forward_length": 96}, "shape"),
        ({"tokenizer__ggml__pre": "brand-new"}, "'brand-new'.*known: default"),
        ({"tokenizer__ggml__model": "bert"}, "kind 'bert'; supported: gpt2"),
        ({"tokenizer__ggml__tokens": None}, "holds no tokenizer"),
        ({"tokenizer__ggml__eos_token_id": 9999}, "eos_token_id is 9999.*512 tokens"),
        ({"split__count": 3}, "one part of a split GGUF"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    overrides: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    path = tiny_gguf(llama, tmp_path / "tiny.gguf", **overrides)
    with pytest.raises(SourceError, match=message):
        converted(path, tmp_path / "out")


def test_unknown_architecture_names_the_supported_ones(llama: Path, tmp_path: Path) -> None:
    path = tiny_gguf(llama, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(SourceError, match=r"'mamba'; supported: llama, qwen2, qwen3"):
        converted(path, tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 3, 200, 20_000, -100])
def test_truncated_file_is_refused(kept: int, llama: Path, tmp_path: Path) -> None:
    path = tiny_gguf(llama, tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match="is not a whole GGUF file"):
        converted(path, tmp_path / "out")
