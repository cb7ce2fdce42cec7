"""TensorRT-LLM engines behind Triton: the five models, their rehearsal without a GPU, and their package."""
