"""A server for tests of code that uses this package: real clients over models in memory, with no sockets and no waiting.

Needs numpy and nothing else.
"""

from enginesmith_client._messages import TensorMetadata
from enginesmith_client.testing._backend import RecordedRequest
from enginesmith_client.testing._llm import Answer, Prompt
from enginesmith_client.testing._server import FakeServer

__all__ = ["Answer", "FakeServer", "Prompt", "RecordedRequest", "TensorMetadata"]
