"""What every kind of spec is made of: the base of all parts, the parts that all have, and their common ground.

Knows no task and no runtime. ``enginesmith.spec`` has the spec of a text-generation model, ``enginesmith.graph_spec``
that of a model that one ONNX graph computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from enginesmith.errors import SpecError

NAME_PATTERN = r"^[a-z0-9][a-z0-9_.-]{0,62}$"


class Part(BaseModel):
    """A part of the spec: immutable, and every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Corpus(Part):
    """Text for calibration or evaluation. Exactly one of ``builtin``, ``file`` and ``dataset``."""

    builtin: Literal["english"] | None = Field(
        default=None, description="The English reference text that ships with CPython (pydoc_data.topics)."
    )
    file: str | None = Field(
        default=None,
        description="A UTF-8 .txt file (blank lines separate documents) or .jsonl file, relative to the spec.",
    )
    field: str = Field(
        default="text",
        description="The key to read in each line of a .jsonl file, or the column of a dataset.",
    )
    dataset: str | None = Field(
        default=None, description="A name or local path that `datasets.load_dataset` accepts."
    )
    config: str | None = Field(default=None, description="The configuration of the dataset.")
    split: str = Field(default="train", description="The split of the dataset.")
    revision: str | None = Field(default=None, description="The revision of a hub dataset.")

    @model_validator(mode="after")
    def _one_kind(self) -> Corpus:
        kinds = [kind for kind in ("builtin", "file", "dataset") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"give exactly one of builtin, file and dataset; seen: {', '.join(kinds) or 'none'}"
            )
        return self


class QueuePolicy(Part):
    """Triton's ModelQueuePolicy."""

    max_queue_size: int = Field(
        default=0, ge=0, description="Requests that may wait; more are refused at once. 0: no limit."
    )
    default_timeout_us: int = Field(
        default=0, ge=0, description="Longest wait in the queue, in microseconds. 0: no limit."
    )
    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"
    allow_timeout_override: bool = Field(
        default=False, description="Requests may set a shorter timeout of their own."
    )

    @property
    def says_anything(self) -> bool:
        """Whether it is not all defaults; only then Triton is given a policy."""
        return bool(self.model_dump(exclude_defaults=True))


class DynamicBatching(Part):
    """Triton's dynamic batcher."""

    preferred_batch_sizes: tuple[int, ...] = Field(
        default=(), description="Batch sizes to form without waiting longer."
    )
    max_queue_delay_us: int = Field(
        default=5000, ge=0, description="How long to wait for companions, in microseconds."
    )
    preserve_ordering: bool = False
    queue_policy: QueuePolicy = QueuePolicy()


class Slo(Part):
    """What the service promises. The harness judges against it; nothing is tuned to it silently."""

    p99_latency_ms: float | None = Field(default=None, gt=0)
    ttft_ms: float | None = Field(default=None, gt=0, description="Time to first token, 99th percentile.")
    min_tokens_per_s: float | None = Field(default=None, gt=0, description="Per request.")


class VariantPart(Part):
    """What every variant has."""

    scheme: str


class TargetPart(Part):
    """What every target has."""

    name: str
    variants: tuple[str, ...] | None = Field(
        default=None, description="The variants that this target builds. Default: all."
    )


class SpecBase(Part):
    """What every spec has: a name, variants and the targets that build them, each named so that Triton can serve it."""

    name: str = Field(pattern=NAME_PATTERN)
    variants: Mapping[str, VariantPart]
    targets: tuple[TargetPart, ...]
    slo: Slo = Slo()
    # Where relative paths start; set by `load_spec`, never written in YAML.
    _base_dir: Path = Path()
    _path: Path | None = None

    @model_validator(mode="after")
    def _named_apart(self) -> SpecBase:
        for name in self.variants:
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(
                    f"variant name {name!r} must match {NAME_PATTERN}: it becomes part of a Triton model name"
                )
        names = [target.name for target in self.targets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"targets: the name {twice[0]!r} is used twice; give each target a name of its own"
            )
        for target in self.targets:
            if unknown := [name for name in target.variants or () if name not in self.variants]:
                raise ValueError(
                    f"target {target.name} names variant {unknown[0]!r}; the spec has: {', '.join(self.variants)}"
                )
        built = {name for target in self.targets for name in target.variants or self.variants}
        if unused := [name for name in self.variants if name not in built]:
            raise ValueError(f"variant {unused[0]!r} is built by no target; add it to the variants of one")
        return self

    @property
    def base_dir(self) -> Path:
        """The directory that relative paths in the spec start from."""
        return self._base_dir

    @property
    def path(self) -> Path | None:
        """The file it was read from, where there is one."""
        return self._path

    def triton_name(self, variant: str) -> str:
        """The name of the Triton model that serves ``variant``."""
        return f"{self.name}-{variant}"

    def resolve(self, path: str) -> Path:
        """An absolute path for a path written in the spec.

        Raises:
            SpecError: the system cannot even look it up: too long, a NUL byte, an unknown user, a loop of links.
        """
        try:
            resolved = (self._base_dir / Path(path).expanduser()).resolve()
            resolved.exists()
        except (OSError, ValueError, RuntimeError) as error:
            shown = path if len(path) <= 200 else f"{path[:200]}... ({len(path)} characters)"
            raise SpecError(
                f"the path {shown!r} cannot be looked up: {error.strerror if isinstance(error, OSError) else error}",
                hint="paths in a spec start at its directory, or with ~ or /",
            ) from error
        return resolved
