"""Facts about hardware and toolchains, as data: architectures, GPUs, container images and what each runtime can execute.

Nothing here decides; ``enginesmith.legality`` does, from these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GpuName = Literal["a100-40g", "a100", "a10", "a30", "l4", "l40s", "rtx-4090", "h100", "h200", "gh200", "b200"]


@dataclass(frozen=True)
class Gpu:
    """One GPU model."""

    name: GpuName
    compute_capability: int
    """Major * 10 + minor: 90 is SM90."""
    memory_gib: int


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 80, 40),
        Gpu("a100", 80, 80),
        Gpu("a10", 86, 24),
        Gpu("a30", 80, 24),
        Gpu("l4", 89, 24),
        Gpu("l40s", 89, 48),
        Gpu("rtx-4090", 89, 24),
        Gpu("h100", 90, 80),
        Gpu("h200", 90, 141),
        Gpu("gh200", 90, 96),
        Gpu("b200", 100, 180),
    )
}

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Supported architectures and the ``model_type`` that ``config.json`` gives for each."""
