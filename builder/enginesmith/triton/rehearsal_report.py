"""What every rehearsal has in common: one check, and the error when checks fail.

Knows nothing of servers and models. The rehearsals of the runtimes fill it: ``enginesmith.triton.rehearse`` and the
``rehearse`` modules of ``enginesmith.triton.trtllm`` and ``enginesmith.triton.llmapi``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginesmith.errors import GateError


@dataclass(frozen=True)
class Check:
    """One thing that was asked of the server."""

    name: str
    asked: str
    expected: str
    seen: str
    passed: bool


def require_passed(model: str, checks: Sequence[Check]) -> None:
    """Return when every check passed.

    Raises:
        GateError: some did not; says of each what was asked, what was expected and what was seen.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        details = "\n".join(
            f"  {check.name}: asked {check.asked!r}\n    expected {check.expected!r}\n    seen     {check.seen!r}"
            for check in failed
        )
        raise GateError(
            f"{model} failed its rehearsal in tritonserver: {len(failed)} of {len(checks)} checks\n{details}",
            hint="the package will not be published; the engine passed its verification, so look at how it is served",
        )
