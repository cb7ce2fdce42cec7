"""Tiny engines that never end by themselves, and prompts for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from checkpoint_factory import VOCAB_SIZE


def with_end_tokens(engine: Path, tokens: list[int]) -> Path:
    """``engine`` with other end tokens: random models would meet theirs at random."""
    path = engine / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_ids": tokens}))
    return engine


def random_prompt(length: int, *, seed: int = 11) -> list[int]:
    """Token ids, none of them special."""
    tokens: list[int] = np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()
    return tokens
