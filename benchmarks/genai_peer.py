"""onnxruntime-genai as a peer: its ``Generator`` over the very graph and weights that we serve.

Only the configuration is added. ``logits_to_keep`` is taken off the graph's inputs, which leaves its default: all
positions, as onnxruntime-genai expects. So what differs is the runtime alone.
Format of ``genai_config.json``: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from enginesmith.errors import ToolchainError


class GenAiPeer:
    """The engine of ``engine_directory`` in onnxruntime-genai; ``workspace`` gets a copy of the graph.

    Raises:
        ToolchainError: onnxruntime-genai is not installed.
    """

    def __init__(self, engine_directory: Path, workspace: Path, *, threads: int, capacity: int) -> None:
        try:
            import onnxruntime_genai as genai
        except ImportError as error:
            raise ToolchainError(
                "this benchmark compares with onnxruntime-genai, which is not installed",
                hint="make setup installs it (extra dev)",
            ) from error
        self._genai = genai
        self._capacity = capacity
        engine = json.loads((engine_directory / "engine.json").read_text(encoding="utf-8"))
        _write_graph(engine_directory, workspace)
        config = _config(engine, threads=threads, capacity=capacity)
        (workspace / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
        self._model = genai.Model(str(workspace))
        self.version = str(genai.__version__)

    def decode_tokens_per_s(self, prompts: Sequence[Sequence[int]], *, tokens: int) -> float:
        """Tokens per second of ``tokens`` greedy decoding steps of all ``prompts`` at once.

        The prompts are cut to the length of the shortest; their prefill is not timed, which is to the peer's advantage.
        """
        import numpy as np

        length = min(len(prompt) for prompt in prompts)
        parameters = self._genai.GeneratorParams(self._model)
        # The end of text must not shorten an answer: all rows decode to the full length.
        parameters.set_search_options(
            batch_size=len(prompts),
            do_sample=False,
            max_length=self._capacity,
            min_length=length + tokens + 2,
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array([prompt[:length] for prompt in prompts], np.int32))
        generator.generate_next_token()
        started_s = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return tokens * len(prompts) / (time.perf_counter() - started_s)


def _write_graph(engine_directory: Path, workspace: Path) -> None:
    import onnx

    model = onnx.load(str(engine_directory / "model.onnx"), load_external_data=False)
    inputs = [one for one in model.graph.input if one.name != "logits_to_keep"]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx.save(model, str(workspace / "model.onnx"))
    (workspace / "weights.bin").write_bytes((engine_directory / "weights.bin").read_bytes())


def _config(engine: dict[str, Any], *, threads: int, capacity: int) -> dict[str, Any]:
    heads = engine["kv_heads"]
    return {
        "model": {
            "type": "llama",
            "bos_token_id": engine["eos_token_ids"][0],
            "eos_token_id": engine["eos_token_ids"],
            "pad_token_id": engine["eos_token_ids"][0],
            "vocab_size": engine["vocab_size"],
            "context_length": engine["max_positions"],
            "decoder": {
                "filename": "model.onnx",
                "session_options": {
                    "intra_op_num_threads": threads,
                    "provider_options": [],
                    **engine["session_config"],
                },
                "head_size": engine["head_dim"],
                "hidden_size": engine["head_dim"] * heads,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": engine["layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": capacity, "num_beams": 1, "past_present_share_buffer": True},
    }
