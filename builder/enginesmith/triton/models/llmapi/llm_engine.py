"""``tensorrt_llm.LLM`` on an asyncio loop of its own, in a thread of its own.

TensorRT-LLM delivers answers through the loop in which they were asked for, and Triton calls a model from threads that
have none. The LLM itself is made and ended beside the loop, because both take long.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

EXIT_TIMEOUT_S = 30.0


class Engine:
    """A running LLM. ``tensorrt_llm`` is imported here, after the GPUs were chosen."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from tensorrt_llm import LLM, SamplingParams
        from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

        self._sampling = SamplingParams
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        try:
            # Makes the classes of nested mappings, e.g. of kv_cache_config.
            self._llm = LLM(**update_llm_args_with_extra_dict({}, dict(arguments)))
        except BaseException:
            self._end_loop()
            raise

    def submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Run ``work`` in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Any, *arguments: Any) -> None:
        """Call ``function`` in the loop, soon."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return list(self._llm.tokenizer.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, as TensorRT-LLM makes it for an answer that is not streamed."""
        return str(self._llm.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def generate(self, tokens: list[int], sampling: Mapping[str, Any], *, streaming: bool) -> Any:
        """Start an answer; only in the loop. The result can be iterated with ``async for`` and aborted.

        Raises:
            ValueError: TensorRT-LLM refuses the request.
        """
        return self._llm.generate_async(tokens, self._sampling(**sampling), streaming=streaming)

    def close(self) -> None:
        """End the LLM and its workers, then the loop."""
        self._llm.shutdown()
        self._end_loop()
        # Under tensor parallelism references that are still held keep the process from ending.
        del self._llm
        gc.collect()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(EXIT_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()
