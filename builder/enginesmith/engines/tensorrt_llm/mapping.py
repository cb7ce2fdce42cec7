"""How a model is spread over ranks: tensor, pipeline and expert parallelism.

The arithmetic is that of TensorRT-LLM's ``mapping.py`` (1.2): ``rank = stage * tensor + tensor_rank``; experts are
spread over neighbouring tensor ranks first. Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from enginesmith.errors import SpecError


@dataclass(frozen=True)
class Mapping:
    """Degrees of parallelism. ``expert`` divides ``tensor``; the rest of ``tensor`` splits each expert.

    Raises:
        SpecError: a degree is below 1, or ``expert`` does not divide ``tensor``.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "expert", "gpus_per_node"):
            degree = getattr(self, name)
            if type(degree) is not int or degree < 1:
                raise SpecError(f"{name} must be a whole number of at least 1, seen: {degree!r}")
        if self.tensor % self.expert:
            raise SpecError(
                f"expert parallelism {self.expert} does not divide tensor parallelism {self.tensor}",
                hint=f"choose one of {', '.join(map(str, divisors(self.tensor)))}",
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline

    @property
    def expert_tensor(self) -> int:
        """Into how many slices each expert is cut (``moe_tp_size``)."""
        return self.tensor // self.expert

    def ranks(self) -> list[Rank]:
        """Every rank, in order."""
        return [
            Rank(self, stage, tensor_rank)
            for stage in range(self.pipeline)
            for tensor_rank in range(self.tensor)
        ]

    def stage_layers(self, stage: int, layers: int) -> range:
        """The layers of one pipeline stage; the first stages get one more when ``layers`` cannot be split evenly."""
        even, more = divmod(layers, self.pipeline)
        first = stage * even + min(stage, more)
        return range(first, first + even + (stage < more))

    def document(self) -> dict[str, Any]:
        """The ``mapping`` section of TensorRT-LLM's ``config.json``."""
        return {
            "world_size": self.world_size,
            "gpus_per_node": self.gpus_per_node,
            "cp_size": 1,
            "tp_size": self.tensor,
            "pp_size": self.pipeline,
            "moe_tp_size": self.expert_tensor,
            "moe_ep_size": self.expert,
        }


@dataclass(frozen=True)
class Rank:
    """One rank's place in a mapping."""

    mapping: Mapping
    stage: int
    tensor_rank: int

    @property
    def index(self) -> int:
        """The number in ``rank{index}.safetensors``."""
        return self.stage * self.mapping.tensor + self.tensor_rank

    @property
    def first_stage(self) -> bool:
        """Whether it holds the embedding."""
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        """Whether it holds the last norm and the output head."""
        return self.stage == self.mapping.pipeline - 1

    @property
    def expert_tensor_rank(self) -> int:
        """Which slice of each of its experts it holds."""
        return self.tensor_rank // self.mapping.expert

    def experts(self, count: int) -> range:
        """The experts it holds, of ``count``."""
        share = count // self.mapping.expert
        first = self.tensor_rank % self.mapping.expert * share
        return range(first, first + share)

    def span(self, size: int) -> range:
        """Its equal share of ``size`` rows or columns under tensor parallelism."""
        share = size // self.mapping.tensor
        return range(self.tensor_rank * share, (self.tensor_rank + 1) * share)


def divisors(number: int) -> list[int]:
    """Every divisor of ``number``, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
