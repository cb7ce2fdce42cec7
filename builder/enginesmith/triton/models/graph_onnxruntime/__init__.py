"""A graph served by Triton's Python backend over ONNX Runtime."""
