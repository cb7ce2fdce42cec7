"""The ``rehearse`` step: the package, alone, in a real tritonserver, asked real questions.

Good requests must be answered as the package's own runtime answers them in this process: whole or in pieces, alone or in
any company, over gRPC and HTTP. Bad ones must be refused with a reason, and must not hurt the next. Anything else stops the
build. What is asked is in ``llm_checks``, what is right in ``llm_subject``.

``rehearsal.json`` says which bytes were rehearsed, so that nothing else can be published in their name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

from enginesmith.steps import StepContext
from enginesmith.triton.llm_asking import Asking
from enginesmith.triton.llm_checks import run_checks
from enginesmith.triton.llm_subject import read_subject
from enginesmith.triton.placement import contents_digest, place_tree, tree_contents
from enginesmith.triton.rehearsal_report import require_passed
from enginesmith.triton.server import TritonServer, find_server


def run(context: StepContext) -> Mapping[str, Any]:
    """Rehearse the package. Facts: ``ready_s``, ``requests``, ``server_version``.

    Raises:
        GateError: an answer was wrong; says what was asked, what was expected and what was seen.
        ServerError: tritonserver could not load the package.
    """
    model = str(context.params["model_name"])
    package = context.inputs["package"] / model
    context.progress(None, "asking the engine without a server")
    subject = read_subject(package)
    repository = context.scratch / "repository"
    repository.mkdir()
    place_tree(package, repository / model)

    installation = find_server(str(context.params.get("server") or "auto"))
    started = time.monotonic()
    with TritonServer(repository, installation=installation) as server:
        server.wait_ready(on_progress=context.progress)
        ready_s = time.monotonic() - started
        context.progress(None, "asking tritonserver")
        with closing(Asking(server.grpc_url, server.http_url, model)) as asking:
            checks = run_checks(asking, subject)
        server.require_alive("while it was asked")
        facts = {
            "ready_s": round(ready_s, 3),
            "requests": asking.requests,
            "server_version": server.server_version(),
        }
    require_passed(model, checks)
    rehearsal = {
        "format": 2,
        "passed": True,
        "model": model,
        "package_digest": contents_digest(tree_contents(package)),
        "checks": [asdict(check) for check in checks],
        **facts,
    }
    (context.out / "rehearsal.json").write_text(json.dumps(rehearsal, indent=1) + "\n", encoding="utf-8")
    return facts
