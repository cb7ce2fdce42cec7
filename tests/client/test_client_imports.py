"""What importing the client costs: numpy, and the library of a protocol only when it is used."""

import json
import subprocess
import sys

PROBE = """
import json, sys
before = set(sys.modules)
import enginesmith_client
{then}
# Modules without a file are made by compiled modules (Cython's runtime inside numpy).
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before if getattr(sys.modules[name], "__file__", None)}}
print(json.dumps(sorted(loaded - set(sys.stdlib_module_names))))
"""


def third_party_modules(then: str = "") -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(then=then)], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_importing_the_client_imports_nothing_but_numpy() -> None:
    assert third_party_modules() == {"enginesmith_client", "numpy"}


def test_a_client_for_http_needs_nothing_but_the_standard_library_and_numpy() -> None:
    assert third_party_modules("enginesmith_client.Client('127.0.0.1:8000')") == {
        "enginesmith_client",
        "numpy",
    }


def test_a_client_for_grpc_imports_no_http_library_and_nothing_of_the_builder() -> None:
    loaded = third_party_modules("enginesmith_client.Client('127.0.0.1:8001')")
    assert {"grpc", "tritonclient"} <= loaded
    assert not loaded & {"enginesmith", "gevent", "geventhttpclient", "aiohttp", "torch", "pydantic"}
