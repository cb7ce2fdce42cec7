"""Runs flows in tasks. Apart from ``_flow``, so that clients in threads do not import asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

from enginesmith_client._errors import TritonClientError
from enginesmith_client._flow import CloseStream, Flow, Open, Pause, Receive, Result, Send, Step, Together


async def run_async(flow: Flow[Result]) -> Result:
    """The result of ``flow``, its steps awaited; cancelling the task ends the flow where it is."""
    try:
        step = next(flow)
        while True:
            try:
                result = await _act_async(step)
            except TritonClientError as error:
                step = flow.throw(error)
            else:
                step = flow.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        flow.close()


async def _act_async(step: Step) -> Any:
    if isinstance(step, Send):
        return await step.transport.perform(step.operation, step.deadline)
    if isinstance(step, Receive):
        try:
            return await step.stream.receive()
        except BaseException:  # A task that is cancelled leaves nobody who would read on.
            await step.stream.close()
            raise
    if isinstance(step, Open):
        return await step.transport.open(step.request, step.deadline)
    if isinstance(step, Pause):
        if step.until is None:
            return await asyncio.sleep(step.seconds)
        return await step.until.wait_async(step.seconds)
    if isinstance(step, CloseStream):
        return await step.stream.close()
    return await _together_async(step)


async def _together_async(step: Together) -> list[Any]:
    room = asyncio.Semaphore(step.at_once)

    async def one(flow: Flow[Any]) -> Any:
        async with room:
            return await run_async(flow)

    tasks = [asyncio.ensure_future(one(flow)) for flow in step.flows]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
