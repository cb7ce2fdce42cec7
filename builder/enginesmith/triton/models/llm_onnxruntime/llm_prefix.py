"""Keys and values of prompts that were computed before, kept in blocks for prompts that begin the same way.

Self-contained: numpy only. Knows nothing of engines: it copies slices of the runtime's cache out and in. A block
holds ``tokens_per_block`` tokens and is named by a hash of them and of the block before, so a name stands for
everything from the first token on (the scheme of vLLM's and TensorRT-LLM's block reuse). The memory is
bounded; the block that was used least recently makes room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Cache = npt.NDArray[Any]
"""The part of a key/value cache that belongs to one sequence: [layers x 2, kv_heads, capacity, head_dim]."""


class PrefixCache:
    """Blocks of keys and values, found by the tokens they stand for. For one thread."""

    def __init__(self, *, blocks: int, tokens_per_block: int, shape: tuple[int, int, int]) -> None:
        """``shape`` is that of the values of one token: layers x 2, kv_heads, head_dim."""
        parts, heads, width = shape
        self.tokens_per_block = tokens_per_block
        # Zeros: the system gives the memory when it is first written.
        self._memory = np.zeros((blocks, parts, heads, tokens_per_block, width), np.float32)
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(blocks))

    @property
    def nbytes(self) -> int:
        """The memory that the blocks can take, in bytes."""
        return self._memory.nbytes

    @property
    def used_bytes(self) -> int:
        """The memory of the blocks that hold something, in bytes."""
        return len(self._places) * self._memory[:1].nbytes

    def load(self, tokens: Sequence[int], cache: Cache) -> int:
        """Copy what is known of the beginning of ``tokens`` into ``cache``; returns how many tokens that is.

        The last token is never among them: its logits have to be computed.
        """
        size = self.tokens_per_block
        count = 0
        for name in self._names(tokens[:-1]):
            place = self._places.get(name)
            if place is None:
                break
            self._places.move_to_end(name)
            cache[:, :, count : count + size] = self._memory[place]
            count += size
        return count

    def store(self, tokens: Sequence[int], cache: Cache) -> None:
        """Keep the whole blocks of ``tokens``, whose keys and values are in ``cache``."""
        size = self.tokens_per_block
        kept: set[bytes] = set()
        for index, name in enumerate(self._names(tokens)):
            kept.add(name)
            if name in self._places:
                self._places.move_to_end(name)
                continue
            place = self._take_place(kept)
            if place is None:
                return
            self._memory[place] = cache[:, :, index * size : (index + 1) * size]
            self._places[name] = place

    def _take_place(self, kept: set[bytes]) -> int | None:
        """A free block, or that of the least recently used; none that the same prompt needs."""
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._places), None)
        if oldest is None or oldest in kept:
            return None
        return self._places.pop(oldest)

    def _names(self, tokens: Sequence[int]) -> Iterator[bytes]:
        size = self.tokens_per_block
        name = b""
        for start in range(0, len(tokens) - size + 1, size):
            block = np.asarray(tokens[start : start + size], np.int64)
            # Cryptographic, because a prompt must not be able to name another prompt's block.
            name = hashlib.blake2b(name + block.tobytes(), digest_size=16).digest()
            yield name
