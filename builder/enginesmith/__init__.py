"""enginesmith: from a model checkpoint to engines that NVIDIA Triton serves."""

__version__ = "0.1.0"
