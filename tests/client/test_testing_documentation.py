"""The examples of the pages on the fake server and on generated clients, run as they are written."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from enginesmith.client_stub.module import module_code
from enginesmith.client_stub.source import StubModel
from enginesmith_client import ModelMetadata, TensorMetadata

DOCS = Path(__file__).parents[2] / "docs"
VECTOR = (-1,)
SUM = ModelMetadata(
    "sum", ("1",), "python", (TensorMetadata("a", "FP32", VECTOR), TensorMetadata("b", "FP32", VECTOR)),
    (TensorMetadata("sum", "FP32", VECTOR),), 0, decoupled=False,
)  # fmt: skip


def examples(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_fake_server_run_in_their_order() -> None:
    namespace: dict[str, object] = {}
    for example in examples("client-testing.md"):
        exec(compile(example, "client-testing.md", "exec"), namespace)
    assert namespace["pieces"] == ["You ", "said: ", "hello"]


def test_the_example_of_a_fixture_passes_as_a_test_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(examples("client-testing.md")[0], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith("1 passed"), done.stdout


def test_the_examples_of_generated_clients_run(monkeypatch: pytest.MonkeyPatch) -> None:
    api = ModuleType("api")
    monkeypatch.setitem(sys.modules, "api", api)
    exec(compile(module_code([StubModel(SUM, "1")], generated_by="1"), "api.py", "exec"), api.__dict__)
    namespace: dict[str, object] = {}
    for example in examples("client-stub.md"):
        exec(compile(example, "client-stub.md", "exec"), namespace)
    assert namespace["total"].sum.shape == (2,)  # type: ignore[attr-defined]
