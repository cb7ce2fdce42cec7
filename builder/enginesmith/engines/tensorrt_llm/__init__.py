"""TensorRT-LLM 1.2: from a unified Hugging Face checkpoint to engines.

``convert`` writes TensorRT-LLM's checkpoint format on any machine; compiling it into engines needs the GPU.
"""
