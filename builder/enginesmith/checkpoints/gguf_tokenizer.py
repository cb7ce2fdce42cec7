"""The tokenizer inside a GGUF file as Hugging Face tokenizer files.

Owns the meaning of ``tokenizer.ggml.*``. transformers' own reader splits all byte-level text with GPT-2's pattern
and takes the beginning-of-sequence token for the end-of-sequence token (``GGUFLlamaConverter`` in 5.14), so a
model would see other tokens than it was trained on and would not stop; it can be used again once both are right.

Pre-tokenizers by name: ``llama_vocab::impl::load`` in llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from enginesmith.checkpoints.canonical import write_json
from enginesmith.checkpoints.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from enginesmith.errors import SourceError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

_Splitting = Literal["gpt2", "digits", "llama3", "qwen2"]
_PRE_TOKENIZERS: Mapping[str, _Splitting] = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
"""How text is cut before merges apply, by ``tokenizer.ggml.pre``."""

_CONTROL, _USER_DEFINED = 3, 4  # llama_token_type
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_tokenizer(metadata: Mapping[str, Any], out: Path, *, origin: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and, where GGUF has one, ``chat_template.jinja``.

    ``metadata`` is the GGUF file's key-value section; ``origin`` names the file in messages.

    Raises:
        SourceError: the file has no tokenizer, or one of a kind that is not known.
    """
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if not fields.get("tokens"):
        raise SourceError(
            f"{origin} holds no tokenizer", hint="use a GGUF file made from a whole model directory"
        )
    match fields.get("model"):
        case "gpt2":
            tokenizer = _byte_level_tokenizer(fields, origin)
        case "llama":
            tokenizer = _sentencepiece_tokenizer(fields, origin)
        case kind:
            raise SourceError(
                f"{origin} has a tokenizer of kind {kind!r}; supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
            )
    _add_marked_tokens(tokenizer, fields)
    _add_sequence_marks(tokenizer, fields)
    special = _special_tokens(fields, origin)
    tokenizer.save(str(out / TOKENIZER_FILE))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    context_length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context_length is not None:
        config["model_max_length"] = context_length
    write_json(out / TOKENIZER_CONFIG_FILE, config)
    template = metadata.get("tokenizer.chat_template")
    if template:
        (out / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _byte_level_tokenizer(fields: Mapping[str, Any], origin: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.get("pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise SourceError(
            f"{origin} cuts text the way {name!r} does, which is not known; known: {', '.join(_PRE_TOKENIZERS)}",
            hint="use the model's original Hugging Face checkpoint instead",
        )
    splitting = _PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", ())]
    vocabulary = {token: index for index, token in enumerate(fields["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting == "llama3"))
    prefix_space = bool(fields.get("add_space_prefix", False))
    match splitting:
        case "gpt2" | "digits":
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = (
                byte_level if splitting == "gpt2" else pre_tokenizers.Sequence([digits, byte_level])
            )
        case "llama3" | "qwen2":
            pattern = Regex(_LLAMA3_PATTERN if splitting == "llama3" else _QWEN2_PATTERN)
            split = pre_tokenizers.Split(pattern, behavior="isolated")
            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    if splitting == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(fields: Mapping[str, Any], origin: Path) -> Tokenizer:
    """SentencePiece BPE as Llama 2's ``tokenizer.json`` expresses it: merges in the order of the pieces' scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = fields["tokens"], fields.get("scores", ())
    if len(scores) != len(tokens):
        raise SourceError(f"{origin} has {len(tokens)} tokens but {len(scores)} scores; each token needs one")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (score, vocabulary[left], vocabulary[right], left, right)
        for token, score in zip(tokens, scores, strict=True)
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in vocabulary and right in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    unknown = fields.get("unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, _, _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(fields.get("add_space_prefix", True))
    space = "▁"
    replace = normalizers.Replace(" ", space)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prefix else replace
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _add_marked_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Tokens that GGUF marks as control or user-defined are found in text before any splitting."""
    from tokenizers import AddedToken

    for token, kind in zip(fields["tokens"], fields.get("token_type", ()), strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_sequence_marks(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Begin and end of sequence around every text, where the model was trained so."""
    from tokenizers import processors

    marks = []
    for flag, key, default in (
        ("add_bos_token", "bos_token_id", fields["model"] == "llama"),
        ("add_eos_token", "eos_token_id", False),
    ):
        index = fields.get(key)
        marks.append(
            (fields["tokens"][index], index) if fields.get(flag, default) and index is not None else None
        )
    begin, end = marks
    if begin is None and end is None:
        return
    before = [begin[0]] if begin else []
    after = [end[0]] if end else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *(f"{token}:1" for token in before),
            "$B:1",
            *(f"{token}:1" for token in after),
        ],
        special_tokens=list({mark for mark in marks if mark}),
    )


def _special_tokens(fields: Mapping[str, Any], origin: Path) -> dict[str, str]:
    tokens = fields["tokens"]
    special: dict[str, str] = {}
    for name, key in _SPECIAL_TOKENS.items():
        index = fields.get(key)
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise SourceError(f"{origin}: {key} is {index}, but the tokenizer has {len(tokens)} tokens")
        special[name] = tokens[index]
    return special
