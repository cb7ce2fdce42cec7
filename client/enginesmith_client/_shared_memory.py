"""Large tensors by way of system shared memory, for servers on this machine.

As flows over a transport's wire: lays inputs into shared memory that the server has mapped, names it in the request, and
takes outputs from there. Whether a server is on this machine is found out by asking it to map: one that cannot is sent
everything as usual. Outputs go through shared memory where their size is known beforehand, which is where the
model's metadata has no variable dimension but the batch.

A piece of memory is used again only when the server surely is through with it. After a call that ended otherwise
(deadline, connection, cancellation) it is put aside until the client closes, because the server may still use it.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import secrets
import threading
import weakref
from collections.abc import Mapping
from multiprocessing import shared_memory
from typing import Any

import numpy as np

from enginesmith_client._codec import NUMPY_TYPES
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import (
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
    TritonClientError,
)
from enginesmith_client._flow import Flow, Send
from enginesmith_client._messages import InferReply, InferRequest, ModelMetadata
from enginesmith_client._operations import Infer, Region, RegisterMemory, UnregisterMemory

_LOG = logging.getLogger("enginesmith_client")
_DIRECTORY = "/dev/shm"
_SMALLEST_BYTES = 1 << 16
_RELEASE_TIMEOUT_S = 2.0
_FORGOTTEN = "Unable to find shared memory region"
_ANSWERED = (InvalidInput, ModelNotReady, Overloaded, ServerError)
"""Errors that are the server's answer: it is through with the request."""


class Block:
    """Shared memory of a size, with a name that no other process or block has."""

    def __init__(self, size_bytes: int) -> None:
        """Raises OSError when there is not that much."""
        self.size_bytes = size_bytes
        self.registered = False
        self.name = f"enginesmith-client-{os.getpid()}-{secrets.token_hex(8)}"
        self.memory = shared_memory.SharedMemory(self.name, create=True, size=size_bytes)
        try:
            # Takes the pages now: a full /dev/shm would otherwise kill the process at the first write (SIGBUS).
            with open(f"{_DIRECTORY}/{self.name}", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        except BaseException:
            self.remove()
            raise

    @property
    def bytes(self) -> memoryview:
        """What is in it."""
        assert self.memory.buf is not None, "it was removed"
        return self.memory.buf

    def remove(self) -> None:
        """Let go of it; what the server has mapped stays until the server lets go as well."""
        self.memory.close()
        self.memory.unlink()


class SharedMemory:
    """The shared memory of one transport, whose ``wire`` performs operations. Safe to use from several threads."""

    def __init__(self, wire: Any, least_bytes: int) -> None:
        self._wire = wire
        self._least_bytes = least_bytes
        self._lock = threading.Lock()
        self._idle: list[Block] = []
        self._refused = False
        self._blocks: dict[str, Block] = {}
        # Also runs when the interpreter ends. After a kill, the resource tracker of multiprocessing removes the names.
        self._clean = weakref.finalize(self, _remove, self._blocks, os.getpid())

    def infer(self, operation: Infer, deadline: Deadline) -> Flow[InferReply]:
        """The reply to an inference, its large tensors by way of shared memory if that can be."""
        request = operation.request
        inputs = {one.name: len(one.data) for one in request.inputs if len(one.data) >= self._least_bytes}
        outputs = large_outputs(request, self._least_bytes)
        if self._refused or not (inputs or outputs):
            plain: InferReply = yield Send(self._wire, operation, deadline)
            return plain
        taken: list[Block] = []
        reusable = False
        try:
            try:
                input_blocks = yield from self._take(inputs, taken, deadline)
                output_blocks = yield from self._take(outputs, taken, deadline)
            except _NotPossibleError as error:
                self._refuse(error)
                reusable = True
                plain = yield Send(self._wire, operation, deadline)
                return plain
            reply = yield from self._send(request, input_blocks, output_blocks, deadline)
            reusable = True
            return reply
        except _ANSWERED:
            reusable = True
            raise
        finally:
            if reusable:
                with self._lock:
                    self._idle += taken

    def release(self) -> Flow[None]:
        """Tell the server to let go, and remove everything."""
        self._refused = True
        deadline = Deadline.after(_RELEASE_TIMEOUT_S)
        for block in list(self._blocks.values()):
            if block.registered and not deadline.expired:
                try:
                    yield Send(self._wire, UnregisterMemory(block.name), deadline)
                except TritonClientError as error:
                    _LOG.debug("shared memory %s stays registered at the server: %s", block.name, error)
        self._clean()

    def _send(
        self,
        request: InferRequest,
        inputs: Mapping[str, Block],
        outputs: Mapping[str, Block],
        deadline: Deadline,
    ) -> Flow[InferReply]:
        for tensor in request.inputs:
            if tensor.name in inputs:
                inputs[tensor.name].bytes[: len(tensor.data)] = tensor.data
        sizes = {one.name: len(one.data) for one in request.inputs}
        operation = Infer(
            _with_named_outputs(request, outputs),
            {name: Region(block.name, sizes[name]) for name, block in inputs.items()},
            {name: Region(block.name, block.size_bytes) for name, block in outputs.items()},
        )
        try:
            reply = yield Send(self._wire, operation, deadline)
        except ServerError as error:
            if _FORGOTTEN not in error.message:
                raise
            # The server was started anew, or was told to let go. It refused the request before doing anything.
            for block in (*inputs.values(), *outputs.values()):
                block.registered = False
                yield from self._register(block, deadline)
            reply = yield Send(self._wire, operation, deadline)
        return _with_data(reply, outputs)

    def _take(
        self, sizes: Mapping[str, int], taken: list[Block], deadline: Deadline
    ) -> Flow[dict[str, Block]]:
        """A registered block for each tensor, at least of its size; all are appended to ``taken``."""
        blocks = {}
        for name, size_bytes in sizes.items():
            blocks[name] = self._idle_block(size_bytes) or self._new_block(size_bytes)
            taken.append(blocks[name])
            if not blocks[name].registered:
                yield from self._register(blocks[name], deadline)
        return blocks

    def _idle_block(self, size_bytes: int) -> Block | None:
        with self._lock:
            for block in sorted(self._idle, key=lambda block: block.size_bytes):
                if block.size_bytes >= size_bytes:
                    self._idle.remove(block)
                    return block
        return None

    def _new_block(self, size_bytes: int) -> Block:
        try:
            block = Block(max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length()))
        except OSError as error:
            raise _NotPossibleError(f"cannot reserve {size_bytes} bytes of shared memory: {error}") from error
        self._blocks[block.name] = block
        return block

    def _register(self, block: Block, deadline: Deadline) -> Flow[None]:
        try:
            yield Send(self._wire, RegisterMemory(block.name, block.size_bytes), deadline)
        except (InvalidInput, ServerError) as error:
            raise _NotPossibleError(error.message) from error
        block.registered = True

    def _refuse(self, error: Exception) -> None:
        with self._lock:
            first, self._refused = not self._refused, True
        if first:
            _LOG.warning(
                "shared memory is not used from now on, large tensors are sent as others are: %s", error
            )


