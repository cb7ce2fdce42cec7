"""Every error a user can meet, sorted by who has to act.

Each message says what happened, what was seen, what is allowed and what to do. Foreign exceptions are
converted once, at the boundary where they arise, with ``raise ... from error``. The command line turns
any ``EnginesmithError`` into one message on stderr and its ``exit_code``; it never shows a traceback for one.
"""


class EnginesmithError(Exception):
    """The root of every expected failure. ``hint`` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class SpecError(EnginesmithError):
    """The author of the spec must act: an unknown key, a value out of range, an illegal combination."""

    exit_code = 2


class SourceError(EnginesmithError):
    """The checkpoint or a data file is missing, damaged or of a kind that is not supported."""


class GateError(EnginesmithError):
    """An engine was built but failed its verification: it will not be packaged."""


class OperatorError(EnginesmithError):
    """Whoever runs the machine must act: disk, ports, permissions, a server that died."""


class StoreError(OperatorError):
    """The artifact store cannot be used or holds damaged bytes."""


class ServerError(OperatorError):
    """A tritonserver could not be started, died, or refused a model."""


class ToolchainError(EnginesmithError):
    """A needed program or library is missing or has the wrong version."""


class StepFailedError(EnginesmithError):
    """A build step failed in a way no other class describes; the log has the traceback."""
