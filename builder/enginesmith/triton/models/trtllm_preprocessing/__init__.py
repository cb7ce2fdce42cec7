"""Text to tokens in front of a TensorRT-LLM engine."""
