"""A build in miniature: real plans, processes and stores around steps that write a few bytes.

The directory in ``TINY_STEPS`` steers and records the steps. ``runs.txt`` gets a line for each run; a file
``<kind>.do`` (or ``<kind>@<variant>.do``) makes that step misbehave. ``python tiny_steps.py SPEC STORE`` builds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from enginesmith.errors import GateError
from enginesmith.steps import STEP_KINDS, StepContext, StepKind, StepName

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}

SPEC = """
name: tiny
source: {path: checkpoint}
variants:
  wo: {scheme: int8_wo}
"""

KINDS: Mapping[StepName, StepKind] = {
    name: replace(kind, function=f"tiny_steps:{name}", tools=(), code=("tiny_steps",))
    for name, kind in STEP_KINDS.items()
}


def write_project(directory: Path) -> Path:
    """A spec with its checkpoint in ``directory``; the path of the spec."""
    (directory / "checkpoint").mkdir(parents=True)
    (directory / "checkpoint" / "config.json").write_text(json.dumps(HF_CONFIG))
    spec = directory / "tiny.yaml"
    spec.write_text(SPEC)
    return spec


def fetch(context: StepContext) -> Mapping[str, Any]:
    return _step("fetch", context, {"config.json": json.dumps(HF_CONFIG)})


def reference(context: StepContext) -> Mapping[str, Any]:
    return _step("reference", context)


def quantize(context: StepContext) -> Mapping[str, Any]:
    return _step("quantize", context)


def lower(context: StepContext) -> Mapping[str, Any]:
    return {**_step("lower", context), "engine_bytes": 50, "bf16_bytes": 100, "fp32_bytes": 200}


def measure(context: StepContext) -> Mapping[str, Any]:
    return {**_step("measure", context), "perplexity": 12.5, "quality": {"top1_agreement": 0.9}}


def verify(context: StepContext) -> Mapping[str, Any]:
    return {**_step("verify", context), "passed": True}


def package(context: StepContext) -> Mapping[str, Any]:
    return _step("package", context)


def rehearse(context: StepContext) -> Mapping[str, Any]:
    return _step("rehearse", context)


def _step(kind: str, context: StepContext, files: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    control = Path(os.environ["TINY_STEPS"])
    with (control / "runs.txt").open("a") as runs:
        runs.write(f"{kind} {os.environ.get('HF_HUB_OFFLINE')}\n")
    context.progress(0.5, "half done")
    for name, text in (files or {f"{kind}.txt": "made"}).items():
        (context.out / name).write_text(text)
    if (order := control / f"{kind}.do").exists():
        _misbehave(order.read_text(), control, context.out)
    return {"kind": kind}


def _misbehave(order: str, control: Path, out: Path) -> None:
    match order:
        case "hold":  # Tell the test that the step is running, then wait to be released.
            (control / "started").write_text(str(os.getpid()))
            (control / "release").read_text()
        case "gate":
            raise GateError("top-1 agreement is 0.1, the limit is 0.6", hint="use another scheme")
        case "crash":
            print("a last word on stdout", flush=True)
            raise ValueError("the step is broken")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "thread":
            threading.Thread(target=threading.Event().wait).start()
        case "quit":
            os._exit(7)
        case "fill":
            (out / "large.bin").write_bytes(bytes(1 << 20))
        case "link":
            (out / "link").symlink_to("/etc/hostname")


def kill_in_call(name: str, number: int) -> None:
    """Make this process kill itself when it calls ``os.<name>`` for the ``number``-th time."""
    original, calls = getattr(os, name), 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, counted)


def main(arguments: list[str]) -> None:
    from enginesmith.build import build
    from enginesmith.plan import make_plan
    from enginesmith.spec_file import load_spec
    from enginesmith.store import ArtifactStore

    spec, root, *death = arguments
    store = ArtifactStore(Path(root))
    plan = make_plan(load_spec(Path(spec)), store, kinds=KINDS)
    if death:
        kill_in_call(death[0], int(death[1]))
    build([plan], store, kinds=KINDS, on_event=lambda event: print(event.state, event.step.kind, flush=True))
    store.digests.close()


if __name__ == "__main__":
    main(sys.argv[1:])