class _NotPossibleError(Exception):
    """There is no shared memory, or the server cannot map it."""


def large_outputs(request: InferRequest, least_bytes: int) -> dict[str, int]:
    """The size of each output that will be ``least_bytes`` or more, where the metadata tells."""
    metadata = request.metadata
    if metadata is None or request.classes or not request.inputs:
        return {}
    wanted = request.outputs or tuple(tensor.name for tensor in metadata.outputs)
    sizes = {name: _size_bytes(metadata, name, batch=request.inputs[0].shape[:1]) for name in wanted}
    return {name: size for name, size in sizes.items() if size is not None and size >= least_bytes}


def _size_bytes(metadata: ModelMetadata, name: str, *, batch: tuple[int, ...]) -> int | None:
    tensor = metadata.output(name)
    if tensor is None or tensor.datatype == "BYTES":
        return None
    shape = (*batch, *tensor.shape[1:]) if metadata.max_batch_size else tensor.shape
    itemsize = _itemsize(tensor.datatype)
    return None if itemsize is None or -1 in shape else math.prod(shape) * itemsize


def _itemsize(datatype: str) -> int | None:
    if datatype == "BF16":
        return 2
    return np.dtype(NUMPY_TYPES[datatype]).itemsize if datatype in NUMPY_TYPES else None


def _with_named_outputs(request: InferRequest, placed: Mapping[str, Block]) -> InferRequest:
    """The request with every output named, as is needed to say where one of them goes."""
    if not placed or request.outputs or request.metadata is None:
        return request
    return dataclasses.replace(request, outputs=tuple(tensor.name for tensor in request.metadata.outputs))


def _with_data(reply: InferReply, blocks: Mapping[str, Block]) -> InferReply:
    """The reply with the data of the outputs that are in ``blocks``."""
    outputs = []
    for tensor in reply.outputs:
        if tensor.name in blocks:
            size_bytes = math.prod(tensor.shape) * (_itemsize(tensor.datatype) or 0)
            data = bytes(blocks[tensor.name].bytes[:size_bytes])
            tensor = dataclasses.replace(tensor, data=data)
        outputs.append(tensor)
    return dataclasses.replace(reply, outputs=tuple(outputs))


def _remove(blocks: dict[str, Block], pid: int) -> None:
    """Remove all blocks; not in a child of the process that made them, where this runs as well."""
    if os.getpid() != pid:
        return
    while blocks:
        blocks.popitem()[1].remove()
