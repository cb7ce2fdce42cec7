"""Tokens to text behind a TensorRT-LLM engine."""
