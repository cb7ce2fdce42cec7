"""Runs the front: one process, one event loop, until SIGTERM or Ctrl-C. Call it from the main thread."""

from __future__ import annotations

import asyncio
import copy
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from enginesmith.errors import OperatorError
from enginesmith.openai_front._app import application
from enginesmith.openai_front.settings import FrontSettings
from enginesmith_client import AsyncClient, ChatTemplate, TritonClientError

_KEEP_ALIVE_S = 30
_BACKLOG = 2048


def serve(
    settings: FrontSettings,
    *,
    host: str,
    port: int,
    on_listening: Callable[[str], None],
    access_log: bool = False,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then answer those that are there, at most ``settings.drain_s``, and return.

    ``on_listening`` is given the URL as soon as callers can connect. The log goes to stderr.

    Raises:
        OperatorError: the port cannot be had, or a chat template or an address of Triton is wrong.
    """
    try:
        templates = {
            model: ChatTemplate.from_directory(path) for model, path in settings.chat_templates.items()
        }
        with _listening(host, port) as listener:
            asyncio.run(_serve(settings, templates, listener, on_listening, access_log))
    except TritonClientError as error:
        raise OperatorError(error.message, hint=error.hint) from error


async def _serve(
    settings: FrontSettings,
    templates: dict[str, ChatTemplate],
    listener: socket.socket,
    on_listening: Callable[[str], None],
    access_log: bool,
) -> None:
    async with AsyncClient(list(settings.triton_urls), timeout_s=settings.timeout_s) as client:
        config = uvicorn.Config(
            application(client, settings, templates=templates),
            lifespan="off",
            log_config=_log_config(),
            access_log=access_log,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.drain_s,
        )
        server = uvicorn.Server(config)

        def stop(_signal: int, _frame: object) -> None:
            server.should_exit = True

        # uvicorn raises the signal that ended it once more, for handlers like these: the process returns by itself.
        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            on_listening(_url(listener))
            await server.serve(sockets=[listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets that name their protocol, and `socket.create_server` does not: every
    # answer, which is a head and a body, would wait for a delayed acknowledgement (measured: 54 ms a request instead of 8).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OperatorError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            hint="give another --port (0 chooses a free one), or end what uses it",
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def _log_config() -> dict[str, Any]:
    """uvicorn's, with every line on stderr: stdout is data."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["enginesmith.openai"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    for name in ("uvicorn", "uvicorn.error"):
        config["loggers"].setdefault(name, {})["level"] = logging.getLevelName(logging.WARNING)
    return config
