"""A thin, typed client for models that NVIDIA Triton serves."""

__version__ = "0.1.0"
