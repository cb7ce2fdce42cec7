"""Several calls or streams at once, of which none outlives the others. Knows nothing of what they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from enginesmith_client import AsyncTextStream, TextDelta

Result = TypeVar("Result")


async def together(calls: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all calls, in their order; the first error ends the others and is raised."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await ended(tasks)


async def merged(streams: Sequence[AsyncTextStream]) -> AsyncGenerator[tuple[int, TextDelta | None], None]:
    """The pieces of all streams as they come, each with the number of its stream; ``(number, None)`` ends one.

    The first error of a stream is raised and closes all; so does closing the iterator. What a slow reader has not taken
    yet is kept, which is at most the answers.
    """
    pieces: asyncio.Queue[tuple[int, TextDelta | None]] = asyncio.Queue()

    async def read(number: int, stream: AsyncTextStream) -> None:
        try:
            async for piece in stream:
                pieces.put_nowait((number, piece))
        finally:
            pieces.put_nowait((number, None))

    async with AsyncExitStack() as closing:
        for stream in streams:
            await closing.enter_async_context(stream)
        readers = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
        try:
            left = len(streams)
            while left:
                number, piece = await pieces.get()
                if piece is None:
                    left -= 1
                    await readers[number]
                yield number, piece
        finally:
            await ended(readers)


async def ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, and wait until it is over; what the tasks raised is theirs."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
