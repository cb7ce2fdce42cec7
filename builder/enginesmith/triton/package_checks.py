"""What every package step asks before it writes anything: a passed verdict, and limits that the model can hold."""

from __future__ import annotations

import json
from pathlib import Path

from enginesmith.errors import GateError, SpecError
from enginesmith.spec import Serving


def require_passed(verdict_directory: Path) -> None:
    """Return when the verdict in ``verdict_directory`` says passed.

    Raises:
        GateError: it says otherwise, and which checks are broken, or there is none.
    """
    path = verdict_directory / "verdict.json"
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise GateError(
            "the engine has no verdict and cannot be packaged", hint="build again: the verify step writes it"
        ) from error
    if verdict.get("passed") is not True:
        broken = [check["name"] for check in verdict.get("checks", ()) if not check.get("passed")]
        raise GateError(
            f"the engine did not pass its verification and cannot be packaged; broken: {', '.join(broken) or 'not recorded'}",
            hint="see verdict.json of the verify step; loosen a limit in the spec only if the loss is acceptable",
        )


def require_positions(checkpoint: Path, serving: Serving) -> None:
    """Return when the model of ``checkpoint`` knows as many positions as ``serving`` wants to serve.

    Raises:
        SpecError: it knows fewer.
    """
    positions = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))[
        "max_position_embeddings"
    ]
    if serving.max_sequence_length > positions:
        raise SpecError(
            f"serving.max_sequence_length is {serving.max_sequence_length}, but the model knows only {positions} positions",
            hint=f"set serving.max_sequence_length to {positions} or less",
        )
