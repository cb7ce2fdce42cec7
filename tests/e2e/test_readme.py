"""README's quick start, run as it is written: the shell lines by bash, and the Python lines against what they serve.

What it builds are the specs that the project ships, with real weights; what they promise is tested here, on that.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_project import Project

from enginesmith.triton.server import TritonServer
from enginesmith_client import Client

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
DEFAULT_PORTS = (8000, 8001, 8002)
LAST_LINE = "kill %1\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files under version control, in which ``make setup`` has nothing to do."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("this is no git checkout, so there is nothing to copy")
    copy = tmp_path_factory.mktemp("readme") / "checkout"
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


@pytest.fixture(scope="module")
def quick_started(checkout: Path) -> tuple[Path, str]:
    """The checkout after the quick start, and what it printed."""
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
    return checkout, done.stdout


def test_quick_start_runs_as_it_is_written(quick_started: tuple[Path, str]) -> None:
    checkout, printed = quick_started
    said, _, rest = printed.partition("PYTHON\n")
    answer_from_python = rest.partition("ENDED\n")[0]
    assert "verify" in said, "plan lists the steps"
    assert "int4-awq" in said, "build shows its table"
    assert "mean cosine" in said, "make engines shows its table"
    assert said.splitlines()[-1].strip(), "ask prints an answer"
    assert answer_from_python.strip()
    assert (checkout / "model_repository" / "smollm2-135m-int4-awq" / "1" / "model.onnx").is_file()
    for port in DEFAULT_PORTS:
        with socket.create_server(("127.0.0.1", port)):
            pass


TEXTS = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "",
    "\U0001f99c ünïcode, and a word of many pieces: antidisestablishmentarianism",
    "A cheetah is running behind its prey. " * 60,
)


def minilm_project(checkout: Path) -> Project:
    directory = checkout / "models"
    return Project(
        directory,
        directory / "minilm-l6.yaml",
        checkout / ".enginesmith",
        checkout / "model_repository",
        os.environ,
    )


def test_minilm_through_its_text_ensemble_equals_sentence_transformers(
    quick_started: tuple[Path, str],
) -> None:
    from sentence_transformers import SentenceTransformer

    project = minilm_project(quick_started[0])
    fetched = project.entry(project.keys()["fetch", "-"])
    checkpoint = next(fetched.rglob("modules.json")).parent
    wanted = SentenceTransformer(str(checkpoint), device="cpu").encode(list(TEXTS))
    models = [f"minilm-l6-{variant}" for variant in ("fp32", "int8", "fp8")]
    parts = [model + part for model in models for part in ("", "-tokenizer", "-text")]
    with (
        TritonServer(project.repository, model_control="explicit", load_models=parts) as server,
        Client(f"grpc://{server.grpc_url}") as client,
    ):
        server.wait_ready()
        seen = [client.embed(model, TEXTS) for model in models]
    np.testing.assert_allclose(seen[0], wanted, atol=1e-4)
    for embeddings, least in ((seen[1], 0.98), (seen[2], 0.99)):
        assert (embeddings * wanted).sum(axis=1).mean() >= least


def test_naive_int8_of_minilm_is_stopped(quick_started: tuple[Path, str]) -> None:
    naive = {"scheme": "int8", "method": "max", "smoothing": None, "weights": "per_tensor", "attention": True}
    project = minilm_project(quick_started[0]).edited({"variants": {"naive": naive}})
    project.build().assert_one_error(1, "naive", "quality.mean_cosine", "limit at least 0.98")
