"""How ``model.yaml`` becomes keyword arguments of the LLM."""

from __future__ import annotations

from typing import Any


def update_llm_args_with_extra_dict(
    llm_args: dict[str, Any], llm_args_dict: dict[str, Any]
) -> dict[str, Any]:
    """``llm_args`` with the keys of ``llm_args_dict`` on top. The original also makes configuration objects."""
    return {**llm_args, **llm_args_dict}
