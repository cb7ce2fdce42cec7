"""The verb ``doctor``: what this machine has and what it can do. stdout is the answer, as text or JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from enginesmith.cli_options import JSON_OPTION, print_json

if TYPE_CHECKING:
    from enginesmith.doctor import Diagnosis, Finding

_NOT_KNOWN = "not known"


@click.command()
@JSON_OPTION
@click.pass_obj
def doctor(store_root: Path, *, as_json: bool) -> int:
    """Show what this machine has, what that means for which target, and the table of toolchains.

    Exit status 0 when everything for a CPU is there; GPU parts may be missing.

    \b
    Examples:
      enginesmith doctor
      enginesmith doctor --json | jq '.findings[] | select(.state != "ok")'
    """
    from enginesmith.doctor import diagnose

    diagnosis = diagnose(store_root)
    if as_json:
        print_json(_document(diagnosis))
    else:
        click.echo(
            "\n".join(
                [*_finding_lines(diagnosis), "", *_purpose_lines(diagnosis), "", *_toolchain_lines(diagnosis)]
            )
        )
    return 0 if diagnosis.can("cpu") else 1


def _document(diagnosis: Diagnosis) -> dict[str, Any]:
    from enginesmith.doctor import PURPOSES
    from enginesmith.platforms import TOOLCHAINS

    return {
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "can": {purpose: diagnosis.can(purpose) for purpose in PURPOSES},
        "gpus": [asdict(gpu) for gpu in diagnosis.gpus],
        "toolchain": diagnosis.toolchain.tag,
        "toolchains": [
            {**asdict(row), "image": row.image, "engines": row.has_engines, "llmapi": row.has_llmapi}
            for row in TOOLCHAINS.values()
        ],
    }


def _finding_lines(diagnosis: Diagnosis) -> list[str]:
    lines = []
    for finding in diagnosis.findings:
        lines.append(f"{_mark(finding):<8} {finding.name:<22} {finding.seen}")
        if finding.state != "ok" and finding.advice:
            lines.append(f"{'':<31} {finding.advice}")
    return lines


def _mark(finding: Finding) -> str:
    return finding.state.upper() if finding.state == "wrong" else finding.state


def _purpose_lines(diagnosis: Diagnosis) -> list[str]:
    from enginesmith.doctor import PURPOSES

    lines = []
    for purpose, meaning in PURPOSES.items():
        lacking = [
            finding.name
            for finding in diagnosis.findings
            if purpose in finding.needed_for and finding.state != "ok"
        ]
        lines.append(
            f"{'no ' if lacking else 'yes':<8} {meaning}"
            + (f" (lacks {', '.join(lacking)})" if lacking else "")
        )
    return lines


def _toolchain_lines(diagnosis: Diagnosis) -> list[str]:
    from enginesmith.platforms import TOOLCHAINS

    header = ("tag", "TensorRT-LLM", "Triton", "TensorRT", "CUDA", "driver", "engines", "LLM API")
    rows = [
        (
            row.tag,
            row.tensorrt_llm,
            row.triton or _NOT_KNOWN,
            row.tensorrt,
            row.cuda,
            row.driver,
            "yes" if row.has_engines else "no",
            "yes" if row.has_llmapi else "no",
        )
        for row in TOOLCHAINS.values()
    ]
    widths = [max(len(cells[column]) for cells in (header, *rows)) for column in range(len(header))]
    lines = ["toolchains: tritonserver:TAG-trtllm-python-py3 (> fits this machine)"]
    for cells in (header, *rows):
        mark = ">" if cells[0] == diagnosis.toolchain.tag else " "
        lines.append(
            f"{mark} "
            + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        )
    return lines


VERBS = (doctor,)
