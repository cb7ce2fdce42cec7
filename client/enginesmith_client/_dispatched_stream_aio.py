"""``_dispatched_stream`` for tasks."""

from __future__ import annotations

from enginesmith_client._dispatched_stream import StreamFlows
from enginesmith_client._flow_aio import run_async
from enginesmith_client._messages import InferReply


class AsyncDispatchedStream:
    """``DispatchedStream`` for tasks."""

    def __init__(self, stream: StreamFlows) -> None:
        self._stream = stream

    async def receive(self) -> InferReply | None:
        return await run_async(self._stream.receive())

    async def close(self) -> None:
        await run_async(self._stream.close())
