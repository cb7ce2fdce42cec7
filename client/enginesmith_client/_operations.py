"""What a client asks of a transport, as values: one class for each message of the protocol.

``reply`` in the docstrings is what ``Transport.perform`` gives for the operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from enginesmith_client._messages import InferRequest, Json


@dataclass(frozen=True)
class ServerReady:
    """Reply: bool, whether the server and all models that it must serve are ready."""


@dataclass(frozen=True)
class ModelReady:
    """Reply: bool, whether the model can take requests; False for a model that the server does not know."""

    model: str
    version: str = ""


@dataclass(frozen=True)
class ReadMetadata:
    """Reply: JSON, the names, datatypes and shapes of the model's tensors."""

    model: str
    version: str = ""


@dataclass(frozen=True)
class ReadConfig:
    """Reply: JSON, the model configuration with the server's defaults filled in."""

    model: str
    version: str = ""


@dataclass(frozen=True)
class ReadStatistics:
    """Reply: JSON, ``{"model_stats": [...]}``; of all models when ``model`` is empty."""

    model: str = ""
    version: str = ""


@dataclass(frozen=True)
class ReadIndex:
    """Reply: JSON, ``{"models": [...]}``: the repository index."""


@dataclass(frozen=True)
class LoadModel:
    """Reply: None, when the model is loaded. ``config`` and ``files`` replace what the repository holds."""

    model: str
    config: Json | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class UnloadModel:
    """Reply: None, when the server has begun to unload."""

    model: str
    dependents: bool = False


@dataclass(frozen=True)
class RegisterMemory:
    """Reply: None, when the server has mapped the first ``size_bytes`` of the system shared memory ``/name``."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class UnregisterMemory:
    """Reply: None, when the server has let go of it, or did not know it."""

    name: str


@dataclass(frozen=True)
class Region:
    """The first ``size_bytes`` of a registered shared memory."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Infer:
    """Reply: ``InferReply``, the one answer to the request."""

    request: InferRequest
    input_regions: Mapping[str, Region] = field(default_factory=dict)
    """Where the data of inputs is that are not sent along."""
    output_regions: Mapping[str, Region] = field(default_factory=dict)
    """Where to put outputs; in the reply, their data is empty."""

    @property
    def model(self) -> str:
        """The model that is asked."""
        return self.request.model

    @property
    def version(self) -> str:
        """The version that is asked; empty: the server chooses."""
        return self.request.version


Operation: TypeAlias = (
    "ServerReady | ModelReady | ReadMetadata | ReadConfig | ReadStatistics | ReadIndex | LoadModel | UnloadModel "
    "| RegisterMemory | UnregisterMemory | Infer"
)


def described(operation: Operation) -> str:
    """The operation in words, for the middle of a sentence: ``inference of model 'm'``."""
    words = _WORDS[type(operation)]
    model = getattr(operation, "model", "")
    return f"{words} of model {model!r}" if model else words


_WORDS: Mapping[type, str] = {
    ServerReady: "the readiness check",
    ModelReady: "the readiness check",
    ReadMetadata: "reading the metadata",
    ReadConfig: "reading the configuration",
    ReadStatistics: "reading the statistics",
    ReadIndex: "reading the repository index",
    LoadModel: "loading",
    UnloadModel: "unloading",
    RegisterMemory: "registering shared memory",
    UnregisterMemory: "unregistering shared memory",
    Infer: "inference",
}
