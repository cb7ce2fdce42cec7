"""TensorRT-LLM's LLM API behind Triton: a checkpoint, ``model.yaml`` and a Python model; no engines."""
