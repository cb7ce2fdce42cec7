"""Plays the model tensorrt_llm on a CPU, behind its exact inputs and outputs."""
