"""Triton repositories of models that one ONNX graph computes."""
