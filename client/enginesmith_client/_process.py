"""Which process a client belongs to.

Connections, locks and the threads of gRPC do not survive ``fork`` in a usable state: a child that used them would hang
or write into its parent's connections. So the child gets an error at once.
"""

from __future__ import annotations

import os

from enginesmith_client._errors import InvalidInput


class OwnProcess:
    """The process that this was made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """False after a fork, in the child."""
        return os.getpid() == self._pid

    def require(self) -> None:
        """Raises ``InvalidInput`` in a child of the process."""
        if os.getpid() != self._pid:
            raise InvalidInput(
                f"this client was made in process {self._pid} and cannot be used in its child {os.getpid()}",
                hint="make the client after the fork, or start processes with the 'spawn' method",
            )
