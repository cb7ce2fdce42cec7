"""A language model served by Triton's Python backend over ``tensorrt_llm.LLM``."""
