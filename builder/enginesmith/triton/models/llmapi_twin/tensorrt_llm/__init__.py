"""Plays the part of TensorRT-LLM's LLM API in a rehearsal: same names, same refusals, generated on the CPU.

What is played: the classes that the served model uses, with the behaviour of TensorRT-LLM 1.2 that it relies on. What
is not played is refused by name, so that a rehearsal never passes by chance.
"""

from .llm import LLM
from .sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "1.2.1"
