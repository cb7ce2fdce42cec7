"""Triton repositories of models that one ONNX graph computes: packaged, rehearsed, joined with TensorRT engines."""
