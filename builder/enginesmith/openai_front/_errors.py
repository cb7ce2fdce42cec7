"""Errors as OpenAI's API writes them: ``{"error": {"message", "type", "param", "code"}}``.

Source of the statuses and codes: https://platform.openai.com/docs/guides/error-codes, read with the classes that the
``openai`` package makes of them. It sends a request again on 408, 409, 429 and from 500 on, unless the header
``x-should-retry`` says ``false``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from enginesmith_client import (
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    TritonClientError,
)

_RETRY_AFTER_S = 1
_LONGEST_SHOWN = 80


@dataclass
class ApiError(Exception):
    """A request that ends with an error; the caller gets ``body`` with ``status``."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document of the error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unauthorized(*, sent: bool) -> ApiError:
    """The error for a caller whose key is missing or unknown; never repeats it."""
    message = (
        "Incorrect API key provided."
        if sent
        else "You didn't provide an API key. Send it as the header Authorization: Bearer KEY."
    )
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def model_not_found(name: str, *, known: Sequence[str] = ()) -> ApiError:
    """The error for a model that nobody serves."""
    listing = f" The models here: {', '.join(known)}." if known else ""
    return ApiError(
        404,
        f"The model {_shown(name)} does not exist.{listing}",
        param="model",
        code="model_not_found",
    )


def too_busy(message: str, *, retry_after_s: float | None = None) -> ApiError:
    """The error for a request that finds no room."""
    wait_s = _RETRY_AFTER_S if retry_after_s is None else retry_after_s
    hint = (
        {"retry-after": str(max(1, math.ceil(wait_s)))} if wait_s < math.inf else {"x-should-retry": "false"}
    )
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=hint)


def unavailable(message: str, *, code: str) -> ApiError:
    """The error for what may work a little later."""
    return ApiError(
        503, message, type="server_error", code=code, headers={"retry-after": str(_RETRY_AFTER_S)}
    )


def api_error_from_client(error: TritonClientError) -> ApiError:
    """The error for a call of the client that failed. The hints of the client are about Python and stay out."""
    message = error.message
    if isinstance(error, InvalidInput):
        return ApiError(400, message)
    if isinstance(error, ModelNotReady):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, Overloaded):
        return too_busy(message, retry_after_s=error.retry_after_s)
    if isinstance(error, DeadlineExceeded):
        # Sent again, it would take as long again, and the server may still be at the first.
        return ApiError(
            504, message, type="server_error", code="timeout", headers={"x-should-retry": "false"}
        )
    if isinstance(error, ConnectError):
        # The text of gRPC names addresses, which are nothing to callers; the log has it.
        return unavailable("The model server cannot be reached.", code="server_unreachable")
    if isinstance(error, Cancelled):
        return unavailable(message, code="cancelled")
    return ApiError(500, message, type="server_error", code="model_failed")


def api_error_from_validation(error: ValidationError) -> ApiError:
    """The error for a body that is no request, about the first thing that is wrong with it."""
    first = error.errors(include_url=False)[0]
    where = str(first.get("ctx", {}).get("param", "")) or _path(first["loc"])
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"The body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}.")
        case "missing":
            return ApiError(
                400,
                f"Missing required parameter: '{where}'.",
                param=where,
                code="missing_required_parameter",
            )
        case "extra_forbidden":
            return ApiError(
                400,
                f"Unrecognized request argument supplied: {where}",
                param=where,
                code="unknown_parameter",
            )
        case "refused":
            return ApiError(400, first["msg"], param=where or None, code="unsupported_parameter")
    if not where:
        return ApiError(400, f"The body must be a JSON object: {first['msg']}.")
    message = f"Invalid value for '{where}': {first['msg']}; seen: {_shown(first['input'])}."
    return ApiError(400, message, param=where, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """``messages[0].role``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _shown(value: object) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "...")
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)[:_LONGEST_SHOWN]
