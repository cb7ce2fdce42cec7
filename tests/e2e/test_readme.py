"""README's quick start, run as it is written: the shell lines by bash, and the Python lines against what they serve."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
DEFAULT_PORTS = (8000, 8001, 8002)
LAST_LINE = "kill %1\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files under version control, in which ``make setup`` has nothing to do."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no git checkout, so there is nothing to copy")
    copy = tmp_path / "checkout"
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    environment = copy / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        (environment / entry.name).symlink_to(entry)
    # Its own stamp, newer than every file: pip must not install the copy into the environment that it borrows.
    (environment / ".setup-stamp").unlink(missing_ok=True)
    (environment / ".setup-stamp").touch()
    return copy


def quick_start(language: str) -> str:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Quick start")[2]
    (block,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(block)


def require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            pytest.skip(f"the quick start uses Triton's default ports, and {port} is taken: {error.strerror}")


def test_quick_start_runs_as_it_is_written(checkout: Path) -> None:
    shell, python = quick_start("sh"), quick_start("python")
    assert shell.endswith(LAST_LINE), "the server ends with the block"
    for port in DEFAULT_PORTS:
        require_free(port)
    # The Python lines need the server that the last shell line ends; `wait` is for its end.
    python_lines = f"echo PYTHON; .venv/bin/python - <<'END'\n{python}END\necho ENDED\n"
    script = f"set -e\n{shell.removesuffix(LAST_LINE)}{python_lines}{LAST_LINE}wait\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said, _, rest = done.stdout.partition("PYTHON\n")
    answer_from_python = rest.partition("ENDED\n")[0]
    assert "verify" in said, "plan lists the steps"
    assert "int4-awq" in said, "make engines shows its table"
    assert said.splitlines()[-1].strip(), "ask prints an answer"
    assert answer_from_python.strip()
    assert (checkout / "model_repository" / "smollm2-135m-int4-awq" / "1" / "model.onnx").is_file()
    for port in DEFAULT_PORTS:
        with socket.create_server(("127.0.0.1", port)):
            pass
