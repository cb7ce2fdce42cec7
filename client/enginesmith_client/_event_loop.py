"""Which event loop an asynchronous client belongs to.

The connections of gRPC and aiohttp are bound to the loop that made them. In another one they fail with errors that look
like a broken server, or wait for a loop that does not run. So a call from another loop gets an error at once.
"""

from __future__ import annotations

import asyncio

from enginesmith_client._errors import InvalidInput


class OwnLoop:
    """The event loop of the first call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def require(self) -> None:
        """Raises ``InvalidInput`` in another loop than that of the first call."""
        running = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = running
        elif self._loop is not running:
            raise InvalidInput(
                "this client was used in another event loop and cannot be used in this one",
                hint="make an AsyncClient in each event loop, or use Client, which serves all threads; asyncio.run makes a new loop each time",
            )
