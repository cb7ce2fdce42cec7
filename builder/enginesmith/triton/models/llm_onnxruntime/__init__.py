"""A language model served by Triton's Python backend over ONNX Runtime."""
