"""ONNX Runtime engines: the quantized checkpoint's own integers in an ONNX graph."""
