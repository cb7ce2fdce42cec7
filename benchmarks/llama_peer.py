"""llama.cpp as a peer: decodes on request, one request and one answer per line of JSON.

Run by ``engines.py`` with another interpreter, one that has llama-cpp-python, so that llama.cpp is no dependency of
this project. Arguments: the GGUF file, threads, context length. Imports llama_cpp and numpy only.
"""

import json
import sys
import time

import llama_cpp  # type: ignore[import-not-found,unused-ignore]
import numpy as np


def next_token(model: llama_cpp.Llama) -> int:
    """The most likely next token, found as this project's runtime finds it: argmax over the logits in place."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))))


def decode_tokens_per_s(model: llama_cpp.Llama, prompt: list[int], *, warm_steps: int, steps: int) -> float:
    """Tokens per second of ``steps`` greedy decoding steps, after the prompt and ``warm_steps`` that are not timed."""
    model.reset()
    model.eval(prompt)
    for _ in range(warm_steps):
        model.eval([next_token(model)])
    started_s = time.perf_counter()
    for _ in range(steps):
        model.eval([next_token(model)])
    return steps / (time.perf_counter() - started_s)


def main() -> None:
    """Answer requests until stdin ends."""
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    hello = {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
        "vocab_size": model.n_vocab(),
    }
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        speed = decode_tokens_per_s(
            model, request["prompt"], warm_steps=request["warm_steps"], steps=request["steps"]
        )
        print(json.dumps({"tokens_per_s": speed}), flush=True)


if __name__ == "__main__":
    main()
