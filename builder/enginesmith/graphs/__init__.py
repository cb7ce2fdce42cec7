"""ONNX graphs: made from a model, quantized, lowered to a runtime, measured and judged."""
