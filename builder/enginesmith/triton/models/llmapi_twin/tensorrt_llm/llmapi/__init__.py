"""The part of ``tensorrt_llm.llmapi`` that the served model uses."""
