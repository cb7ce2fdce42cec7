"""What ``enginesmith_client.perf`` offers, and what importing it costs."""

import subprocess
import sys

import enginesmith_client.perf as perf


def test_every_public_name_can_be_had() -> None:
    assert [
        name for name in perf.__all__ if getattr(perf, name).__module__.split(".")[0] != "enginesmith_client"
    ] == []


def test_importing_the_harness_imports_none_of_its_libraries() -> None:
    code = "import sys, enginesmith_client.perf; print({'pydantic', 'psutil', 'jinja2', 'grpc'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )
