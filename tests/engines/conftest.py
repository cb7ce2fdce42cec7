"""What the engine tests share: one directory per run, and PyTorch on one thread (tiny models, busy machines)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes on one thread: for 64 channels a second one only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
