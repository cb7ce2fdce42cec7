"""The examples of the client's documentation, run as they are written."""

import re
from pathlib import Path

import pytest
from served_models import RunningServer

ROOT = Path(__file__).parents[2]
PAGES = (
    "client/README.md", "docs/client.md", "docs/client-async.md", "docs/client-chat.md", "docs/client-connections.md", "docs/client-embeddings.md",
    "docs/client-errors.md", "docs/client-streaming.md",
)  # fmt: skip
SERVED = {"smollm2-135m-int4-awq": "llm", "minilm-l6-int8": "sentences", '"relevance"': '"relevance-text"'}
"""The model of the tests that answers for each that the examples ask."""


@pytest.mark.server
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, server: RunningServer) -> None:
    examples = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        here = example.replace("127.0.0.1:8001", server.grpc_url).replace("127.0.0.1:8000", server.http_url)
        for published, served in SERVED.items():
            here = here.replace(published, served)
        exec(compile(here, page, "exec"), namespace)
