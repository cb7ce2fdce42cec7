"""A graph served by Triton's Python backend over TensorRT or TensorRT for RTX; not yet run on a GPU."""
