"""The HTTP API of OpenAI in front of any tritonserver that the client speaks to.

``_requests`` reads what callers send, ``_generation`` asks the models through ``enginesmith_client.AsyncClient``,
``_responses`` writes what callers get, ``_errors`` says what went wrong as OpenAI does, ``_app`` is the ASGI application
and ``serving`` runs it. Nothing here knows tensors or Triton's protocols.
"""

from enginesmith.openai_front.settings import FrontSettings

__all__ = ["FrontSettings"]
