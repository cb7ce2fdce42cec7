"""A thin, typed client for models that NVIDIA Triton serves."""

from enginesmith_client._aio import AsyncClient
from enginesmith_client._client import Client
from enginesmith_client._errors import (
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
    TritonClientError,
)
from enginesmith_client._messages import (
    BatchStatistics,
    Classification,
    Duration,
    Generation,
    InferResult,
    ModelMetadata,
    ModelStatistics,
    ModelStatus,
    RankedDocument,
    TensorMetadata,
)
from enginesmith_client._settings import Tls

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BatchStatistics",
    "Cancelled",
    "Classification",
    "Client",
    "ConnectError",
    "DeadlineExceeded",
    "Duration",
    "Generation",
    "InferResult",
    "InvalidInput",
    "ModelMetadata",
    "ModelNotReady",
    "ModelStatistics",
    "ModelStatus",
    "Overloaded",
    "RankedDocument",
    "ServerError",
    "TensorMetadata",
    "Tls",
    "TritonClientError",
]
