"""Generated clients against a real server: made of what it serves, and drift found when it serves something else."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from served_models import LOADED, RunningServer

from enginesmith import cli
from enginesmith_client import Client, SignatureDrift

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def api(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module that the command line writes of everything that the server serves."""
    file: Path = tmp_path_factory.mktemp("stub") / "api.py"
    assert cli.run(["client-stub", *LOADED, "--server", server.url("grpc"), "-o", str(file)]) == 0
    module = ModuleType("api_of_the_server")
    sys.modules[module.__name__] = module  # Where dataclasses look up annotations.
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_every_model_of_a_server_has_a_client_that_connects(client: Client, api: ModuleType) -> None:
    classes = [
        one for name, one in vars(api).items() if hasattr(one, "SIGNATURE") and not name.startswith("_")
    ]
    assert len(classes) == len(LOADED)
    for one in classes:
        one.connect(client)


def test_a_generated_client_infers_embeds_classifies_and_generates(client: Client, api: ModuleType) -> None:
    ones = np.ones((1, 2), np.float32)
    answer = api.Pair.connect(client).infer(a=ones, b=ones)
    np.testing.assert_array_equal(answer.sum, [[2, 2]])
    np.testing.assert_array_equal(answer.difference, [[0, 0]])
    assert api.SentencesText.connect(client).embed(["e"]).tolist() == [[1, 1, 1]]
    assert len(api.MoodsText.connect(client).classify(["a.", "b!"])) == 2
    assert api.PlainLlm.connect(client).generate("echo").text == "echo"


def test_a_model_that_changed_is_found_when_connecting(
    client: Client, server: RunningServer, api: ModuleType
) -> None:
    tensor = {"data_type": "TYPE_FP32", "dims": [-1]}
    config = {"backend": "python", "input": [{"name": "x", **tensor}], "output": [{"name": "y", **tensor}]}
    client.load("changing", config=config)
    try:
        with pytest.raises(SignatureDrift) as caught:
            api.Changing.connect(client)
    finally:
        server.unload("changing")  # Loading alone keeps the configuration that a client gave.
        assert server.load("changing")
    assert list(caught.value.differences) == [
        "input 'x' is FP32 now, INT32 before",
        "output 'y' is FP32 now, INT32 before",
    ]
    api.Changing.connect(client)
