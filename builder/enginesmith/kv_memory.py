"""How much key/value memory an ONNX Runtime engine takes when it is served, and whether the spec allows it.

The engine keeps FP32 keys and values: a slot of ``max_sequence_length`` tokens for each of ``max_batch_size`` running
rows, and the blocks of prompts that may be reused. Used by ``plan``, which knows the checkpoint's sizes, and by the step
``package``, which knows the engine's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from enginesmith.errors import SpecError
from enginesmith.spec import Serving
from enginesmith.targets import KvCacheMemory

_FP32_BYTES = 4


@dataclass(frozen=True)
class KvShape:
    """What one token has in the key/value memory: a key and a value for each of ``kv_heads`` in every layer."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * _FP32_BYTES


def shape_of_engine(directory: Path) -> KvShape:
    """The shape that ``engine.json`` in ``directory`` names."""
    engine = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
    return KvShape(engine["layers"], engine["kv_heads"], engine["head_dim"])


def kv_cache_bytes(kv_cache: KvCacheMemory, serving: Serving, shape: KvShape) -> int:
    """The key/value memory of each instance, when all of it is in use."""
    return (_slot_tokens(serving) + _reuse_tokens(kv_cache)) * shape.token_bytes


def require_kv_memory(kv_cache: KvCacheMemory, serving: Serving, needed_bytes: int) -> None:
    """Return when ``needed_bytes`` are no more than ``kv_cache.max_bytes``.

    Raises:
        SpecError: they are more; says what they consist of.
    """
    limit = kv_cache.max_bytes
    if limit is None or needed_bytes <= limit:
        return
    slots, reuse = _slot_tokens(serving), _reuse_tokens(kv_cache)
    token_bytes = needed_bytes // (slots + reuse)
    raise SpecError(
        f"the key/value memory of each instance takes {needed_bytes} bytes, but kv_cache.max_bytes is {limit}: "
        f"{token_bytes} bytes for each of {slots} tokens (max_batch_size {serving.max_batch_size} x "
        f"max_sequence_length {serving.max_sequence_length}) and {reuse} tokens to reuse",
        hint=f"it holds {limit // token_bytes} tokens: lower serving.max_batch_size, serving.max_sequence_length "
        "or kv_cache.reuse_tokens, or raise kv_cache.max_bytes",
    )


def _slot_tokens(serving: Serving) -> int:
    return serving.max_batch_size * serving.max_sequence_length


def _reuse_tokens(kv_cache: KvCacheMemory) -> int:
    """Whole blocks only."""
    if not kv_cache.reuse:
        return 0
    return kv_cache.reuse_tokens // kv_cache.tokens_per_block * kv_cache.tokens_per_block
