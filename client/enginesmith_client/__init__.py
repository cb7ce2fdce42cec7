"""A thin, typed client for models that NVIDIA Triton serves."""

from typing import TYPE_CHECKING, Any

from enginesmith_client._chat import ChatTemplate, Message
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
from enginesmith_client._limits import RateLimit
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
    TextDelta,
    TokenLogprob,
)
from enginesmith_client._requests import Sequence_
from enginesmith_client._retries import Retry
from enginesmith_client._settings import Tls
from enginesmith_client._signature import SignatureDrift, check_signature, given_arrays, output_array
from enginesmith_client._stream import ResultStream, TextStream

if TYPE_CHECKING:
    from enginesmith_client._aio import AsyncClient
    from enginesmith_client._stream_aio import AsyncResultStream, AsyncTextStream

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncResultStream",
    "AsyncTextStream",
    "BatchStatistics",
    "Cancelled",
    "ChatTemplate",
    "Classification",
    "Client",
    "ConnectError",
    "DeadlineExceeded",
    "Duration",
    "Generation",
    "InferResult",
    "InvalidInput",
    "Message",
    "ModelMetadata",
    "ModelNotReady",
    "ModelStatistics",
    "ModelStatus",
    "Overloaded",
    "RankedDocument",
    "RateLimit",
    "ResultStream",
    "Retry",
    "Sequence_",
    "ServerError",
    "SignatureDrift",
    "TensorMetadata",
    "TextDelta",
    "TextStream",
    "Tls",
    "TokenLogprob",
    "TritonClientError",
    "check_signature",
    "given_arrays",
    "output_array",
]


def __getattr__(name: str) -> Any:
    """What tasks need is imported when it is first asked for: asyncio alone takes as long as all the rest."""
    if name == "AsyncClient":
        from enginesmith_client._aio import AsyncClient

        return AsyncClient
    if name in ("AsyncResultStream", "AsyncTextStream"):
        from enginesmith_client import _stream_aio

        return getattr(_stream_aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
